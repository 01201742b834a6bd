"""Where the settings of a sweep stand: the book's entries in the terms of `amt_ray.ranking`, and back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from amt_ray import ranking
from amt_ray.config import Experiment
from amt_ray.space import Point, label, sweep_of
from amt_ray.sweep_section import canonical, makes_setting
from amt_ray.trials import Trial, seeds_of, trial_experiment

if TYPE_CHECKING:
    from amt_ray.book import Entry


@dataclass(frozen=True)
class Standing:
    """Where a setting of the sweep stands: a point over its seeds, or a member of a population.

    Attributes:
        point: The point; of a member, where it began.
        baseline: Whether it is there to be compared with.
        value: Mean of the objective at `epoch` over the seeds that reached it.
        cost: Mean of the second objective there, if there is one.
        seeds: How many seeds reached it.
        epoch: Epochs completed.
        missing: Seeds asked for that have no value there.
        whole: Whether this is the end of all of them.
        run_id: The best run of those that came to their end; None where none did.
        now: What a member of a population has become.
    """

    point: Point
    baseline: bool
    value: float
    cost: float | None
    seeds: int
    epoch: int = 0
    missing: Sequence[str] = ()
    whole: bool = True
    run_id: str | None = None
    now: Point | None = None

    def name(self, experiment: Experiment) -> str:
        """What to call it, with what it has become."""
        became = f", became {label(self.now, experiment.override(self.now))}" if self.now else ""
        return label(self.point, experiment.override(self.point)) + became


class Identities:
    """What makes trials of one setting: all of the configuration but seed and place, whatever their points are like."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self._known: dict[str, str] = {}

    def __call__(self, trial: Trial) -> str:
        """Equal for trials of one setting."""
        told = canonical([trial.point, trial.baseline, trial.epochs is not None])
        if told not in self._known:
            own = trial_experiment(self.experiment, trial.overrides).dotted()
            aside = ("seed", "train.epochs") if trial.epochs is not None else ("seed",)  # a length that is a price
            kept = {key: value for key, value in own.items() if makes_setting(key) and key not in aside}
            self._known[told] = canonical([trial.baseline, kept])
        return self._known[told]


def standings(entries: Sequence["Entry"], identity: Identities) -> list[Standing]:
    """The settings that have a value, best first."""
    experiment = identity.experiment
    maximize, population = sweep_of(experiment).mode == "max", sweep_of(experiment).pbt is not None
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(f"member {entry.index}" if population else identity(entry.trial), []).append(entry)
    settings = [_setting(key, some, _asked(some, experiment, population)) for key, some in groups.items()]
    return [_standing(one, groups[one.setting.key], maximize) for one in ranking.ranked(settings, maximize)]


def front(found: Sequence[Standing], maximize: bool) -> list[Standing]:
    """Of the settings that came as far as the best, those that no other beats in both objectives, cheapest first."""
    sign = 1 if maximize else -1
    far = [(bool(one.missing), one.whole or one.epoch) for one in found]
    equals = [one for one, its in zip(found, far, strict=True) if its == far[0]]
    kept: list[Standing] = []
    for one in sorted(equals, key=lambda s: (s.cost or 0.0, -sign * s.value)):
        if not kept or sign * one.value > sign * kept[-1].value:
            kept.append(one)
    return kept


def _asked(entries: Sequence["Entry"], experiment: Experiment, population: bool) -> frozenset[str]:
    """The sweep's seeds; of members of a population, and of points that name a seed, their own."""
    own = population or any("seed" in entry.trial.point for entry in entries)
    return frozenset(_seed(entry) for entry in entries) if own else frozenset(map(str, seeds_of(experiment)))


def _seed(entry: "Entry") -> str:
    return str(entry.trial.overrides["seed"])


def _setting(key: str, entries: Sequence["Entry"], asked: frozenset[str]) -> ranking.Setting:
    order = min((entry.index, entry.run_id or "") for entry in entries)
    return ranking.Setting(key, asked, tuple(map(_outcome, entries)), entries[0].trial.baseline, order)


def _outcome(entry: "Entry") -> ranking.Outcome:
    """An entry's; what a failed one measured does not count."""
    failed = entry.status == "failed" or entry.failed_before
    ended = entry.status == "ended" and entry.early is None
    curve = {} if failed else curve_of(entry.values, entry.epoch, entry.value)
    return ranking.Outcome(_seed(entry), curve, entry.epochs, ended, entry.run_id)


def curve_of(values: Sequence[tuple[int, float]], epoch: int, last: float | None) -> Mapping[int, float]:
    """A curve; where none is known, its last value."""
    return dict(values) or ({} if last is None else {epoch: last})


def _standing(one: ranking.Standing, entries: Sequence["Entry"], maximize: bool) -> Standing:
    at = {_seed(entry): curve_of(entry.costs, entry.epoch, entry.cost) for entry in entries}
    costs = [at[seed][epoch] for seed, epoch in one.at.items() if epoch in at[seed]]
    return Standing(
        entries[0].trial.point,
        one.setting.baseline,
        one.mean,
        fmean(costs) if costs else None,
        len(one.at),
        one.epoch,
        one.missing,
        one.whole,
        one.champion(maximize),
        entries[0].now,
    )
