"""Who is best: the one ranking, used by sweep, page, API and registry. Pure functions of what trainings measured."""

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Protocol, TypeVar


class Candidate(Protocol):
    """What may win."""

    @property
    def baseline(self) -> bool:
        """Whether it is there to be compared with."""
        ...


One = TypeVar("One", bound=Candidate)


def is_value(value: float | None) -> bool:
    """Whether a figure is one: NaN and infinity are not, nor the largest float, as which MLflow's databases keep
    infinity."""
    return value is not None and math.isfinite(value) and abs(value) < sys.float_info.max


@dataclass(frozen=True)
class Outcome:
    """What one training has measured.

    Attributes:
        seed: Its seed, as text.
        curve: The metric by epochs completed, where it was measured; empty for a training that failed.
        length: Epochs that it was asked for; None where that is not known.
        ended: Whether it came to its own end: it neither failed, nor runs, nor was stopped early.
        run: Its MLflow id.
    """

    seed: str
    curve: Mapping[int, float]
    length: int | None = None
    ended: bool = False
    run: str | None = None

    @property
    def last(self) -> float | None:
        """The value at its own end; None where it did not come to it, or has no value there."""
        epoch = max(self.curve, default=None) if self.length is None else self.length
        value = self.curve.get(epoch) if self.ended and epoch is not None else None
        return value if is_value(value) else None


@dataclass(frozen=True)
class Setting:
    """A configuration with all its trainings, one or more a seed.

    Attributes:
        key: Equal for equal settings.
        asked: The seeds with which it is to be tried.
        outcomes: Its trainings; those of other seeds do not count.
        baseline: Whether it is there to be compared with.
        order: Decides between settings that are equal in all else, so that no order of input does.
    """

    key: str
    asked: frozenset[str]
    outcomes: tuple[Outcome, ...]
    baseline: bool = False
    order: tuple[int, str] = (0, "")

    @cached_property
    def curves(self) -> dict[str, dict[int, float]]:
        """Seed -> epoch -> value, of a seed that was trained twice the mean; seeds without any value are left out."""
        found: dict[str, dict[int, list[float]]] = {}
        for outcome in self.outcomes:
            for epoch, value in outcome.curve.items():
                if outcome.seed in self.asked and is_value(value):
                    found.setdefault(outcome.seed, {}).setdefault(epoch, []).append(value)
        return {seed: {epoch: fmean(some) for epoch, some in curve.items()} for seed, curve in found.items()}

    @cached_property
    def ends(self) -> dict[str, int]:
        """The own last epoch of each seed that has a value there."""
        lengths: dict[str, int] = {}
        for outcome in self.outcomes:
            if outcome.length is not None:
                lengths[outcome.seed] = max(outcome.length, lengths.get(outcome.seed, 0))
        return {seed: lengths[seed] for seed, curve in self.curves.items() if lengths.get(seed) in curve}


@dataclass(frozen=True)
class Standing:
    """Where a setting stands.

    Attributes:
        setting: The setting.
        at: The epoch of each seed that counts. It is the same one for all of them, but where a sweep made the seeds'
            lengths different on purpose.
    """

    setting: Setting
    at: Mapping[str, int]

    @property
    def baseline(self) -> bool:
        """Whether the setting is there to be compared with."""
        return self.setting.baseline

    @property
    def epoch(self) -> int:
        """Epochs completed where it stands."""
        return max(self.at.values())

    @cached_property
    def values(self) -> dict[str, float]:
        """The metric there by seed, seeds in rising order."""
        return {seed: self.setting.curves[seed][self.at[seed]] for seed in in_order(self.at)}

    @cached_property
    def mean(self) -> float:
        """The mean over the seeds."""
        return fmean(self.values.values())

    @property
    def missing(self) -> list[str]:
        """Seeds asked for that have no value there."""
        return in_order(self.setting.asked - set(self.at))

    @property
    def whole(self) -> bool:
        """Whether every seed that counts stands at its own last epoch."""
        return self.at == self.setting.ends

    def champion(self, maximize: bool) -> str | None:
        """The run that stands for the setting: the best of those that came to their end; None where none did."""
        ended = [(one.last, one.run) for one in self.setting.outcomes if one.seed in self.at and one.run]
        known = [(value if maximize else -value, run) for value, run in ended if value is not None]
        return max(known)[1] if known else None


@dataclass(frozen=True)
class Difference:
    """One setting minus another, seed by seed.

    Attributes:
        epoch: Epochs completed where both are taken; of settings of different lengths that both stand at their end, the
            first one's.
        values: The differences by common seed, in rising order; at least one.
    """

    epoch: int
    values: Mapping[str, float]

    @property
    def mean(self) -> float:
        """The mean over the common seeds."""
        return fmean(self.values.values())


def standing(setting: Setting) -> Standing | None:
    """Where a setting stands; None where no seed has a value.

    It is the largest epoch at which all its seeds have a value; where a seed is missing, the largest of those at which
    the fewest are. A setting all of whose seeds reached their own last epoch stands there: where a sweep gives trials
    different lengths, so that they cost the same, it is the end that compares.
    """
    curves = setting.curves
    if not curves:
        return None
    if setting.ends.keys() == curves.keys():
        return Standing(setting, setting.ends)
    epoch = _most_common(curves.values())
    return Standing(setting, {seed: epoch for seed, curve in curves.items() if epoch in curve})


def ranked(settings: Iterable[Setting], maximize: bool) -> list[Standing]:
    """The settings that have a value, best first, in an order that has no cycles and does not depend on that of input.

    Those with all their seeds come first. Then it is the epoch where a setting stands that decides (whoever is at its
    own end stands farthest), then the number of seeds that are missing, then the mean. Of equals a baseline comes last.
    """
    sign = -1.0 if maximize else 1.0

    def place(one: Standing) -> tuple[object, ...]:
        far, ties = math.inf if one.whole else one.epoch, (one.baseline, one.setting.order, one.setting.key)
        return bool(one.missing), -far, len(one.missing), sign * one.mean, *ties

    return sorted((found for one in settings if (found := standing(one)) is not None), key=place)


def winner(ranked: Sequence[One]) -> One | None:
    """The best of what is ranked; a baseline only where there is nothing else."""
    return next((one for one in ranked if not one.baseline), next(iter(ranked), None))


def difference(one: Standing, other: Standing) -> Difference | None:
    """One setting minus another on their common seeds, at the largest epoch that these reached in both.

    Settings that both stand at their own end are compared there, also where it is not the same epoch. None where they
    have no seed, or no epoch, in common.
    """
    mine, theirs = one.setting.curves, other.setting.curves
    if one.whole and other.whole:
        common = {seed: (one.at[seed], other.at[seed]) for seed in one.at if seed in other.at}
    else:
        shared = {seed: mine[seed].keys() & theirs[seed].keys() for seed in mine if seed in theirs}
        epoch = _most_common(shared.values())
        common = {seed: (epoch, epoch) for seed, epochs in shared.items() if epoch in epochs}
    values = {seed: mine[seed][common[seed][0]] - theirs[seed][common[seed][1]] for seed in in_order(common)}
    return Difference(max(at for at, _ in common.values()), values) if values else None


def in_order(seeds: Iterable[str]) -> list[str]:
    """Seeds by their number, what is no number last."""
    return sorted(seeds, key=lambda seed: (not seed.isdecimal(), int(seed) if seed.isdecimal() else 0, seed))


def _most_common(epochs: Iterable[Iterable[int]]) -> int:
    """The epoch that most of them have, the largest of several; 0 where there is none."""
    counts = Counter(epoch for some in epochs for epoch in some)
    return max(counts, key=lambda epoch: (counts[epoch], epoch), default=0)
