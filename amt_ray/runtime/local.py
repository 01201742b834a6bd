"""From a configuration to the core's objects, run in this process: what every worker and trial does."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from amt_ray import plugins
from amt_ray.config import ConfigError, Experiment
from amt_ray.core.blocks import recompute_activations
from amt_ray.core.box_energy import box_energy
from amt_ray.core.encoder import Encoder
from amt_ray.core.evals import Task
from amt_ray.core.images import Augmentation
from amt_ray.core.loop import AtRefresh, Evaluation, Pretraining
from amt_ray.core.optim import adamw, cosine_schedule, scaled_lr
from amt_ray.core.parallel import Whole, shard
from amt_ray.core.ports import Ranks, Reporter
from amt_ray.core.preview import PlanOf, montage, preview
from amt_ray.core.probing import check_labelmaps, known_of, objectless
from amt_ray.core.sampling import images_a_step, steps_per_epoch
from amt_ray.core.weights import heads_note, start_from
from amt_ray.metric_names import check_sweep
from amt_ray.runtime.lineage import Descended, Origin
from amt_ray.runtime.splits import Splits, load_splits
from amt_ray.runtime.storage import AfterSave, StorageError, StoredCheckpoints, fetched
from amt_ray.sections import Attention

PREVIEW_IMAGES = 8
ROLL_BACKS = 3
BOX_IMAGES = 1024  # enough for a mean within about 2% of its value, at a small part of a refresh


def build_model(experiment: Experiment) -> Any:
    """The method, freshly initialised from the experiment's seed, or started from ``model.checkpoint``.

    Raises:
        ConfigError: If the checkpoint cannot be read or does not fit.
    """
    torch.manual_seed(experiment.seed)
    model = experiment.model
    method = plugins.load("methods", model.method)(**model.arguments(experiment.image_size))
    if model.checkpoint:
        try:
            start_from(method, fetched(model.checkpoint))
        except (ValueError, StorageError) as error:
            raise ConfigError(str(error)) from error
    return method


def checkpoint_note(experiment: Experiment) -> str | None:
    """See that ``model.checkpoint`` can be started from; a line where it does not state all that it is.

    Raises:
        ConfigError: As in `build_model`.
    """
    build_model(experiment)
    return heads_note(fetched(str(experiment.model.checkpoint)), experiment.model.encoder.num_heads)


def build_pretraining(
    experiment: Experiment, splits: Splits, ranks: Ranks, extra: Mapping[str, Any] | None = None
) -> Pretraining:
    """All parts of a run, on the ranks' device."""
    data, optim, train = experiment.data, experiment.optim, experiment.train
    model = build_model(experiment).to(ranks.device)
    if train.activation_checkpointing:
        recompute_activations(model)
    whole = Whole(model) if train.parallel == "fsdp" and ranks.size > 1 else None
    if whole is not None:
        shard(model, ranks)
    for seeded in (torch.manual_seed, np.random.seed, random.seed):
        seeded((experiment.seed * 1_000_003 + ranks.rank) % 2**32)
    lr = scaled_lr(optim.base_lr, images_a_step(len(splits.index), train.batch_size))
    optimizer = adamw(model, lr, optim.weight_decay, optim.betas)
    steps = steps_per_epoch(len(splits.index), train.batch_size)
    # of fewer workers than planned each takes more micro-batches, of the size that is known to fit its memory
    micro_batches = max(experiment.ray.num_workers, 1) * train.accumulate
    return Pretraining(
        model=model,
        images=splits.images,
        train_index=splits.index,
        augmentation=Augmentation(
            experiment.image_size, data.crop_scale, data.crop_ratio, data.flip, data.interpolation
        ),
        strategy_at=experiment.strategy_at,
        warmup_strategy=experiment.masking.build_warmup(experiment.unit_grid),
        scoring=experiment.scoring,
        unit=experiment.unit,
        crop_lookup=experiment.attention.crop,
        schedule=experiment.schedule,
        optimizer=optimizer,
        lr_schedule=cosine_schedule(optimizer, train.epochs * steps, optim.warmup_epochs * steps, optim.min_lr),
        batch_size=train.batch_size,
        ranks=ranks,
        accumulate=math.ceil(micro_batches / ranks.size),
        precision=train.precision,
        clip_grad=optim.clip_grad,
        compile=train.compile,
        whole=whole,
        roll_backs=ROLL_BACKS if train.on_nan == "roll_back" else 0,
        seed=experiment.seed,
        course=experiment.course,
        about={"experiment": experiment.model_dump(mode="json")},
        extra=extra or {},
    )


def evaluation(experiment: Experiment, task: Task | None, ranks: Ranks) -> Evaluation | None:
    """Probe of the held-out images; of the test split as well where the run is at its end."""
    if task is None:
        return None
    chosen = experiment.eval.chosen

    def evaluate(model: Encoder, last: bool) -> dict[str, float]:
        found: dict[str, float] = {}
        for protocol in chosen:
            found |= protocol(model, task, ranks, test=last)
        return found

    return evaluate


def check_protocols(experiment: Experiment, task: Task | None) -> None:
    """Refuse data that the protocols cannot take, before anything starts.

    Raises:
        ConfigError: If a protocol refuses.
    """
    model = experiment.model
    with torch.device("meta"):
        shape = plugins.load("methods", model.method)(**model.arguments(experiment.image_size))
    try:
        for protocol in experiment.eval.chosen if task else []:
            assert task is not None
            protocol.check(shape, task)
            if protocol.needs == "label maps":
                for source in filter(None, (source for _, _, source in task.splits)):
                    check_labelmaps(source)
        if task is not None and experiment.sweep is not None:
            check_sweep(experiment.sweep, experiment.eval.chosen, known_of(shape, task, test=True))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def figures_left_out(experiment: Experiment, task: Task | None, test: bool = True) -> list[str]:
    """Which figures there will not be, since no object is there to be found, a line each.

    Raises:
        ConfigError: If a sweep ranks by one of them.
    """
    asked = [measure for chosen in experiment.eval.chosen if chosen.needs == "objects" for measure in chosen.measures]
    said = []
    for split in objectless(task, test) if asked and task is not None else []:
        names = [f"{split.prefix}/{measure}" for measure in asked]
        said.append(f"no {', '.join(names)}: none of these {len(split.index_n)} images has an object")
        if experiment.sweep is not None and experiment.sweep.metric.startswith(tuple(names)):
            asked_for = experiment.sweep.metric
            raise ConfigError(f"sweep.metric must be a figure that there will be, got {asked_for}: {said[-1]}.")
    return said


def attention_on_objects(experiment: Experiment, splits: Splits, ranks: Ranks) -> AtRefresh | None:
    """`box_energy` of images whose objects are known, or None where none are."""
    objects = splits.pretrain.source.objects
    if objects is None:
        return None
    index = splits.shown[:BOX_IMAGES]

    def measure(model: Encoder) -> dict[str, float]:
        found = box_energy(model, splits.images, index, objects, experiment.scoring, ranks)
        return {f"attention/{name}": value for name, value in found.items()}

    return measure


def stored(
    experiment: Experiment,
    uri: str,
    ranks: Ranks,
    reporter: Reporter,
    after: AfterSave | None = None,
    forks: Mapping[int, object] | None = None,
) -> StoredCheckpoints:
    """A run's checkpoints at ``uri``: as many as the experiment keeps, and those of the epochs at which others fork;
    warnings go to the run's record.
    """
    keep = experiment.train.keep_checkpoints
    return StoredCheckpoints(uri, ranks, keep, experiment.best, reporter.warning, after, held=forks or ())


def run(
    experiment: Experiment,
    ranks: Ranks,
    reporter: Reporter,
    checkpoints: StoredCheckpoints,
    extra: Mapping[str, Any] | None = None,
    forks: Mapping[int, Sequence[Attention]] | None = None,
    origin: Origin | None = None,
) -> Mapping[int, Mapping[str, float]]:
    """Pretrain as configured, from the newest checkpoint if there is one; called by every rank.

    Args:
        experiment: What to train.
        ranks: The processes that train together.
        reporter: Where metrics go.
        checkpoints: The run's.
        extra: Kept in the checkpoints.
        forks: Given, the run is the warm-up of others, and ends at the last of these epochs (`Pretraining.run`).
        origin: Another run's checkpoint to go on from.

    Returns:
        All metrics of the run by epochs completed, also of epochs that were trained before.
    """
    splits = load_splits(experiment)
    pretraining = build_pretraining(experiment, splits, ranks, extra)
    if origin is not None:
        pretraining.about = {**pretraining.about, "origin": origin.name}

    def picture() -> bytes:
        plan = PlanOf(experiment.last_strategy, experiment.scoring, experiment.unit)
        shown = splits.shown[:PREVIEW_IMAGES]
        return montage(preview(pretraining.whole_model(), splits.images, shown, plan, experiment.seed))

    pretraining.run(
        reporter,
        checkpoints if origin is None else Descended(checkpoints, origin),
        evaluation(experiment, splits.task, ranks),
        attention_on_objects(experiment, splits, ranks),
        picture,
        {epoch: [a.scoring(experiment.train.precision) for a in some] for epoch, some in (forks or {}).items()},
        replay=origin is None or not origin.clone,
    )
    return pretraining.history
