"""What an experiment will cost, told before anything starts: trials, images, tokens, FLOPs, bytes and hours."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from amt_ray import plugins
from amt_ray.config import ConfigError, Experiment
from amt_ray.core.cost import Cost, checkpoint_bytes, score_store_bytes
from amt_ray.core.datasets import Dataset
from amt_ray.core.sampling import steps_per_epoch
from amt_ray.space import sweep_points

SUSTAINED_TFLOPS = 40.0  # of a GPU, where none is here to be timed: an assumption, to be replaced by --tflops


@dataclass(frozen=True)
class Work:
    """A training to be done, perhaps several times with other seeds.

    Attributes:
        experiment: What is trained.
        images: Images to train on.
        times: How often.
        start: The epoch at which it begins, where others have trained the first ones for it.
    """

    experiment: Experiment
    images: int
    times: int = 1
    start: int = 0

    @property
    def epochs(self) -> int:
        """Epochs of one of them."""
        return self.experiment.train.epochs - self.start

    @property
    def steps(self) -> int:
        """Optimizer steps of one of them."""
        return self.epochs * steps_per_epoch(self.images, self.experiment.train.batch_size)

    @property
    def cost(self) -> Cost:
        """What one of them costs."""
        return self.experiment.course.cost(start=self.start) * self.images


class UncountedError(ConfigError):
    """The images are not here, and how many there are is not known."""


Speed = Callable[[Work], float]  # seconds of one training of that work on all its workers


@dataclass(frozen=True)
class Estimate:
    """What the whole experiment comes to, no trial ended early.

    Attributes:
        trials: Trainings that are compared.
        works: All trainings, that of the best configuration once more among them.
        at_once: How many run at the same time.
        infeasible: Combinations of a grid that are left out.
        seconds: From the first step to the last, or None where no speed is known.
        how: What the seconds go by.
    """

    trials: int
    works: tuple[Work, ...]
    at_once: int = 1
    infeasible: int = 0
    seconds: float | None = None
    how: str = ""

    @property
    def epochs(self) -> int:
        """Epochs in all."""
        return sum(work.times * work.epochs for work in self.works)

    @property
    def images(self) -> int:
        """Images trained on, each counted in every epoch."""
        return sum(work.times * work.epochs * work.images for work in self.works)

    @property
    def cost(self) -> Cost:
        """Visible tokens and FLOPs in all."""
        total = Cost()
        for work in self.works:
            total = total + work.cost * work.times
        return total

    @property
    def checkpoint_bytes(self) -> int:
        """Checkpoints that stay in the end."""
        kept = ((work, min(work.experiment.train.keep_checkpoints, work.epochs)) for work in self.works)
        return sum(work.times * keep * checkpoint_bytes(work.experiment.shape, work.images) for work, keep in kept)

    @property
    def score_bytes(self) -> int:
        """Memory of the score maps of all trainings that run at once."""
        return self.at_once * max(score_store_bytes(work.experiment.shape, work.images) for work in self.works)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        """For people, one fact a line."""
        sweep = self.works[0].experiment.sweep
        if sweep is not None:
            left_out = f", {self.infeasible} infeasible combinations left out"
            early = ", each to its last epoch at the most" if sweep.asha is not None else ""
            yield f"sweep: {self.trials} trials, {self.at_once} at once{left_out}{early}"
        cost = self.cost
        yield (
            f"training: {self.epochs:,} epochs of {self.works[0].images:,} images: {self.images:,} images, "
            f"{_short(cost.visible_tokens)} visible tokens, {_short(cost.flops)}FLOP"
        )
        scores = _bytes(self.score_bytes)
        yield f"keeps: {_bytes(self.checkpoint_bytes)} of checkpoints on disk; score maps of {scores} in memory"
        if self.seconds is not None:
            yield f"time: {_time(self.seconds)} to train and score ({self.how}); evaluation and start-up come on top"


def estimate(experiment: Experiment, speed: Speed, how: str, slots: int | None = None) -> Estimate:
    """What an experiment comes to.

    Args:
        experiment: With or without a sweep.
        speed: Tells the seconds of a training.
        how: Says what the speed goes by.
        slots: How many trainings of this experiment fit at once where it is to run; None where that is not known.

    Raises:
        ConfigError: If the sweep has no feasible point.
        UncountedError: If the number of images cannot be known here.
    """
    sweep = experiment.sweep
    if sweep is None:
        return _timed(Estimate(1, (Work(experiment, training_images(experiment)),)), speed, how)
    points, images = sweep_points(experiment), training_images(experiment)
    listed = [*points.baselines, *points.listed]
    if points.sampled:  # what Optuna will ask for is not known: as many points drawn at random stand for it
        listed += sweep_points(experiment.override({"sweep.search": "random"})).listed
    works = [Work(experiment.override(point), images) for point in listed]
    if sweep.retrain_best is not None:
        works.append(Work(experiment.override({**listed[-1], **sweep.retrain_best}), images))
    at_once = max(min(sweep.max_concurrent_trials, len(listed), slots or sweep.max_concurrent_trials), 1)
    return _timed(Estimate(len(listed), tuple(works), at_once, points.infeasible), speed, how)


def _timed(found: Estimate, speed: Speed, how: str) -> Estimate:
    """With the time: trials side by side, the last training (that of the best) by itself."""
    trials = sum(speed(work) * work.times for work in found.works[: found.trials])
    rest = sum(speed(work) for work in found.works[found.trials :])
    return Estimate(found.trials, found.works, found.at_once, found.infeasible, trials / found.at_once + rest, how)


def at_rate(tflops: float) -> Speed:
    """A speed by FLOPs alone: ``tflops`` (10 ** 12 a second), sustained on each worker."""

    def speed(work: Work) -> float:
        return work.cost.flops / (tflops * 1e12 * max(work.experiment.ray.num_workers, 1))

    return speed


def training_images(experiment: Experiment) -> int:
    """How many images are trained on: counted where they are, else as published; nothing is downloaded or decoded.

    Raises:
        UncountedError: If they are not here, and the data set has no published size.
    """
    data = experiment.data
    kind = plugins.load("datasets", data.name)
    published: int | None = getattr(kind, "published", None)
    try:
        if published is not None and not (Path(data.root or "data").expanduser() / "train").is_dir():
            count = published  # asking for the split might download it
        else:
            dataset: Dataset = kind(data.root, **data.options)
            count = dataset.split(getattr(dataset, "pretrain_split", "train")).count
    except (ValueError, OSError) as error:
        raise UncountedError(f"the images cannot be counted here: {error}") from error
    return count if hasattr(kind, "pretrain_split") else count - int(count * data.val_fraction)


def _short(number: float) -> str:
    """Three digits and the letter of the power of ten: 1.28 M, 4.75 E."""
    for letter in ("", " k", " M", " G", " T", " P", " E", " Z"):
        if abs(number) < 999.5:
            return f"{number:.3g}{letter}" if letter else f"{number:.3g} "
        number /= 1000
    return f"{number:.3g} Y"


def _bytes(number: float) -> str:
    return f"{_short(number)}B"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"about {seconds:.2g} s"
    return f"about {seconds / 60:.2g} min" if seconds < 5400 else f"about {seconds / 3600:.3g} h"
