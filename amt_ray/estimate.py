"""What an experiment will cost, told before anything starts: trials, images, tokens, FLOPs, bytes and hours."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from amt_ray import plugins
from amt_ray.config import ConfigError, Experiment
from amt_ray.core.cost import Cost, checkpoint_bytes, score_store_bytes
from amt_ray.core.sampling import steps_per_epoch
from amt_ray.listing import is_here, listed
from amt_ray.phases import point_warnings, rate_line, warnings_of
from amt_ray.space import Points, sweep_points
from amt_ray.sweep_section import Sweep
from amt_ray.trials import (
    Price,
    equalised,
    listed_trials,
    price_of,
    seeds_of,
    shared_warmups,
    trial_experiment,
    warmup_of,
)

SUSTAINED_TFLOPS = 40.0  # of a GPU, where none is here to be timed: an assumption, to be replaced by --tflops


@dataclass(frozen=True)
class Work:
    """A training to be done.

    Attributes:
        experiment: What is trained.
        images: Images to train on.
        start: The epoch at which it begins, where a shared warm-up has trained the first ones.
        stop: The epoch before which it ends; None for the end of the schedule.
    """

    experiment: Experiment
    images: int
    start: int = 0
    stop: int | None = None

    @property
    def until(self) -> int:
        """The epoch before which it ends."""
        return self.experiment.train.epochs if self.stop is None else self.stop

    @property
    def epochs(self) -> int:
        """How many it trains."""
        return self.until - self.start

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.epochs * steps_per_epoch(self.images, self.experiment.train.batch_size)

    @property
    def cost(self) -> Cost:
        """What it costs."""
        return self.experiment.course.cost(self.stop, self.start) * self.images


class UncountedError(ConfigError):
    """The images are not here, and how many there are is not known."""


Speed = Callable[[Work], float]  # seconds of that work on all its workers


@dataclass(frozen=True)
class Estimate:
    """What the whole experiment comes to, no trial ended early.

    Attributes:
        trials: Trainings that are compared.
        works: All trainings, shared warm-ups among them.
        after: What is trained by itself when they have ended: the best configuration once more.
        at_once: How many of them run at the same time.
        seconds: From the first step to the last.
        how: What the seconds go by.
        notes: What else is to be known, a line each: of a run its learning rate, of a sweep its trials.
        data: What is understood of the data set, a line each.
    """

    trials: int
    works: tuple[Work, ...]
    after: tuple[Work, ...] = ()
    at_once: int = 1
    seconds: float = 0.0
    how: str = ""
    notes: tuple[str, ...] = ()
    data: tuple[str, ...] = ()

    @property
    def epochs(self) -> int:
        """Epochs in all."""
        return sum(work.epochs for work in self._all)

    @property
    def images(self) -> int:
        """Images trained on, each counted in every epoch."""
        return sum(work.epochs * work.images for work in self._all)

    @property
    def cost(self) -> Cost:
        """Visible tokens and FLOPs in all."""
        return sum((work.cost for work in self._all), Cost())

    @property
    def checkpoint_bytes(self) -> int:
        """Checkpoints that stay in the end."""
        kept = ((work, min(work.experiment.train.keep_checkpoints, work.epochs)) for work in self._all)
        return sum(keep * checkpoint_bytes(work.experiment.shape, work.images) for work, keep in kept)

    @property
    def score_bytes(self) -> int:
        """Memory of the score maps of all trainings that run at once."""
        return self.at_once * max(score_store_bytes(work.experiment.shape, work.images) for work in self._all)

    @property
    def _all(self) -> tuple[Work, ...]:
        return self.works + self.after

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        """For people, one fact a line."""
        yield from self.data
        yield from self.notes
        cost, scores = self.cost, _bytes(self.score_bytes)
        yield (
            f"training: {self.epochs:,} epochs of {self.works[0].images:,} images: {self.images:,} images, "
            f"{_short(cost.visible_tokens)} visible tokens, {_short(cost.flops)}FLOP"
        )
        yield f"keeps: {_bytes(self.checkpoint_bytes)} of checkpoints on disk; score maps of {scores} in memory"
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
    if experiment.sweep is None:
        images, seen = counted(experiment)
        work = Work(experiment, images)
        notes = (rate_line(experiment, images), *warnings_of(experiment, images))
        return Estimate(1, (work,), seconds=speed(work), how=how, notes=notes, data=seen)
    return _of_sweep(experiment, experiment.sweep, speed, how, slots)


def _of_sweep(experiment: Experiment, sweep: Sweep, speed: Speed, how: str, slots: int | None) -> Estimate:
    points, (images, seen) = sweep_points(experiment), counted(experiment)
    if points.sampled:  # what Optuna will ask for is not known: as many points drawn at random stand for it
        drawn = sweep_points(experiment.override({"sweep.search": "random", "sweep.cost": None}))
        points = replace(points, listed=drawn.listed, sampled=0)
    prices: dict[str, Price] = {"seconds": lambda own: speed(Work(own, images))}
    prices |= {unit: price_of(unit) for unit in ("visible_tokens", "flops")}
    price = prices.get(sweep.equalise)
    trials = [equalised(experiment, trial, price) for trial in listed_trials(experiment, points)][: sweep.budget.trials]
    warmups = shared_warmups(experiment, trials, sampled=False)
    works = [Work(shared.experiment, images, stop=shared.until) for shared in warmups.values()]
    for trial in trials:
        own = trial_experiment(experiment, trial.overrides)
        warmup = warmup_of(own)
        works.append(Work(own, images, own.masking.warmup_epochs if warmup and warmup.key in warmups else 0))
    again = {**(trials[-1].overrides), **(sweep.retrain_best or {})}
    after = () if sweep.retrain_best is None else (Work(trial_experiment(experiment, again), images),)
    at_once = max(min(sweep.max_concurrent_trials, len(trials), slots or sweep.max_concurrent_trials), 1)
    side_by_side = max(sum(map(speed, works)) / at_once, max(map(speed, works)))
    seconds = side_by_side + sum(map(speed, after))
    notes = (
        *_notes(experiment, sweep, points, len(trials), at_once, works, len(warmups)),
        *point_warnings(experiment, (*points.baselines, *points.listed), images),
    )
    return Estimate(len(trials), tuple(works), after, at_once, seconds, how, notes, seen)


def _notes(
    experiment: Experiment, sweep: Sweep, points: Points, trials: int, at_once: int, works: Sequence[Work], warmups: int
) -> Iterator[str]:
    seeds = seeds_of(experiment)
    repeated = f" ({points.count} points x {len(seeds)} seeds)" if len(seeds) > 1 else ""
    yield f"sweep: {trials} trials{repeated}, {at_once} at once, {points.infeasible} infeasible combinations left out"
    yield from points.notes
    if ends := sweep.stops_early or ("pbt" if sweep.pbt else None):
        yield f"{ends}: trials may end or change before their last epoch, so what follows is the most that they take"
    if warmups:
        spared = sum(work.start for work in works) - sum(work.epochs for work in works[:warmups])
        yield f"shared warm-up: {warmups} trained for all trials, which spares {spared} epochs"
    told = {name: value for name, value in sweep.budget if value is not None}
    if told:
        limits = ", ".join(f"{value:g} {name.replace('_', ' ')}" for name, value in told.items())
        yield f"budget: the sweep ends at {limits}; of these, what follows takes only the number of trials into account"


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
    return counted(experiment)[0]


def counted(experiment: Experiment) -> tuple[int, tuple[str, ...]]:
    """How many images are trained on (`training_images`), and what is understood of the data set where it is here.

    Raises:
        UncountedError: If they are not here, and the data set has no published size.
    """
    data = experiment.data
    if not is_here(data):
        kind = plugins.load("datasets", data.name)
        held_out = 0 if hasattr(kind, "pretrain_split") else int(kind.published * data.val_fraction)
        left = kind.published - held_out
        return min(left, data.train_images or left), ()
    try:
        listing = listed(experiment)
    except (ValueError, OSError) as error:
        raise UncountedError(f"the images cannot be counted here: {error}") from error
    return listing.counts["train"], tuple(listing.lines())


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
