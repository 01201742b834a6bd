"""Means, intervals and paired tests: pure functions of numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

LEVEL = 0.95
ENOUGH_SEEDS = 5  # with fewer, only differences well beyond the spread of the seeds can be told from chance


@dataclass(frozen=True)
class Summary:
    """Values of equal standing, one a seed.

    Attributes:
        values: At least one.
    """

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        """How many."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Their mean."""
        return fmean(self.values)

    @property
    def std(self) -> float | None:
        """Standard deviation of the sample (n - 1); None for one value."""
        return stdev(self.values) if self.n > 1 else None

    @property
    def half_width(self) -> float | None:
        """Half of the 95% interval of the mean, by Student's t; None for one value."""
        if self.std is None:
            return None
        return float(stats.t.ppf((1 + LEVEL) / 2, self.n - 1)) * self.std / math.sqrt(self.n)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of the mean; None for one value."""
        half = self.half_width
        return None if half is None else (self.mean - half, self.mean + half)


@dataclass(frozen=True)
class Paired:
    """A setting against the baseline, seed by seed.

    Attributes:
        differences: Value minus the baseline's, one a common seed.
        adjusted: The p-value after Holm's correction over all tests of the comparison.
    """

    differences: Summary
    adjusted: float | None = None

    @property
    def p(self) -> float | None:
        """Two-sided p-value of Student's paired t-test; None with one seed, or where the differences do not vary."""
        std = self.differences.std
        if not std:
            return None
        t = self.differences.mean / (std / math.sqrt(self.differences.n))
        return float(2 * stats.t.sf(abs(t), self.differences.n - 1))

    @property
    def effect(self) -> float | None:
        """Cohen's d of paired differences: their mean in their standard deviations."""
        std = self.differences.std
        return self.differences.mean / std if std else None


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number (Holm 1979, https://www.jstor.org/stable/4615733), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, greatest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        greatest = max(greatest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = greatest
    return adjusted


def kendall(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b of two rankings; None where either has no order."""
    if len(first) < 2 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(stats.kendalltau(first, second).statistic)
