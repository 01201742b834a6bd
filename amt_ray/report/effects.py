"""The effect of each searched key on the objective: descriptive means over the trials."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from amt_ray.report.ranking import Comparison, Row, as_number

THROWING = "masking.throw_ratio"
MASKING = "masking.mask_ratio"


@dataclass(frozen=True)
class Level:
    """One value of a key and the objectives of the trials that have it.

    Attributes:
        value: The value as logged.
        objectives: One a trial, in order of rank.
    """

    value: str
    objectives: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean objective of the trials with this value, whatever their other keys."""
        return fmean(self.objectives)

    @property
    def low(self) -> float:
        """Smallest objective."""
        return min(self.objectives)

    @property
    def high(self) -> float:
        """Largest objective."""
        return max(self.objectives)

    @property
    def count(self) -> int:
        """Trials with this value."""
        return len(self.objectives)


@dataclass(frozen=True)
class Effect:
    """A searched key and its values in rising order."""

    key: str
    levels: tuple[Level, ...]

    @property
    def numeric(self) -> bool:
        """Whether every value is a number."""
        return all(isinstance(as_number(level.value), float) for level in self.levels)


@dataclass(frozen=True)
class Grid:
    """Mean objective over throwing (rows) and masking (columns); ``None`` where no trial was run."""

    throwing: tuple[str, ...]
    masking: tuple[str, ...]
    means: tuple[tuple[float | None, ...], ...]


def effects(comparison: Comparison) -> tuple[Effect, ...]:
    """The effect of each searched key over the ranked trials, baselines excluded; keys without values are left out."""
    found = [Effect(key, _levels(key, _trials(comparison))) for key in comparison.source.searched]
    return tuple(effect for effect in found if effect.levels)


def throwing_by_masking(comparison: Comparison) -> Grid | None:
    """The two-way table of throwing and masking, where both were searched and have values."""
    if not {THROWING, MASKING} <= set(comparison.source.searched):
        return None
    rows = [row for row in _trials(comparison) if {THROWING, MASKING} <= set(row.run.params)]
    if not rows:
        return None
    throwing, masking = (_values(key, rows) for key in (THROWING, MASKING))
    return Grid(throwing, masking, tuple(tuple(_cell(rows, t, m) for m in masking) for t in throwing))


def _trials(comparison: Comparison) -> list[Row]:
    return [row for row in comparison.rows if row.rank and not row.run.baseline]


def _levels(key: str, rows: Sequence[Row]) -> tuple[Level, ...]:
    return tuple(Level(value, _objectives(_having(rows, key, value))) for value in _values(key, rows))


def _values(key: str, rows: Sequence[Row]) -> tuple[str, ...]:
    """One spelling a value, numbers by size and before words."""
    spelled = {as_number(row.run.params[key]): row.run.params[key] for row in rows if key in row.run.params}
    return tuple(spelled[value] for value in sorted(spelled, key=lambda v: (isinstance(v, str), v)))


def _having(rows: Iterable[Row], key: str, value: str) -> list[Row]:
    return [row for row in rows if key in row.run.params and as_number(row.run.params[key]) == as_number(value)]


def _objectives(rows: Iterable[Row]) -> tuple[float, ...]:
    return tuple(row.objective for row in rows if row.objective is not None)


def _cell(rows: Sequence[Row], throwing: str, masking: str) -> float | None:
    found = _objectives(_having(_having(rows, THROWING, throwing), MASKING, masking))
    return fmean(found) if found else None
