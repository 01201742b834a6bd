"""The effect of each searched key on the objective, and the two-way table of throwing and masking."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from amt_ray.report.ranking import Comparison, Row
from amt_ray.report.runs import as_number
from amt_ray.report.statistics import Summary

THROWING = "masking.throw_ratio"
MASKING = "masking.mask_ratio"
LAYERS = "attention.layers"
MANY_LEVELS = 8  # from here on the numbers of a key are put into bins
BINS = 5
MAX_KEYS = 12  # of runs that no sweep searched, so many differing keys are looked at


@dataclass(frozen=True)
class Level:
    """One value of a key, or a bin of values, and the settings that have it.

    Attributes:
        label: The value as logged, or ``0.2 to 0.35``.
        low: Smallest value; None for words.
        high: Greatest value.
        rows: The settings, by rank.
        over_seeds: Mean over these settings for each seed that all of them have; None with fewer than two.
    """

    label: str
    low: float | None
    high: float | None
    rows: tuple[Row, ...]
    over_seeds: Summary | None

    @property
    def objectives(self) -> tuple[float, ...]:
        """One a setting."""
        return tuple(row.objective for row in self.rows if row.objective is not None)

    @property
    def mean(self) -> float:
        """Mean over the settings with this value, whatever their other keys."""
        return self.over_seeds.mean if self.over_seeds else fmean(self.objectives)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Its 95% interval over seeds; None where seeds do not repeat."""
        return self.over_seeds.interval if self.over_seeds else None

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest setting."""
        return min(self.objectives), max(self.objectives)


@dataclass(frozen=True)
class Effect:
    """A key and its values in rising order."""

    key: str
    levels: tuple[Level, ...]

    @property
    def numeric(self) -> bool:
        """Whether every value is a number."""
        return all(level.low is not None for level in self.levels)

    @property
    def over_seeds(self) -> bool:
        """Whether every value has an interval over seeds."""
        return all(level.interval is not None for level in self.levels)


@dataclass(frozen=True)
class Grid:
    """Mean objective over throwing (rows) and masking (columns).

    Attributes:
        throwing: Values or bins, from the smallest.
        masking: The same.
        means: One a cell; ``None`` where no trial was run.
        infeasible: Whether a cell leaves no visible patch.
    """

    throwing: tuple[str, ...]
    masking: tuple[str, ...]
    means: tuple[tuple[float | None, ...], ...]
    infeasible: tuple[tuple[bool, ...], ...]


def effects(comparison: Comparison) -> tuple[Effect, ...]:
    """The effect of each key over the ranked trials, sweeps' baselines excluded; keys without values are left out."""
    found = [effect(comparison, key) for key in effect_keys(comparison)]
    return tuple(one for one in found if len(one.levels) > 1)


def effect_keys(comparison: Comparison) -> tuple[str, ...]:
    """What was searched; of runs that no sweep searched, the keys that differ."""
    return comparison.source.searched or comparison.keys[:MAX_KEYS]


def effect(comparison: Comparison, key: str) -> Effect:
    """The effect of one key."""
    rows = [row for row in _still(comparison) if key in row.group.first.params]
    return Effect(key, tuple(_level(members, key, comparison.source.metric) for members in _levels(rows, key)))


def throwing_by_masking(comparison: Comparison) -> Grid | None:
    """The two-way table, where both ratios take several values."""
    rows = [row for row in _still(comparison) if {THROWING, MASKING} <= set(row.group.first.params)]
    throwing, masking = (
        [_level(members, key, comparison.source.metric) for members in _levels(rows, key)]
        for key in (THROWING, MASKING)
    )
    if len(throwing) < 2 or len(masking) < 2 or any(level.low is None for level in (*throwing, *masking)):
        return None
    return Grid(
        tuple(level.label for level in throwing),
        tuple(level.label for level in masking),
        tuple(tuple(_cell(t, m) for m in masking) for t in throwing),
        tuple(tuple((t.low or 0.0) + (m.low or 0.0) > 1 - 1e-9 for m in masking) for t in throwing),
    )


def _still(comparison: Comparison) -> list[Row]:
    """The trials but for members of a population that moved: their keys have no one value."""
    return [row for row in comparison.trials if not row.group.first.became]


def _cell(throwing: Level, masking: Level) -> float | None:
    here = {row.rank for row in masking.rows}
    found = [row.objective for row in throwing.rows if row.rank in here and row.objective is not None]
    return fmean(found) if found else None


def _levels(rows: Sequence[Row], key: str) -> list[list[Row]]:
    """The settings by their value of a key, numbers by size and before words; many numbers in bins of equal count."""
    found: dict[str | float, list[Row]] = {}
    for row in rows:
        found.setdefault(as_number(row.group.first.params[key]), []).append(row)
    order: Callable[[str | float], tuple[bool, object]] = lambda v: (isinstance(v, str), v)  # noqa: E731
    values = sorted(found, key=order)  # type: ignore[arg-type]
    if len(values) <= MANY_LEVELS or any(isinstance(value, str) for value in values):
        return [found[value] for value in values]
    edges = [round(place * len(values) / BINS) for place in range(BINS + 1)]
    return [[row for value in values[a:b] for row in found[value]] for a, b in pairwise(edges)]


def _level(rows: Sequence[Row], key: str, metric: str) -> Level:
    values = [as_number(row.group.first.params[key]) for row in rows]
    numbers = [value for value in values if isinstance(value, float)]
    low, high = (min(numbers), max(numbers)) if len(numbers) == len(values) else (None, None)
    label = rows[0].group.first.params[key] if low == high else f"{low:.3g} to {high:.3g}"
    return Level(label, low, high, tuple(rows), _over_seeds(rows, metric))


def _over_seeds(rows: Iterable[Row], metric: str) -> Summary | None:
    """The mean over settings, seed by seed, of the seeds that all of them have."""
    tables = [row.by_seed for row in rows]
    common = set.intersection(*(set(table) for table in tables)) if tables else set()
    if len(common) < 2:
        return None
    return Summary(tuple(fmean(table[seed] for table in tables) for seed in sorted(common)))
