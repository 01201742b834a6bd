"""What the epochs of an experiment do, before they run: by which strategy, at which learning rate, what never acts.

All of it is read off the objects that train: `amt_ray.core.schedule.Schedule`, the masking strategies, timm's schedule.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from amt_ray.core.optim import peak_share, scaled_lr
from amt_ray.core.plan import Counts
from amt_ray.core.sampling import images_a_step, steps_per_epoch
from amt_ray.section import ConfigError

if TYPE_CHECKING:
    from amt_ray.config import Experiment

NAMED_REFRESHES = 3


@dataclass(frozen=True)
class Phase:
    """Epochs that are masked by one strategy.

    Attributes:
        strategy: Its name.
        epochs: Counted from 0.
        first: Patches of an image in the first of them.
        last: In the last of them; other counts where a ratio moves.
        refreshes: Those before which all images are scored.
    """

    strategy: str
    epochs: range
    first: Counts
    last: Counts
    refreshes: tuple[int, ...]

    def __str__(self) -> str:
        parts = [
            f"{kind} {_between(getattr(self.first, kind), getattr(self.last, kind))}"
            for kind in ("masked", "thrown", "visible")
            if getattr(self.first, kind) or getattr(self.last, kind)
        ]
        span = f"epoch{'s' if len(self.epochs) > 1 else ''} {_between(self.epochs[0] + 1, self.epochs[-1] + 1, '-')}"
        return f"{span}: {self.strategy}, {', '.join(parts)} of {sum(self.first)} patches{self._scored}"

    @property
    def _scored(self) -> str:
        if not self.refreshes:
            return ""
        named = ", ".join(str(epoch + 1) for epoch in self.refreshes[:NAMED_REFRESHES])
        more = ", ..." if len(self.refreshes) > NAMED_REFRESHES else ""
        return f"; scores made before epoch {named}{more} ({len(self.refreshes)} in all)"


def phases(experiment: "Experiment") -> list[Phase]:
    """The warm-up and what follows it, as far as the experiment has epochs of them."""
    course, after = experiment.course, experiment.schedule.after_switch
    names = {range(after.start): experiment.masking.warmup_strategy, after: experiment.masking.strategy}
    return [
        Phase(
            name, epochs, course.counts(epochs[0]), course.counts(epochs[-1]), tuple(filter(course.is_scored, epochs))
        )
        for epochs, name in names.items()
        if epochs
    ]


def plan_lines(experiment: "Experiment") -> Iterator[str]:
    """For people, a phase a line."""
    of = " of the experiment itself, over which the sweep's points go" if experiment.sweep else ""
    for phase in phases(experiment):
        yield f"plan{of}: {phase}"


def check_acts(experiment: "Experiment") -> None:
    """Refuse a strategy, or ratios, that no epoch has: the run would be recorded as something that it is not.

    Raises:
        ConfigError: If the warm-up takes the whole run, and differs from what is to follow it; or if a ratio is to move
            within a single epoch.
    """
    masking, left = experiment.masking, len(experiment.schedule.after_switch)
    ends = [experiment.strategy_at(progress) for progress in (0.0, 1.0)]
    warmup = masking.build_warmup(experiment.unit_grid)
    if not left and any(strategy != warmup for strategy in ends):
        raise ConfigError(
            f"masking.warmup_epochs must be below train.epochs, or {masking.strategy} with its ratios never acts, "
            f"got {masking.warmup_epochs} of {experiment.train.epochs}."
        )
    if left == 1 and ends[0] != ends[1]:
        raise ConfigError(
            "a masking ratio that moves needs at least 2 epochs after masking.warmup_epochs to reach its end, "
            f"got {masking.warmup_epochs} of {experiment.train.epochs}."
        )


def check_points(experiment: "Experiment", points: Iterable[Mapping[str, Any]]) -> None:
    """`check_acts` of every point of a sweep, and of what `sweep.retrain_best` makes of it.

    Raises:
        ConfigError: As there; the message names the point.
    """
    again = (experiment.sweep and experiment.sweep.retrain_best) or {}
    for point in points:
        for told in (point, {**point, **again}) if again else (point,):
            try:
                check_acts(experiment.override(told))
            except ConfigError as error:
                raise ConfigError(f"{error} The sweep's point is {told}.") from error


def rate_line(experiment: "Experiment", images: int) -> str:
    """The learning rate at its highest, and what it is made of."""
    batch = images_a_step(images, experiment.train.batch_size)
    base, steps = experiment.optim.base_lr, steps_per_epoch(images, experiment.train.batch_size)
    share = _share(experiment, steps)
    few = "" if batch == experiment.train.batch_size else f", which are all: train.batch_size is {_batch(experiment)}"
    return (
        f"learning rate: {share * scaled_lr(base, batch):.4g} at its highest "
        f"(optim.base_lr {base:.4g} x {batch:,} images a step / 256{few}), {steps:,} steps an epoch"
    )


def warnings_of(experiment: "Experiment", images: int | None = None) -> Iterator[str]:
    """What is trained otherwise than one might think, a line each.

    Args:
        experiment: What is trained.
        images: Images to train on, where that is known; else an epoch is taken to have many steps.
    """
    steps = 1000 if images is None else steps_per_epoch(images, experiment.train.batch_size)
    optim, epochs = experiment.optim, experiment.train.epochs
    if optim.warmup_epochs >= epochs:
        yield (
            "warning: optim.warmup_epochs must be below train.epochs for the learning rate to reach what is asked "
            f"for, got {optim.warmup_epochs} of {epochs}: it ends at {100 * _share(experiment, steps):.2g}% of that."
        )


def point_warnings(
    experiment: "Experiment", points: Iterable[Mapping[str, Any]], images: int | None = None
) -> Iterator[str]:
    """`warnings_of` a sweep's points: each line once, with how many points it is about."""
    found = Counter(line for point in points for line in warnings_of(experiment.override(point), images))
    for line, count in found.items():
        yield f"{line} ({count} of the sweep's points)"


def _share(experiment: "Experiment", steps: int) -> float:
    return peak_share(experiment.train.epochs * steps, experiment.optim.warmup_epochs * steps)


def _batch(experiment: "Experiment") -> str:
    return f"{experiment.train.batch_size:,}"


def _between(first: int, last: int, sign: str = " to ") -> str:
    return str(first) if first == last else f"{first}{sign}{last}"
