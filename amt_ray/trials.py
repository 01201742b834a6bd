"""The trials of a sweep: points times seeds, what they have in common before the switch, and what they may spend."""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from amt_ray.config import Experiment, experiment_from
from amt_ray.sections import Attention
from amt_ray.space import LAYERS, Point, Points, sweep_of
from amt_ray.sweep_section import Budget, canonical, identity

# what acts only after the switch; `masking.warmup_epochs` says when that is, and changes nothing before it
AFTER_SWITCH = (
    "masking.strategy", "masking.mask_ratio", "masking.throw_ratio", "masking.options", "masking.refresh_every_epochs",
    "masking.warmup_epochs", "attention.",
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One training of a sweep.

    Attributes:
        point: Dotted keys over the sweep's experiment.
        seed: Its seed.
        baseline: Whether it is there to be compared with.
        epochs: Its length, where `equalise` gives it one.
        member: How many members of a population begin at the same point before this one; 0 in every other search.
    """

    point: Point
    seed: int
    baseline: bool = False
    epochs: int | None = None
    member: int = 0

    @property
    def key(self) -> str:
        """Equal for equal trials, whatever their place in the sweep: no key is trained twice.

        A baseline that is also a point of the search is two trials: one is compared with, the other may win.
        """
        return identity([self.point, self.seed, self.baseline, self.member])

    @property
    def overrides(self) -> Point:
        """All that it changes in the sweep's experiment."""
        length = {} if self.epochs is None else {"train.epochs": self.epochs}
        return {**self.point, "seed": self.point.get("seed", self.seed), **length}


def seeds_of(experiment: Experiment) -> Sequence[int]:
    """The seeds with which every point is tried."""
    return sweep_of(experiment).seeds or (experiment.seed,)


def listed_trials(experiment: Experiment, points: Points) -> list[Trial]:
    """Baselines and listed points with the first seed, then with the next: a sweep cut short has whole replicates."""
    before: Counter[str] = Counter()

    def trial(point: Point, seed: int, baseline: bool) -> Trial:
        one = Trial(point, seed, baseline)
        before[one.key] += 1
        return replace(one, member=before[one.key] - 1)

    return [
        trial(point, seed, baseline)
        for seed in seeds_of(experiment)
        for baseline, some in ((True, points.baselines), (False, points.listed))
        for point in some
    ]


Price = Callable[[Experiment], float]  # what a whole training costs, in whatever is to be equal


def price_of(unit: str) -> Price:
    """What a training costs an image, in ``visible_tokens`` or ``flops``."""
    return lambda experiment: float(getattr(experiment.course.cost(), unit))


def equal_epochs(own: Experiment, reference: Experiment, price: Price) -> int:
    """The epochs of a trial that costs what a reference costs, to the nearest epoch; at least one after the switch."""
    wanted, least = price(reference), own.masking.warmup_epochs + 1

    def costs(epochs: int) -> float:
        return price(own.override({"train.epochs": epochs}))

    high = max(least, own.train.epochs)
    while costs(high) < wanted:
        high *= 2
    low = least
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if costs(middle) <= wanted else (low, middle)
    return min((low, high), key=lambda epochs: abs(costs(epochs) - wanted))


def equalised(experiment: Experiment, trial: Trial, price: Price | None) -> Trial:
    """The trial at the cost of the reference (the first baseline, else the experiment); as it is where ``price`` is
    None, or where its point sets its epochs.
    """
    if price is None or "train.epochs" in trial.point:
        return trial
    first = sweep_of(experiment).baselines[:1]
    reference = experiment.override(first[0]) if first else experiment
    return replace(trial, epochs=equal_epochs(experiment.override(trial.point), reference, price))


def trial_count(experiment: Experiment, points: Points) -> int:
    """Trials in all."""
    return points.count * len(seeds_of(experiment))


def trial_experiment(experiment: Experiment, overrides: Mapping[str, Any]) -> Experiment:
    """The experiment of a trial, which is no sweep itself."""
    tree = experiment.override(overrides).model_dump(mode="json")
    return experiment_from({**tree, "sweep": None})


@dataclass(frozen=True)
class Warmup:
    """The epochs before the switch that trials have in common, trained once.

    Attributes:
        experiment: Trained up to its switch, at the latest of the trials'.
        forks: For each epoch at which a trial goes its own way: the attention settings that are scored there.
    """

    experiment: Experiment
    forks: Mapping[int, tuple[Attention, ...]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Equal where the same is trained, up to whichever epoch."""
        return warmup_key(self.experiment)

    @property
    def until(self) -> int:
        """Epochs to train."""
        return max(self.forks)


def warmup_of(experiment: Experiment) -> Warmup | None:
    """What a trial does before its switch, or None where it has no such epochs (or no others)."""
    switch = experiment.masking.warmup_epochs
    if not 0 < switch < experiment.train.epochs:
        return None
    masking = experiment.masking
    plain = {
        "masking.strategy": masking.warmup_strategy,
        "masking.mask_ratio": masking.warmup_mask_ratio,
        "masking.throw_ratio": 0.0,
        "masking.options": {},
        "masking.refresh_every_epochs": 1,
        "attention": Attention().model_dump(mode="json"),
    }
    scored = (experiment.attention,) if experiment.strategy_at(0.0).needs_scores else ()
    return Warmup(experiment.override(plain), {switch: scored})


def warmup_key(experiment: Experiment) -> str:
    """All that decides what is trained before the switch (where results are kept and how many run at once does not)."""
    tree = experiment.model_dump(mode="json", exclude={"name", "sweep", "tracking"})
    tree["masking"].pop("warmup_epochs")
    tree["ray"] = {key: tree["ray"][key] for key in ("num_workers", "use_gpu")}
    return hashlib.sha256(canonical(tree).encode()).hexdigest()[:16]


def shared_warmups(
    experiment: Experiment, listed: Iterable[Trial], sampled: bool, begun: Collection[str] = ()
) -> dict[str, Warmup]:
    """The warm-ups that more than one trial needs, by key.

    Args:
        experiment: The sweep's.
        listed: Trials that are still to be run.
        sampled: Whether further points will be asked for.
        begun: Keys of warm-ups that are there already, also for a single trial that is left.
    """
    sweep = sweep_of(experiment)
    if not sweep.share_warmup:
        return {}
    found: dict[str, Warmup] = {}
    needed: Counter[str] = Counter()
    own = [warmup_of(trial_experiment(experiment, trial.overrides)) for trial in listed]
    if sampled and all(key.startswith(AFTER_SWITCH) for key in sweep.space):
        own += [w for seed in seeds_of(experiment) for w in _sampled_warmups(experiment, seed)]
    for warmup in own:
        if warmup is not None:
            needed[warmup.key] += 1
            found[warmup.key] = _joined(found.get(warmup.key), warmup)
    return {key: warmup for key, warmup in found.items() if needed[key] > 1 or key in begun}


def _sampled_warmups(experiment: Experiment, seed: int) -> list[Warmup | None]:
    """Two of the same, so that it counts as shared, with every listed choice of layers to be scored."""
    axis = sweep_of(experiment).space.get(LAYERS)
    layers = [{LAYERS: value} for value in (axis.values if axis and axis.values else ())] or [{}]
    if "masking.warmup_epochs" in sweep_of(experiment).space:
        return []  # the epochs at which trials fork are not known beforehand
    return [warmup_of(trial_experiment(experiment, {**some, "seed": seed})) for some in (layers * 2)]


def _joined(one: Warmup | None, other: Warmup) -> Warmup:
    if one is None:
        return other
    forks = dict(one.forks)
    for epoch, scored in other.forks.items():
        forks[epoch] = tuple(dict.fromkeys([*forks.get(epoch, ()), *scored]))
    longer = max((one, other), key=lambda warmup: warmup.until)
    return replace(longer, forks=forks)


@dataclass
class Spending:
    """What a sweep has spent, and whether that is its budget.

    Attributes:
        budget: The limits.
        trials: Trials started.
        epochs: Epochs trained, those of running trials counted whole.
        seconds: Since the sweep's start, earlier sittings included.
        gpu_s: GPU seconds of all trials.
    """

    budget: Budget
    trials: int = 0
    epochs: int = 0
    seconds: float = 0.0
    gpu_s: float = 0.0

    def starts(self, epochs: int) -> str | None:
        """Why a further trial of so many epochs must not start, or None."""
        if self.budget.trials is not None and self.trials >= self.budget.trials:
            return f"sweep.budget.trials of {self.budget.trials} is spent"
        if self.budget.epochs is not None and self.epochs + epochs > self.budget.epochs:
            return f"sweep.budget.epochs of {self.budget.epochs} is spent"
        return self.runs()

    def runs(self) -> str | None:
        """Why running trials must end, or None."""
        if self.budget.hours is not None and self.seconds >= self.budget.hours * 3600:
            return f"sweep.budget.hours of {self.budget.hours:g} is spent"
        if self.budget.gpu_hours is not None and self.gpu_s >= self.budget.gpu_hours * 3600:
            return f"sweep.budget.gpu_hours of {self.budget.gpu_hours:g} is spent"
        return None
