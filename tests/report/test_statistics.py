"""Statistics against other ways to the same number."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from amt_ray.report.statistics import Paired, Summary, holm, kendall

OURS, THEIRS = (0.71, 0.74, 0.69, 0.75), (0.70, 0.72, 0.69, 0.71)


def test_summary__interval_is_students_t():
    summary = Summary(OURS)
    expected = stats.t.interval(0.95, 3, loc=summary.mean, scale=stats.sem(OURS))
    assert summary.interval == pytest.approx(expected)


def test_summary__one_seed_has_no_spread():
    assert (Summary((0.5,)).std, Summary((0.5,)).interval, Summary((0.5,)).mean) == (None, None, 0.5)


def test_paired__is_scipys_paired_test_and_cohens_d():
    paired = Paired(Summary(tuple(a - b for a, b in zip(OURS, THEIRS))))
    expected = stats.ttest_rel(OURS, THEIRS)
    assert paired.p == pytest.approx(expected.pvalue)
    assert paired.effect == pytest.approx(expected.statistic / len(OURS) ** 0.5)


@pytest.mark.parametrize("differences", [(0.1,), (0.25, 0.25, 0.25)])
def test_paired__no_p_value_without_variation(differences):
    assert Paired(Summary(differences)).p is None and Paired(Summary(differences)).effect is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_holm__is_the_closed_test_of_bonferroni(p_values):
    """A hypothesis is rejected if Bonferroni rejects every set of hypotheses that it is in: the slow definition."""
    places = range(len(p_values))
    sets = [s for size in range(1, len(p_values) + 1) for s in itertools.combinations(places, size)]
    expected = [max(min(1.0, len(s) * min(p_values[j] for j in s)) for s in sets if i in s) for i in places]
    assert holm(p_values) == pytest.approx(expected)


def test_kendall__counts_pairs():
    """Five of six pairs are in the same order: (5 - 1) / 6."""
    assert kendall([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    assert kendall([1, 1, 1], [1, 2, 3]) is None
