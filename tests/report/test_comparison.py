"""Grouping, tests, effects, costs and differences: pure functions of runs."""

import csv
import io
import json
import random
from dataclasses import replace

import pytest
from scipy import stats

from amt_ray.report import words
from amt_ray.report.costs import cost_of, pareto
from amt_ray.report.diff import differences, embedded, facts
from amt_ray.report.effects import MASKING, THROWING, effect, effects, throwing_by_masking
from amt_ray.report.evaluated import differently_measured, evaluated, protocols
from amt_ray.report.files import csv_text, latex, markdown
from amt_ray.report.importance import importances
from amt_ray.report.layers import layer_effect
from amt_ray.report.plots.curves import band, thinned
from amt_ray.report.rungs import rungs, value_at
from amt_ray.report.runs import Run
from amt_ray.report.statistics import holm
from tests.report.made import METRIC, compared, run

BASE = (0.70, 0.72, 0.69)
GOOD = (0.75, 0.78, 0.73)
POOR = (0.69, 0.72, 0.70)


@pytest.fixture
def seeded():
    """A baseline and two settings with three seeds each."""
    tables = (("base", BASE, True, 0.75), ("good", GOOD, False, 0.5), ("poor", POOR, False, 0.3))
    runs = [
        run(name, value, seed, is_base, masking__mask_ratio=ratio)
        for name, values, is_base, ratio in tables
        for seed, value in enumerate(values)
    ]
    return compared(random.Random(0).sample(runs, len(runs)), [MASKING])


def test_groups__runs_that_differ_only_in_the_seed_are_one_row(seeded):
    assert [(row.name, row.summary.n) for row in seeded.rows] == [("good", 3), ("poor", 3), ("base", 3)]
    assert seeded.rows[0].summary.values == GOOD and "seed" not in seeded.keys


def test_groups__where_a_run_was_made_makes_no_difference_and_a_repeated_seed_counts_once():
    runs = [run("a", 0.5, 0, ray__storage_path="x"), run("b", 0.7, 0, ray__storage_path="y"), run("c", 0.9, 1)]
    (row,) = compared(replace(one, params={**one.params, "data.root": one.name}) for one in runs).rows
    assert row.summary.values == (pytest.approx(0.6), 0.9)


def test_groups__a_setting_is_ranked_by_what_its_seeds_reached_and_says_what_is_missing():
    runs = [run("a", 0.5, 0), run("a", None, 1, status="FAILED", tags={"amt_ray.error": "no memory"})]
    (row,) = compared(runs).rows
    assert row.rank == 1 and row.summary.n == 1 and row.note == "1 of 2: failed before the first epoch ended: no memory"


def test_paired__is_over_common_seeds_with_holm_over_all_settings(seeded):
    rows = {row.name: row for row in seeded.rows}
    p_values = [stats.ttest_rel(values, BASE).pvalue for values in (GOOD, POOR)]
    assert [rows[name].paired.adjusted for name in ("good", "poor")] == pytest.approx(holm(p_values))
    assert rows["base"].paired is None and "With 3 seeds" in words.tests(seeded)


def test_paired__trials_that_were_stopped_early_are_not_tested():
    early = {"amt_ray.stopped_early": "asha at epoch 1"}
    runs = [run("base", 0.5 + seed / 50, seed, True, x=1) for seed in range(3)]
    runs += [run("new", 0.6, seed, x=2, tags=early if seed else {}) for seed in range(3)]
    comparison = compared(runs)
    assert comparison.best.paired.differences.n == 1 and comparison.best.paired.adjusted is None
    assert "Too few seeds" in words.tests(comparison) and "not tested" in words.headline(comparison)


def test_baseline__any_run_can_be_named(seeded):
    runs = [one for row in seeded.rows for one in row.group.runs]
    for name in ("poor", "poor-1"):
        named = compared(runs, [MASKING], baseline=name)
        assert named.reference.name == "poor" and named.best.delta == pytest.approx(0.05)


def test_baseline__of_a_sweep_of_nothing_else_is_the_first_and_the_best_of_the_others_leads():
    points = [
        ("mae", 0.5, "random", {}),
        ("amt", 0.4, "amt", {}),
        ("turned", 0.6, "amt", {"masking__options__order": "v"}),
    ]
    runs = [
        run(name, value + seed / 100, seed, baseline=True, masking__strategy=strategy,
            **(options or {"masking__options": "{}"}))
        for name, value, strategy, options in points for seed in (0, 1)
    ]  # fmt: skip
    found = compared(runs)
    assert found.reference.name == "mae" and found.best.name == "turned"
    assert words.headline(found).startswith("Best: turned, 60.5% kNN top-1, +10.0 points over the baseline")
    assert found.keys == ("masking.options.order", "masking.strategy")  # an option that only some name
    alone = compared(runs[:2])
    assert alone.best is None and alone.reference.name == "mae"


def test_effects__interval_is_over_the_means_of_each_seed():
    table = {
        (mask, throw, seed): mask / 10 + throw / 20 + seed / 100
        for mask in (1, 2)
        for throw in (1, 2)
        for seed in (0, 1)
    }
    runs = [run(str(key[:2]), value, key[2], a=key[0], b=key[1]) for key, value in table.items()]
    first = effect(compared(runs, ["a", "b"]), "a").levels[0]
    per_seed = [sum(table[1, throw, seed] for throw in (1, 2)) / 2 for seed in (0, 1)]
    assert first.over_seeds.values == pytest.approx(per_seed) and first.mean == pytest.approx(sum(per_seed) / 2)


def test_effects__without_common_seeds_are_descriptive():
    assert all(
        level.interval is None for level in effect(compared([run("a", 0.1, 0, a=1), run("b", 0.2, 1, a=2)]), "a").levels
    )


def test_effects__many_numbers_are_put_into_bins_of_equal_count():
    runs = [run(str(i), i / 100, a=i / 50) for i in range(50)]
    levels = effect(compared(runs, ["a"]), "a").levels
    assert [len(level.rows) for level in levels] == [10] * 5 and levels[0].label == "0 to 0.18"


def test_grid__the_infeasible_corner_is_not_merely_not_run():
    points = [(0.4, 0.2), (0.4, 0.6), (0.8, 0.1)]
    runs = [run(str(p), 0.5, masking__mask_ratio=p[0], masking__throw_ratio=p[1]) for p in points]
    grid = throwing_by_masking(compared(runs, [MASKING, THROWING]))
    state = {
        (m, t): "run" if mean is not None else "shut" if shut else "open"
        for t, means, row in zip(grid.throwing, grid.means, grid.infeasible)
        for m, mean, shut in zip(grid.masking, means, row)
    }
    assert state == {
        **{("0.4", "0.1"): "open", ("0.4", "0.2"): "run", ("0.4", "0.6"): "run"},
        **{("0.8", "0.1"): "run", ("0.8", "0.2"): "shut", ("0.8", "0.6"): "shut"},
    }


def test_layers__are_ordered_by_depth_with_rollout_last():
    layers = ["rollout", "-1", "3", "[-2]", "(0, 1)"]
    runs = [run(layer, 0.5, attention__layers=layer, model__encoder__depth=12) for layer in layers]
    found = [level.label for level in layer_effect(compared(runs, ["attention.layers"])).levels]
    assert found[:3] == ["3", "[-2] = 10", "-1 = 11"] and set(found[3:]) == {"rollout", "(0, 1)"}


def test_importance__finds_the_key_that_matters_and_knows_chance():
    chance = random.Random(0)
    runs = [
        run(f"{a} {b}", a + chance.gauss(0, 0.01), seed, a=a, b=b)
        for a in (0.1, 0.2, 0.3)
        for b in ("x", "y", "z")
        for seed in (0, 1)
    ]
    found = {one.key: one.share for one in importances(compared(runs, ["a", "b"]))}
    assert found["a"] > 0.9 and set(found) == {"a", "b", "seed"}
    assert importances(compared(runs[:4], ["a", "b"])) == ()


def test_pareto__is_what_no_other_beats_in_both():
    points = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.4), (2.5, 0.7), (2.5, 0.8), (9.0, 0.9)]
    slow = {i for i, (c, v) in enumerate(points) if not any(d <= c and w >= v and (d, w) != (c, v) for d, w in points)}
    assert set(pareto(points)) == slow == {0, 1, 4}
    assert pareto([(c, -v) for c, v in points], maximize=False) == pareto(points)


def test_costs__are_of_all_devices():
    metrics = {"perf/train_s": 100.0, "perf/images_per_s": 200.0, "perf/epoch_s": 5.0}
    params = {"ray.num_workers": "4", "ray.gpus_per_worker": "0.5", "ray.use_gpu": "True"}
    one = Run(
        "a",
        "a",
        "trial",
        "FINISHED",
        params,
        {},
        metrics,
        {METRIC: ((10, 0.5),)},
        {"system/gpu_0_memory_usage_megabytes": 7.0},
    )
    cost = cost_of([one, replace(one, peaks={})])
    assert (cost.images, cost.device_seconds, cost.device, cost.peak_mb) == (10_000, 200.0, "GPU", 7.0)


def test_rungs__compare_the_order_at_the_rung_with_the_last_of_finished_trials():
    curves = [((2, 0.1), (4, 0.5)), ((2, 0.2), (4, 0.6)), ((2, 0.3), (4, 0.4))]
    runs = [run(str(i), curve[-1][1], curve=curve) for i, curve in enumerate(curves)]
    runs += [run(f"s{i}", 0.1, curve=((2, 0.1),), tags={"amt_ray.stopped_early": "asha at epoch 2"}) for i in range(2)]
    (rung,) = rungs(runs, METRIC)
    assert (rung.epoch, rung.stopped, rung.compared) == (2, 2, 3)
    assert rung.tau == pytest.approx(stats.kendalltau([1, 2, 3], [5, 6, 4]).statistic)
    assert rungs(runs[1:], METRIC)[0].tau is None and rungs(runs[:3], METRIC) == ()
    assert value_at(((2, 0.1), (4, 0.5)), 3) == 0.1 and value_at(((4, 0.5),), 3) is None


def test_protocols__results_of_different_settings_never_share_a_column():
    def told(protocol, value):
        return {
            "amt_ray.eval.knn": json.dumps(
                {"protocol": protocol, "run": "r", "eval/knn_top1": 0.1, "test/knn_top1": value}
            )
        }

    comparison = compared([run("a", 0.5, x=1, tags=told("knn", 0.7)), run("b", 0.4, x=2, tags=told("knn+k=5", 0.8))])
    assert [(one.name, one.metric) for one in protocols(comparison.runs)] == [
        ("knn", "test/knn_top1"),
        ("knn+k=5", "test/knn_top1"),
    ]
    values = [[evaluated(row.group, one) for one in protocols(comparison.runs)] for row in comparison.rows]
    assert [[v and v.mean for v in row] for row in values] == [[0.7, None], [None, 0.8]]


def test_protocols__runs_measured_differently_are_named_at_the_top():
    runs = [
        run("a", 0.5, eval__options="{}", eval__protocols="['knn']"),
        run("b", 0.6, eval__options__knn__k="[5]", eval__protocols="['knn']"),
    ]
    told = words.warnings(compared(runs))[0]
    assert "not measured alike" in told and "eval.options.knn.k: [5] / not set" in told and "eval.protocols" not in told
    assert differently_measured(runs[:1]) == ()


def test_band__runs_from_the_smallest_seed_to_the_largest_at_common_epochs():
    runs = [run("a", 0.4, 0, curve=((1, 0.1), (2, 0.4))), run("a", 0.6, 1, curve=((2, 0.6), (3, 0.7)))]
    assert band(compared(runs).rows[0], METRIC) == [(2, 0.5, 0.4, 0.6)]
    points = [(i, 0.0, 0.0, 0.0) for i in range(1000)]
    assert [point[0] for point in thinned(points, 3)] == [0, 500, 999]


def test_diff__names_each_key_down_to_the_packages():
    runs = [run("a", 0.5, x=1, tags={"version.torch": "2.1"}), run("b", 0.5, 1, x=1, tags={"version.torch": "2.2"})]
    first, second = facts(runs[0], {"numpy": "1.0", "six": "1.0"}), facts(runs[1], {"numpy": "2.0", "six": "1.0"})
    found = [(one.section, one.key, one.first, one.second) for one in differences(first, second)]
    assert found == [
        ("settings", "seed", "0", "1"),
        ("versions", "version.torch", "2.1", "2.2"),
        ("packages", "numpy", "1.0", "2.0"),
    ]
    sections = embedded(zip(runs, (first, second)))["sections"]
    assert sections["packages"] == {"numpy": [["1.0", "2.0"], [0, 1]]}


def test_files__say_the_same_and_escape_what_is_markup(seeded):
    comparison = compared([*seeded.runs, run("worst|_%", 0.1, masking__mask_ratio="a|b_c%")], [MASKING])
    rows = list(csv.DictReader(io.StringIO(csv_text(comparison))))
    assert [float(row[METRIC]) for row in rows] == [row.objective for row in comparison.rows]
    assert rows[0]["runs"] == "good-0 good-1 good-2" and rows[0][f"{METRIC} of seeds"].startswith("0=0.75 1=0.78")
    assert rows[0][MASKING] == "0.5"
    table = [line for line in markdown(comparison).splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(comparison.rows) and r"a\|b\_c%" in table[-1]
    tex = latex(comparison)
    assert r"a|b\_c\%" in tex and tex.count(r" \\") == 1 + len(comparison.rows)
    columns = tex.split("\\begin{tabular}{")[1].split("}")[0]
    assert all(line.count(" & ") == len(columns) - 1 for line in tex.splitlines() if line.endswith(r" \\"))


def test_effects__of_runs_that_no_sweep_searched_are_of_the_keys_that_differ():
    assert [one.key for one in effects(compared([run("a", 0.1, x=1, y=1), run("b", 0.2, x=2, y=1)]))] == ["x"]
