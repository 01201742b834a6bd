"""Pretraining: the same loop under pytest, in one process, under Ray Train on many nodes and inside a Tune trial."""

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from amt_ray.core.attention import Scoring, score_by
from amt_ray.core.checkpoint import (
    random_states,
    read_scores,
    read_training,
    read_weights,
    restore_random_states,
    write_checkpoint,
    write_scores,
)
from amt_ray.core.cost import Cost, Course
from amt_ray.core.encoder import Encoder
from amt_ray.core.finite import NotFiniteError as NotFiniteError
from amt_ray.core.geometry import Crops, crop_scores, released_corner
from amt_ray.core.images import Augmentation, ImageArray
from amt_ray.core.masking import MaskingStrategy
from amt_ray.core.noise import Purpose, permutation, uniform
from amt_ray.core.parallel import Whole, averaging, checksum, load_optimizer, load_weights, whole_state, wrapped
from amt_ray.core.plan import PatchPlan
from amt_ray.core.ports import Checkpoints, Ranks, Reporter
from amt_ray.core.precision import dtype_of
from amt_ray.core.prefetch import Waits, ahead
from amt_ray.core.sampling import MicroBatch, epoch_steps, equal_share, step_images, steps_per_epoch
from amt_ray.core.schedule import Schedule
from amt_ray.core.score_store import ScoreStore

PROGRESS_EVERY_S = 2.0
NAMED_IMAGES = 8

# what a run writes: after every epoch, and after some; the evaluation protocols' names come beside these
EVERY_EPOCH = (
    "train/loss", "train/lr", "perf/images_per_s", "perf/epoch_s", "perf/data_wait_share", "perf/train_s",
    "perf/workers", "cost/flops", "cost/visible_tokens",
)  # fmt: skip
SOME_EPOCHS = ("perf/refresh_s", "perf/eval_s", "train/lr_scale")

Evaluation = Callable[[Encoder, bool], Mapping[str, float]]
AtRefresh = Callable[[Encoder], Mapping[str, float]]


class Prepared(NamedTuple):
    """A micro-batch on the ranks' device.

    Attributes:
        images: Augmented and normalised, [B, C, Y, X].
        plan: Their plans.
        weight_B: As in `MicroBatch`.
    """

    images: Tensor
    plan: PatchPlan
    weight_B: Tensor


@dataclass
class Pretraining:
    """A pretraining run: its parts, and the state that survives a restart.

    Args:
        model: A method (`amt_ray.core.methods`), on the ranks' device; or sharded (`amt_ray.core.parallel.shard`).
        images: The data set.
        train_index: Indices of the images to train on.
        augmentation: Crop and flip of the training images.
        strategy_at: The masking strategy after the switch, given how far the epoch is on the way from the switch (0) to
            the end (1).
        warmup_strategy: Masking strategy before the switch.
        scoring: What of the encoder's attention makes the scores.
        schedule: When what happens.
        optimizer: Over the model's parameters.
        lr_schedule: A function of the number of steps.
        batch_size: Global batch: most images a step over all ranks.
        accumulate: Micro-batches a step on each rank.
        precision: ``float32``, or ``bfloat16`` for autocast.
        unit: Side of a masking unit in patches.
        crop_lookup: ``aligned``: an image's scores are cropped as its pixels are; ``as_released``: as in AMT's released
            code (`released_corner`).
        clip_grad: Largest norm of the gradient, or None.
        compile: Whether the forward and backward pass go through ``torch.compile``.
        prefetch: Whether the next step's batch is made in a thread during this step; None: where the device is not the
            CPU, whose cores the step itself keeps busy.
        whole: For a sharded model: makes it whole.
        roll_backs: How often a loss that is not finite leads back to the newest checkpoint, with the learning rate
            halved from there on; else it ends the run.
        seed: Seed of the order, the crops and the plans.
        ranks: The processes that train together.
        course: What an epoch costs an image, logged as ``cost/flops`` and ``cost/visible_tokens`` up to each epoch.
        about: Kept in the weights' metadata.
        extra: Kept in the checkpoint beside the training state (the MLflow run id).
    """

    model: Any
    images: ImageArray
    train_index: Tensor
    augmentation: Augmentation
    strategy_at: Callable[[float], MaskingStrategy]
    warmup_strategy: MaskingStrategy
    scoring: Scoring
    schedule: Schedule
    optimizer: torch.optim.Optimizer
    lr_schedule: Scheduler
    batch_size: int
    ranks: Ranks
    accumulate: int = 1
    precision: str = "float32"
    unit: int = 1
    crop_lookup: Literal["aligned", "as_released"] = "aligned"
    clip_grad: float | None = None
    compile: bool = False
    prefetch: bool | None = None
    whole: Whole | None = None
    roll_backs: int = 0
    seed: int = 0
    course: Course | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.epoch = 0  # epochs completed
        self.train_s = 0.0
        self.history: dict[int, dict[str, float]] = {}  # metrics by epochs completed
        self.scores = ScoreStore(len(self.images), self.model.grid, self.ranks)
        self.wrapped = wrapped(self.model, self.ranks)
        # only the training step: its shapes never change, those of scoring and of probes do
        self.forward: Callable[..., Any] = torch.compile(self.wrapped, dynamic=False) if self.compile else self.wrapped
        self._whole_model: Any = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch."""
        return steps_per_epoch(len(self.train_index), self.batch_size)

    def state_dict(self, random_states_of_ranks: list[Any]) -> dict[str, Any]:
        """All but the weights: what a restart needs to go on as if there had been no stop; every rank calls it."""
        return {
            "optimizer": whole_state(self.optimizer.state_dict()),
            "epoch": self.epoch,
            "train_s": self.train_s,
            "history": self.history,
            "scores": self.scores.state_dict(),
            "random_states": random_states_of_ranks,
            **self.extra,
        }

    def resume(self, folder: Path) -> None:
        """Take up a checkpoint.

        Raises:
            ValueError: If it is of another model or data set.
        """
        weights, _ = read_weights(folder)
        try:
            load_weights(self.model, weights)
        except RuntimeError as error:
            first = str(error).splitlines()[-1].strip()
            raise ValueError(f"a checkpoint to go on from must be of this model, got {folder} ({first})") from error
        state = read_training(folder)
        load_optimizer(self.optimizer, state["optimizer"])
        self.epoch, self.train_s, self.history = state["epoch"], state["train_s"], state.get("history", {})
        self.scores.load_state_dict(state["scores"])
        if (maps := read_scores(folder, self.scoring.name)) is not None:
            self.scores.load_state_dict({"maps": maps, "refreshed_at_epoch": self.epoch})
        if len(state["random_states"]) == self.ranks.size:  # with other ranks than before, each keeps its fresh seed
            restore_random_states(state["random_states"][self.ranks.rank])

    def save(self, checkpoints: Checkpoints, metrics: Mapping[str, float], forks: Sequence[Scoring] = ()) -> None:
        """Write a checkpoint of the epochs completed; every rank calls it.

        Args:
            checkpoints: Where to.
            metrics: Of the last epoch.
            forks: What trainings that go on from here score first: their scores are kept beside the checkpoint.
        """
        state = self.state_dict(self.ranks.gather(random_states()))
        about = {**self.about, "epoch": self.epoch}
        weights, scores = whole_state(self.model.state_dict()), self.scored(forks)

        def write(folder: Path) -> None:
            write_checkpoint(folder, weights, state, about)
            write_scores(folder, scores)

        checkpoints.save(self.epoch, metrics, write)

    def whole_model(self) -> Any:
        """The model with all its weights, for all but training; every rank calls it."""
        if self.whole is None:
            return self.model
        if self._whole_model is None:
            self._whole_model = self.whole(self.model)
        return self._whole_model

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of the forward pass."""
        dtype = dtype_of(self.precision)
        return torch.autocast(self.ranks.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def refresh_scores(self) -> None:
        """Score every training image."""
        for chunk, scores_KBGW in self._score_images([self.scoring]):
            self.scores.write(chunk, scores_KBGW[0])
        self.scores.complete(self.epoch)

    def scored(self, scorings: Sequence[Scoring]) -> dict[str, Tensor]:
        """The maps [images, G, W] of all images that several scorings would store, by the scorings' names."""
        if not scorings:
            return {}
        maps_KnGW = torch.ones(len(scorings), *self.scores.maps.shape, dtype=self.scores.maps.dtype)
        for chunk, scores_KBGW in self._score_images(scorings):
            maps_KnGW[:, chunk] = scores_KBGW.cpu()
        return {scoring.name: maps_nGW for scoring, maps_nGW in zip(scorings, maps_KnGW, strict=True)}

    def _score_images(self, scorings: Sequence[Scoring]) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices and float16 maps [K, B, G, W] of the training images, whole; each rank scores a share of a chunk."""
        ranks, grid, model = self.ranks, self.model.grid, self.whole_model()
        for chunk in self.train_index.split(2 * max(self.batch_size, ranks.size)):
            mine = equal_share(chunk, ranks.rank, ranks.size)
            whole = self.images.whole(mine, self.augmentation.size, ranks.device)
            scores_KBN = score_by(scorings, model, whole)
            scores_BKGW = scores_KBN.transpose(0, 1).unflatten(2, grid).to(self.scores.maps.dtype)
            yield chunk, ranks.stack(scores_BKGW).flatten(0, 1)[: len(chunk)].transpose(0, 1)

    def strategy_now(self) -> MaskingStrategy:
        """The strategy of the epoch to come."""
        return self.warmup_strategy if self.schedule.in_warmup(self.epoch) else self.strategy_after_switch()

    def strategy_after_switch(self) -> MaskingStrategy:
        """The strategy of the epoch to come, or the one to which the warm-up leads."""
        return self.strategy_at(self.schedule.progress(self.epoch))

    @property
    def unit_grid(self) -> tuple[int, int]:
        """Rows and columns of the masking units."""
        rows, columns = self.model.grid
        return rows // self.unit, columns // self.unit

    def prepare(self, index_B: Tensor) -> tuple[Tensor, PatchPlan]:
        """Augmented images and their plans: a function of (seed, epoch, image) and the stored scores."""
        index_on_device = index_B.to(self.ranks.device, non_blocking=True)
        crops = self.augmentation.draw(self.seed, self.epoch, index_on_device, self.images.size)
        images = self.images.crop(index_B, crops, self.augmentation.size, self.augmentation.kernel)
        noise_BU = uniform(self.seed, self.epoch, index_on_device, Purpose.PLAN, math.prod(self.unit_grid))
        strategy = self.strategy_now()
        scores_BU = self.unit_scores(index_B, crops) if strategy.needs_scores else noise_BU
        return images, strategy(scores_BU, noise_BN=noise_BU).expand(self.model.grid, self.unit)

    def unit_scores(self, index_B: Tensor, crops: Crops) -> Tensor:
        """Each masking unit's mean score over the area of the image that it shows."""
        boxes = crops if self.crop_lookup == "aligned" else released_corner(crops, self.model.grid)
        return crop_scores(self.scores.lookup(index_B), boxes, self.unit_grid).flatten(1)

    def prepared(self, micro_batch: MicroBatch) -> Prepared:
        """A micro-batch, ready for `train_step`."""
        weight_B = micro_batch.weight_B.to(self.ranks.device, non_blocking=True)
        return Prepared(*self.prepare(micro_batch.index_B), weight_B)

    def train_step(self, micro_batches: Iterable[Prepared]) -> Tensor:
        """One optimizer step on ``accumulate`` micro-batches, in which nothing waits for the device.

        Returns:
            The rank's part of the sum of losses over the step's images.
        """
        total = torch.zeros((), device=self.ranks.device)
        for i, (images, plan, weight_B) in enumerate(micro_batches, 1):
            with averaging(self.wrapped, wanted=i == self.accumulate):
                with self.autocast():
                    loss_B = self.forward(images, plan).loss_B
                (loss_B * weight_B).sum().backward()
            total += (loss_B.detach() * (weight_B > 0)).sum()
        if self.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def train_epoch(self, reporter: Reporter) -> dict[str, float]:
        """One pass over the training images.

        Raises:
            NotFiniteError: If the loss of a step, or a weight at the end, is not finite; nothing of the epoch is kept.
                That is looked at once an epoch, so that no step waits for it.
        """
        self.model.train()
        self._whole_model = None
        started = spoke = time.monotonic()
        order = permutation(self.seed, self.epoch, self.train_index)
        losses = torch.zeros(self.steps_per_epoch, device=self.ranks.device)  # of each step, over its images
        lr_of = []
        steps = epoch_steps(order, self.batch_size, self.ranks.rank, self.ranks.size, self.accumulate)
        overlap = self.ranks.device.type != "cpu" if self.prefetch is None else self.prefetch
        stream = itertools.chain.from_iterable(steps)
        batches = Waits(ahead(self.prepared, stream) if overlap else map(self.prepared, stream))
        for step in range(self.steps_per_epoch):
            self.lr_schedule.step_update(self.epoch * self.steps_per_epoch + step)
            lr_of.append(self.optimizer.param_groups[0]["lr"])
            losses[step] = self.train_step(itertools.islice(batches, self.accumulate))
            if time.monotonic() - spoke > PROGRESS_EVERY_S:
                spoke = time.monotonic()
                reporter.progress(self.epoch, (step + 1) / self.steps_per_epoch)
        *sums, weights = self.ranks.sum(torch.cat([losses, checksum(self.model).view(1)])).tolist()
        wrong = [step for step, value in enumerate(sums) if not math.isfinite(value)]
        if wrong or not math.isfinite(weights):
            step = wrong[0] if wrong else len(sums) - 1
            got = f"the loss must stay finite, got {sums[step]}" if wrong else "weights must stay finite, got others"
            raise self._not_finite(got, order, step, lr_of[step], reporter)
        epoch_s = time.monotonic() - started
        self.train_s += epoch_s
        return {
            "train/loss": math.fsum(sums) / len(order),
            "train/lr": lr_of[-1],
            "perf/images_per_s": len(order) / epoch_s,
            "perf/epoch_s": epoch_s,
            "perf/data_wait_share": batches.waited_s / epoch_s,
            "perf/train_s": self.train_s,
            "perf/workers": self.ranks.size,
        }

    def spent(self, reporter: Reporter) -> dict[str, float]:
        """What the training has cost up to the end of this epoch, over all images.

        It goes on from the epoch before, so a training that moved its ratios, or went on from another's, counts what
        it and that one did.
        """
        if self.course is None:
            return {}
        images, before = len(self.train_index), self.history.get(self.epoch, {})
        try:
            epoch = self.course.epoch_cost(self.epoch) * images
            if "cost/flops" in before:
                total = Cost(before["cost/visible_tokens"], before["cost/flops"]) + epoch
            else:
                total = self.course.cost(self.epoch) * images + epoch
        except Exception as error:  # a method of one's own may train and yet not run on the meta device
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            reporter.warning(f"cost/flops and cost/visible_tokens are not logged, as counting failed: {reason}")
            self.course = None
            return {}
        return {"cost/flops": float(total.flops), "cost/visible_tokens": float(total.visible_tokens)}

    def _not_finite(self, got: str, order: Tensor, step: int, lr: float, reporter: Reporter) -> NotFiniteError:
        """The error that names the images of the step, all of which are recorded in a file."""
        images = step_images(order, self.batch_size, step).tolist()
        before = step_images(order, self.batch_size, step - 1).tolist() if step else []
        told = {"epoch": self.epoch + 1, "step": step, "lr": lr, "images": images, "images_of_step_before": before}
        name = f"not_finite/epoch_{self.epoch + 1:05d}.json"
        reporter.file(name, json.dumps(told).encode())
        shown = ", ".join(map(str, images[:NAMED_IMAGES])) + (", ..." if len(images) > NAMED_IMAGES else "")
        kept = f"the checkpoint of epoch {self.epoch} is whole" if self.epoch else "there is no checkpoint yet"
        return NotFiniteError(
            f"{got} in epoch {self.epoch + 1} at step {step + 1} of {self.steps_per_epoch}, of images {shown} ({name} "
            f"has all), at learning rate {lr:.3g}; {kept}. A lower optim.base_lr or optim.clip_grad may help."
        )

    def refresh_if_due(self, at_refresh: AtRefresh | None) -> dict[str, float]:
        """Score all images, if that is due before this epoch; what it took, and ``at_refresh``'s metrics."""
        metrics: dict[str, float] = {}
        if not (self.strategy_now().needs_scores and self.schedule.refresh_due(self.epoch)):
            return metrics
        if self.scores.refreshed_at_epoch != self.epoch:  # else they came with the checkpoint
            started = time.monotonic()
            self.refresh_scores()
            metrics["perf/refresh_s"] = time.monotonic() - started
            self.train_s += metrics["perf/refresh_s"]
        metrics |= at_refresh(self.whole_model()) if at_refresh is not None else {}
        return metrics

    def roll_back(self, error: NotFiniteError, reporter: Reporter, checkpoints: Checkpoints) -> None:
        """Go back to the newest checkpoint, with half the learning rate from there on; every rank calls it.

        The halving is kept in the optimizer's state, where timm's schedules look for it, and so in the checkpoints.

        Raises:
            NotFiniteError: The error, if that has been done ``roll_backs`` times, or there is no checkpoint.
        """
        halvings = round(-math.log2(self.lr_scale)) + 1
        folder = checkpoints.latest() if halvings <= self.roll_backs else None
        if folder is None:
            raise error
        self.resume(folder)
        for group in self.optimizer.param_groups:
            group["lr_scale"] = 0.5**halvings
        to = f"to epoch {self.epoch}, from where on the learning rate is {self.lr_scale:g} of the schedule's"
        reporter.warning(f"{error} Roll-back {halvings} of {self.roll_backs}, {to}.")

    @property
    def lr_scale(self) -> float:
        """What the schedule's learning rate is multiplied with."""
        return float(self.optimizer.param_groups[0].get("lr_scale", 1.0))

    def run(
        self,
        reporter: Reporter,
        checkpoints: Checkpoints,
        evaluate: Evaluation | None = None,
        at_refresh: AtRefresh | None = None,
        picture: Callable[[], bytes] | None = None,
        forks: Mapping[int, Sequence[Scoring]] | None = None,
        replay: bool = True,
    ) -> None:
        """Train what is left of the schedule, from the newest checkpoint if there is one.

        Metrics of the epochs before that checkpoint are recorded again, which changes nothing where they were recorded,
        and makes whole what a lost machine took with it, or what a training that goes on from another's lacks.

        Args:
            reporter: Where metrics and the picture go (a `Silent` one on ranks other than 0).
            checkpoints: Where checkpoints go.
            evaluate: Given the model and whether the run is at its end, gives metrics; called on every rank.
            at_refresh: Given the model after a refresh, gives metrics of its attention; called on every rank.
            picture: Makes the picture of masks and reconstructions at the end, on rank 0.
            forks: Given, training ends at the last of these epochs: others go on from there. For each epoch, what they
                score first; the checkpoint of the epoch holds it.
            replay: Whether to record the metrics of earlier epochs again; not where they are another run's.

        Raises:
            NotFiniteError: If the loss is not finite and ``roll_backs`` did not help; the checkpoints are intact.
        """
        if (folder := checkpoints.latest()) is not None:
            self.resume(folder)
            for epoch, known in self.history.items() if replay else ():
                reporter.metrics(known, epoch)
        while self.epoch < (max(forks) if forks else self.schedule.epochs):
            metrics = self.refresh_if_due(at_refresh)
            try:
                metrics |= self.train_epoch(reporter)
            except NotFiniteError as error:
                self.roll_back(error, reporter, checkpoints)
                continue
            if self.lr_scale != 1.0:
                metrics["train/lr_scale"] = self.lr_scale
            metrics |= self.spent(reporter)
            last = self.schedule.is_last(self.epoch)
            if evaluate is not None and self.schedule.eval_due(self.epoch):
                started = time.monotonic()
                metrics |= evaluate(self.whole_model(), last)
                metrics["perf/eval_s"] = time.monotonic() - started
            self.epoch += 1
            self.history[self.epoch] = metrics
            reporter.metrics(metrics, self.epoch)
            if last and picture is not None:
                self.whole_model()  # every rank has a part in it
            if last and picture is not None and self.ranks.rank == 0:
                reporter.file("figures/masks.png", picture())
            self.save(checkpoints, {"epoch": self.epoch, **metrics}, (forks or {}).get(self.epoch, ()))
