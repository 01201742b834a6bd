"""Reading the store, and what is said when it does not hold what was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from amt_ray.report import compare
from amt_ray.report.objective import Objective
from amt_ray.report.runs import (
    find_sweep,
    open_store,
    read_curves,
    read_experiment,
    read_figures,
    read_sweep,
)

from .conftest import Example
from .store import SEARCHED, StoreWriter


def test_read_sweep__holds_its_children_and_what_was_searched(example: Example) -> None:
    study = read_sweep(open_store(example.uri), example.sweep)
    assert (study.experiment, study.searched, study.objective) == ("digits", SEARCHED, Objective())
    assert len(study.runs) == 12
    assert [run.run_id for run in study.runs if run.baseline] == [example.baseline]


def test_read_experiment__holds_all_runs_but_the_sweep_itself(example: Example) -> None:
    client = open_store(example.uri)
    assert len(read_experiment(client, "digits").runs) == 12
    assert [run.run_id for run in read_experiment(client, "other").runs] == [example.lone]


def test_find_sweep__takes_the_newest(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    experiments = writer.experiment("one"), writer.experiment("two")
    with pytest.raises(ValueError, match="at least one sweep, got none"):
        find_sweep(open_store(writer.uri))
    newest = [writer.sweep(e) for e in experiments][-1]
    assert find_sweep(open_store(writer.uri)) == newest
    with pytest.raises(ValueError, match="at least one trial to compare, got none"):
        read_sweep(open_store(writer.uri), newest)
    with pytest.raises(ValueError, match="at least one run to compare, got none in 'two'"):
        read_experiment(open_store(writer.uri), "two")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"sweep": "0" * 32}, r"--sweep must be the id of a run, got '0+'; newest sweeps: \w+ \(grid"),
        ({"experiment": "nowhere"}, r"--experiment must name an experiment, got 'nowhere'; known: .*digits"),
        ({"sweep": "a", "experiment": "b"}, "a sweep or an experiment, got both: 'a' and 'b'"),
    ],
)
def test_compare__names_what_exists_when_asked_for_what_does_not(
    example: Example, tmp_path: Path, wanted: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        compare(example.uri, out=tmp_path / "x.html", **wanted)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_read_sweep__refuses_a_run_that_is_no_sweep(example: Example) -> None:
    with pytest.raises(ValueError, match=f"--sweep must be a sweep, got '{example.lone}', which is pretrain"):
        read_sweep(open_store(example.uri), example.lone)


def test_open_store__does_not_create_a_store(tmp_path: Path) -> None:
    path = tmp_path / "missing.db"
    with pytest.raises(ValueError, match="there is no such file"):
        open_store(f"sqlite:///{path}")
    assert not path.exists()


def test_read_curves__skips_runs_without_the_metric_and_keeps_the_later_of_a_repeated_epoch(
    example: Example,
) -> None:
    client = open_store(example.uri)
    study = read_sweep(client, example.sweep)
    curves = read_curves(client, study.runs, "eval/knn_top1")
    assert curves[example.baseline] == ((1, 0.5), (2, 0.7), (3, 0.85), (4, 0.905))
    assert not {example.failed, example.running} & set(curves)
    client.log_metric(example.lone, "again", 1.0, timestamp=1, step=1)
    client.log_metric(example.lone, "again", 2.0, timestamp=2, step=1)
    alone = read_experiment(client, "other").runs
    assert read_curves(client, alone, "again") == {example.lone: ((1, 2.0),)}


def test_read_figures__leaves_out_runs_without_one(example: Example, capfd: pytest.CaptureFixture[str]) -> None:
    client = open_store(example.uri)
    figures = read_figures(client, read_sweep(client, example.sweep).runs, "figures/masks.png")
    assert len(figures) == 4
    assert {example.baseline, example.retrained} <= set(figures)
    assert "Downloading" not in capfd.readouterr().err
