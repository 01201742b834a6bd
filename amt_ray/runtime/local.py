"""From a configuration to the core's objects, run in this process: what every worker and trial does."""

import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amt_ray import plugins
from amt_ray.config import ConfigError, Experiment
from amt_ray.core.decoded import decoded
from amt_ray.core.encoder import Encoder
from amt_ray.core.evals import Task
from amt_ray.core.evals.knn import KNN
from amt_ray.core.images import Augmentation, ImageArray
from amt_ray.core.loop import Pretraining
from amt_ray.core.optim import adamw, cosine_schedule, scaled_lr
from amt_ray.core.ports import Checkpoints, Ranks, Reporter
from amt_ray.core.preview import PlanOf, montage, preview
from amt_ray.core.sampling import hold_out, steps_per_epoch
from amt_ray.core.tokens import pair

PREVIEW_IMAGES = 8
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Splits:
    """The images of a run: ``train`` holds both the images to train on and those held out to choose between runs."""

    train: ImageArray
    train_index: Tensor
    val_index: Tensor
    test: ImageArray | None


def load_splits(experiment: Experiment, on_progress: OnProgress | None = None) -> Splits:
    """Decode (once a node) and open the data set; a bad data set fails here with one line.

    Raises:
        ConfigError: If the images are not there, cannot be read, or lack the labels that the evaluation needs.
    """
    data = experiment.data
    try:
        dataset = plugins.load("datasets", data.name)(data.root)
        train = _open(dataset, "train", experiment, on_progress)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if experiment.eval.protocols and train.labels_n is None:
        raise ConfigError(
            "eval.protocols need images in class folders, got images without labels; set eval.protocols=[]."
        )
    try:
        test = _open(dataset, "test", experiment, on_progress) if experiment.eval.protocols else None
    except KeyError:
        test = None
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if test is not None and test.classes != train.classes:
        raise ConfigError(
            f"train and test must have the same classes, got {len(train.classes)} and {len(test.classes)}."
        )
    train_index, val_index = hold_out(len(train), data.val_fraction)
    if len(train_index) < 1 or (experiment.eval.protocols and len(val_index) < 1):
        raise ConfigError(
            f"data.val_fraction must leave images on both sides, got {data.val_fraction} of {len(train)}."
        )
    return Splits(train, train_index, val_index, test)


def _open(dataset: Any, split: str, experiment: Experiment, on_progress: OnProgress | None) -> ImageArray:
    data = experiment.data
    source = dataset.split(split)
    cache = Path(data.cache_dir).expanduser() if data.cache_dir else None
    pixels = decoded(source, pair(data.store_px or data.image_size), cache, on_progress).pixels
    return ImageArray(pixels, source.labels, dataset.mean, dataset.std, source.classes)


def build_model(experiment: Experiment) -> Any:
    """The method, freshly initialised from the experiment's seed."""
    torch.manual_seed(experiment.seed)
    model = experiment.model
    return plugins.load("methods", model.method)(**model.arguments(experiment.image_size))


def build_pretraining(
    experiment: Experiment, splits: Splits, ranks: Ranks, extra: Mapping[str, Any] | None = None
) -> Pretraining:
    """All parts of a run, on the ranks' device."""
    data, optim, train = experiment.data, experiment.optim, experiment.train
    model = build_model(experiment).to(ranks.device)
    for seeded in (torch.manual_seed, np.random.seed, random.seed):
        seeded((experiment.seed * 1_000_003 + ranks.rank) % 2**32)
    optimizer = adamw(model, scaled_lr(optim.base_lr, train.batch_size), optim.weight_decay, optim.betas)
    steps = steps_per_epoch(len(splits.train_index), train.batch_size)
    return Pretraining(
        model=model,
        images=splits.train,
        train_index=splits.train_index,
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
        accumulate=train.accumulate,
        precision=train.precision,
        clip_grad=optim.clip_grad,
        seed=experiment.seed,
        about={"experiment": experiment.model_dump(mode="json")},
        extra=extra or {},
    )


def evaluation(experiment: Experiment, splits: Splits, ranks: Ranks) -> Callable[[Encoder, bool], dict[str, float]]:
    """Probe of the held-out images; of the test split as well where the run is at its end."""
    settings = experiment.eval.knn
    knn = KNN((settings.k,), settings.temperature, settings.features)
    task = Task(splits.train, splits.train_index, splits.val_index, splits.test, experiment.image_size, experiment.seed)

    def evaluate(model: Encoder, last: bool) -> dict[str, float]:
        return knn(model, task, ranks, test=last) if "knn" in experiment.eval.protocols else {}

    return evaluate


def run(
    experiment: Experiment,
    ranks: Ranks,
    reporter: Reporter,
    checkpoints: Checkpoints,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Pretrain as configured, from the newest checkpoint if there is one; called by every rank."""
    splits = load_splits(experiment)
    pretraining = build_pretraining(experiment, splits, ranks, extra)
    shown = splits.val_index if len(splits.val_index) else splits.train_index

    def picture() -> bytes:
        plan = PlanOf(experiment.strategy_at(1.0), experiment.scoring, experiment.unit)
        return montage(preview(pretraining.model, splits.train, shown[:PREVIEW_IMAGES], plan, experiment.seed))

    pretraining.run(reporter, checkpoints, evaluation(experiment, splits, ranks), picture=picture)


class FolderCheckpoints:
    """Checkpoints in a folder of this machine, the newest few kept.

    Args:
        folder: Where ``epoch_NNNN`` folders go.
        keep: How many stay.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def _whole(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("epoch_*") if p.is_dir() and p.suffix != ".partial")

    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        whole = self._whole()
        return whole[-1] if whole else None

    def save(self, epoch: int, metrics: Mapping[str, float], write: Callable[[Path], None]) -> None:
        """Write beside, then rename: a folder of the final name is whole."""
        target = self.folder / f"epoch_{epoch:05d}"
        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for old in self._whole()[: -self.keep]:
            shutil.rmtree(old)
