"""Ranking, differing keys and the distance to the baseline."""

from __future__ import annotations

from dataclasses import replace

import pytest

from amt_ray.report.headline import headline, on_test_images
from amt_ray.report.objective import Objective
from amt_ray.report.ranking import Comparison, Row, differing_keys, rank, replicates
from amt_ray.report.runs import Run, Study

from .conftest import RESULTS, Example


def make_run(name: str, value: float | None, status: str = "FINISHED", **more) -> Run:  # type: ignore[no-untyped-def]
    metrics = {} if value is None else {"eval/knn_top1": value, "perf/train_s": more.pop("train_s", 10.0)}
    params = more.pop("params", {"train.epochs": "4", "seed": "0"})
    return Run(name, name, more.pop("kind", "trial"), status, more.pop("baseline", False), params,
               more.pop("tags", {}), metrics, 0)  # fmt: skip


def make(*runs: Run, mode: str = "max", epochs: dict[str, int] | None = None) -> Comparison:
    study = Study("e", None, Objective("eval/knn_top1", mode), ("masking.mask_ratio",), runs)  # type: ignore[arg-type]
    return rank(study, epochs if epochs is not None else {run.run_id: 4 for run in runs})


def by_name(comparison: Comparison) -> dict[str, Row]:
    return {row.run.name: row for row in comparison.rows}


def test_rank__the_last_value_counts_and_not_the_best_epoch(comparison: Comparison) -> None:
    placed = [row.value for row in comparison.rows if row.place]
    assert placed == sorted([*RESULTS.values(), 0.905], reverse=True)
    assert comparison.best is not None
    assert comparison.best.value == 0.94


def test_rank__failed_runs_come_last_with_their_reason(comparison: Comparison, example: Example) -> None:
    last = {row.run.run_id: row for row in comparison.rows[-2:]}
    assert set(last) == {example.failed, example.running}
    assert last[example.failed].reason == "failed before the first epoch ended"
    assert last[example.running].reason == "running, no eval/knn_top1 yet"
    assert last[example.failed].place is last[example.running].place is None


def test_rank__an_unfinished_run_has_no_place_however_good_it_looks() -> None:
    rows = by_name(make(make_run("ok", 0.5), make_run("live", 0.9, "RUNNING"), make_run("dead", 0.99, "FAILED")))
    assert list(rows) == ["ok", "live", "dead"]
    assert [row.place for row in rows.values()] == [1, None, None]
    assert rows["dead"].reason == "failed after epoch 4"


def test_rank__a_run_stopped_on_purpose_keeps_its_place() -> None:
    stopped = make_run("s", 0.4, "KILLED", tags={"amt_ray.stopped_early": "asha at epoch 2"})
    row = by_name(make(make_run("ok", 0.5), stopped))["s"]
    assert (row.place, row.reason) == (2, "stopped early: asha at epoch 2")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rank__a_value_that_is_not_finite_is_no_result(value: float) -> None:
    row = make(make_run("nan", value), make_run("ok", 0.1)).rows[-1]
    assert (row.run.name, row.value, row.place) == ("nan", None, None)
    assert "finite" in row.reason


def test_rank__a_smaller_value_wins_in_min_mode() -> None:
    comparison = make(make_run("a", 0.5), make_run("b", 0.3), make_run("base", 0.4, baseline=True), mode="min")
    assert [row.run.name for row in comparison.rows] == ["b", "base", "a"]
    assert comparison.rows[0].gain == pytest.approx(0.1)


def test_rank__the_retrained_run_is_no_candidate(comparison: Comparison, example: Example) -> None:
    assert comparison.retrained is not None
    assert comparison.retrained.run.run_id == example.retrained
    assert comparison.retrained.place is None


def test_retrained__belongs_to_the_best_point() -> None:
    again = make_run("again", 0.95, kind="retrain", params={"masking.mask_ratio": "0.6"})
    best = make_run("best", 0.9, params={"masking.mask_ratio": "0.3"})
    assert make(best, again).retrained is None


def test_gain__is_in_points_and_time_relative_to_the_baseline(comparison: Comparison) -> None:
    best = comparison.best
    assert best is not None
    assert best.gain == pytest.approx(0.94 - 0.905)
    assert best.time_ratio == pytest.approx(12.4 / 20)


def test_gain__is_blank_against_a_baseline_of_another_length(comparison: Comparison) -> None:
    assert comparison.retrained is not None
    assert comparison.retrained.gain is comparison.retrained.time_ratio is None


def test_gain__is_blank_for_a_run_that_saw_fewer_epochs() -> None:
    short = make_run("short", 0.4, tags={"amt_ray.stopped_early": "asha"})
    rows = by_name(make(short, make_run("base", 0.5, baseline=True), epochs={"short": 1, "base": 4}))
    assert rows["short"].gain is rows["short"].time_ratio is None


def test_gain__time_is_blank_for_another_number_of_workers() -> None:
    params = {"train.epochs": "4", "ray.num_workers": "2"}
    rows = by_name(make(make_run("a", 0.6, params=params), make_run("base", 0.5, baseline=True)))
    assert rows["a"].gain == pytest.approx(0.1)
    assert rows["a"].time_ratio is None


def test_gain__is_measured_against_the_best_of_several_baselines() -> None:
    base = [make_run("b1", 0.5, baseline=True), make_run("b2", 0.7, baseline=True)]
    assert by_name(make(make_run("a", 0.6), *base))["a"].gain == pytest.approx(-0.1)


def test_differing_keys__searched_first_then_by_name_without_bookkeeping(comparison: Comparison) -> None:
    searched = ("masking.mask_ratio", "masking.throw_ratio", "attention.layers")
    assert comparison.keys == (*searched, "masking.strategy", "train.epochs")
    runs = [make_run("a", 1, params={"z": "1", "a": "1", "sweep.x": "1"}),
            make_run("b", 1, params={"z": "2", "a": "2", "sweep.x": "2", "only.here": "1"})]  # fmt: skip
    assert differing_keys(runs, ["z"]) == ("z", "a")


def test_replicates__ignore_the_seed_only() -> None:
    params = [{"lr": "1", "seed": "0"}, {"lr": "1", "seed": "1"}, {"lr": "2", "seed": "0"}]
    rows = make(*(make_run(f"r{i}", 0.5 + i / 10, params=p) for i, p in enumerate(params))).rows
    best = by_name(make(*(row.run for row in rows)))["r0"]
    assert {row.run.name for row in replicates(best, rows)} == {"r0", "r1"}


def test_headline__answers_with_gain_cost_and_caveat(comparison: Comparison) -> None:
    assert headline(comparison) == (
        "Best: amt mask_ratio=0.45 throw_ratio=0.4 layers=-1, 94.0% kNN top-1, +3.5 points over the "
        "MAE baseline (90.5%) at 0.62 of its training time (one seed; not a significance claim)."
    )
    assert on_test_images(comparison) == "The retrained run reaches 94.5% on the test images."


def test_headline__says_so_when_no_run_beats_the_baseline() -> None:
    comparison = make(make_run("a", 0.5), make_run("base", 0.6, baseline=True, tags={"method": "mae"}))
    assert headline(comparison).startswith("No run beats the MAE baseline. The best of the others: a, 50.0%")
    assert "-10.0 points against the MAE baseline (60.0%)" in headline(comparison)


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ((make_run("a", None, "RUNNING"),), "No run has a final value of eval/knn_top1 yet."),
        ((make_run("a", 0.5),), "without a finished baseline of the same length"),
        ((make_run("a", 0.5), make_run("base", 0.5, baseline=True)), "the same as the baseline"),
    ],
)
def test_headline__covers_what_is_missing(runs: tuple[Run, ...], words: str) -> None:
    assert words in headline(make(*runs))


def test_headline__names_the_mean_over_seeds() -> None:
    runs = [make_run(f"r{i}", v, params={"seed": str(i)}) for i, v in enumerate((0.5, 0.6))]
    assert "best of 2 runs of this configuration, whose mean is 55.0%" in headline(make(*runs))


def test_headline__a_running_sweep_is_so_far() -> None:
    comparison = make(make_run("a", 0.5))
    parent = replace(make_run("p", None, "RUNNING"), kind="sweep")
    running = replace(comparison, study=replace(comparison.study, parent=parent))
    assert headline(running).startswith("Best so far: a")
