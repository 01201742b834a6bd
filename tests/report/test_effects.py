"""Effects of the searched keys against values computed by hand."""

from __future__ import annotations

import pytest

from amt_ray.report.effects import counted, effects, grid
from amt_ray.report.ranking import Comparison

from .test_ranking import make, make_run


def test_effects__agree_with_the_means_computed_by_hand(comparison: Comparison) -> None:
    found = {e.key: e for e in effects(comparison.rows, comparison.study.searched)}
    means = {(key, level.value): level.mean for key, e in found.items() for level in e.levels}
    assert means == pytest.approx(
        {
            ("masking.mask_ratio", "0.3"): (0.90 + 0.92 + 0.88 + 0.89) / 4,
            ("masking.mask_ratio", "0.45"): (0.91 + 0.94 + 0.87) / 3,
            ("masking.mask_ratio", "0.6"): 0.93,
            ("masking.throw_ratio", "0.2"): (0.90 + 0.91 + 0.88 + 0.87 + 0.93) / 5,
            ("masking.throw_ratio", "0.4"): (0.92 + 0.94 + 0.89) / 3,
            ("attention.layers", "-2"): (0.88 + 0.89 + 0.87 + 0.93) / 4,
            ("attention.layers", "-1"): (0.90 + 0.92 + 0.91 + 0.94) / 4,
        }
    )
    level = found["masking.mask_ratio"].levels[0]
    assert (min(level.results), max(level.results), len(level.results)) == (0.88, 0.92, 4)


def test_effects__leave_out_baselines_retrained_broken_and_stopped_runs() -> None:
    stopped = {"amt_ray.stopped_early": "asha at epoch 1"}
    comparison = make(
        make_run("trial", 0.5), make_run("base", 0.6, baseline=True), make_run("again", 0.7, kind="retrain"),
        make_run("dead", 0.8, "FAILED"), make_run("live", 0.8, "RUNNING"),
        make_run("short", 0.1, tags=stopped),
    )  # fmt: skip
    assert [row.run.name for row in counted(comparison.rows)] == ["trial"]


def test_effects__numbers_rise_and_words_follow() -> None:
    values = ["10", "rollout", "-1", "9"]
    runs = [make_run(f"r{i}", 0.5, params={"attention.layers": v}) for i, v in enumerate(values)]
    (effect,) = effects(make(*runs).rows, ["attention.layers", "absent"])
    assert [level.value for level in effect.levels] == ["-1", "9", "10", "rollout"]
    assert not effect.is_numeric


def test_grid__averages_over_the_other_keys_and_leaves_missing_cells_empty(comparison: Comparison) -> None:
    found = grid(comparison.rows, "masking.mask_ratio", "masking.throw_ratio")
    assert found is not None
    assert (found.x_values, found.y_values) == (("0.3", "0.45", "0.6"), ("0.2", "0.4"))
    assert found.means[0] == pytest.approx((0.89, 0.89, 0.93))
    assert found.means[1] == (pytest.approx(0.905), 0.94, None)
    assert found.counts == ((2, 2, 1), (2, 1, 0))
    assert grid(comparison.rows, "masking.mask_ratio", "seed") is None
