"""Reading: sqlite and a server alike, sweeps, experiments and filters."""

import io
import shutil

import pytest
from mlflow import MlflowClient
from rich.console import Console

from amt_ray.report.compare import compare, diff
from amt_ray.report.history import read_histories, read_peaks
from amt_ray.report.ranking import rank
from amt_ray.report.store import Wanted, read
from tests.report.store import EPOCHS, FULL, POINTS, SEEDS
from tests.runtime.tracking_server import Server


@pytest.fixture(scope="module")
def source(store):
    return read(MlflowClient(store.uri), Wanted(store.seeds))


def test_read__warm_ups_and_evaluations_are_no_trials(source):
    assert {run.kind for run in source.runs} == {"trial"} and len(source.runs) == len(SEEDS) * (1 + len(POINTS))


def test_read__histories_are_what_mlflow_tells_one_by_one(store, source):
    client = MlflowClient(store.uri)
    for run in source.runs[:3]:
        for key, curve in run.history.items():
            told = sorted((point.step, point.value) for point in client.get_metric_history(run.run_id, key))
            assert list(curve) == told
        assert run.epochs == EPOCHS


def test_read__peak_memory_is_the_greatest_not_the_last(source):
    assert {peak for run in source.runs for peak in run.peaks.values()} == {900.0}


def test_read__a_filter_goes_over_all_experiments_and_knows_the_sweep(store, source):
    found = read(MlflowClient(store.uri), Wanted(filter="params.`masking.mask_ratio` = '0.40'"))
    assert len(found.runs) == 2 * len(SEEDS) and found.searched == source.searched and found.metric == source.metric
    assert "--filter" in found.again and found.sweep is None


def test_read__another_metric_can_be_asked_for(store):
    found = read(MlflowClient(store.uri), Wanted(store.seeds, metric="train/loss"))
    assert found.metric == "train/loss" and not found.maximize


def test_compare__shows_seeds_protocols_costs_and_the_test(store, source):
    comparison = rank(source)
    assert comparison.best.summary.n == 3 and comparison.best.paired.adjusted is not None
    assert comparison.best.cost.images == EPOCHS * 2000 and comparison.best.cost.device_seconds == 2 * 60.0
    console = Console(file=io.StringIO(), width=120)
    (page,) = compare(store.uri, sweep=store.seeds, out=[store.folder / "r.html"], console=console)
    html = page.read_text()
    for text in (f"{FULL}: test/linear_top1", "77.0%", "✕", "0.9 GB", "fANOVA", "Paired t-tests"):
        assert text in html
    assert "0.99" not in console.file.getvalue() and "mean of 3 seeds" in console.file.getvalue()


def test_diff__of_two_runs_reads_their_packages(store, source):
    console = Console(file=io.StringIO(), width=120)
    diff(store.uri, source.runs[0].run_id, source.runs[-1].run_id, console)
    told = console.file.getvalue()
    assert "numpy" in told and "2.0" in told and "2.3" in told and "torch" not in told and "masking.throw_ratio" in told
    with pytest.raises(ValueError, match="--diff must name two runs"):
        diff(store.uri, source.runs[0].run_id, "nothing")


def test_read__a_server_tells_the_same(store, source, tmp_path):
    shutil.copy(store.folder / "mlflow.db", tmp_path / "server.db")
    server = Server(tmp_path)
    server.start()
    try:
        here, there = MlflowClient(store.uri), MlflowClient(server.uri)
        assert read(there, Wanted(store.seeds)) == source
        wanted = {"train/loss": [run.run_id for run in source.runs]}
        assert read_histories(there, wanted) == read_histories(here, wanted)
        assert read_peaks(there, wanted) == read_peaks(here, wanted)
    finally:
        server.kill()
