"""One store for the folder's tests: writing it takes longer than reading it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from rich.console import Console

from amt_ray.report import compare
from amt_ray.report.ranking import Comparison, rank
from amt_ray.report.runs import open_store, read_curves, read_sweep

from .store import StoreWriter

EVIL = "<script>alert(1)</script>"

# mask, throw, layers -> last value of the objective; the oracle of the effects is computed from this table.
RESULTS = {
    ("0.3", "0.2", "-1"): 0.90,
    ("0.3", "0.4", "-1"): 0.92,
    ("0.45", "0.2", "-1"): 0.91,
    ("0.45", "0.4", "-1"): 0.94,
    ("0.3", "0.2", "-2"): 0.88,
    ("0.3", "0.4", "-2"): 0.89,
    ("0.45", "0.2", "-2"): 0.87,
    ("0.6", "0.2", "-2"): 0.93,
}


@dataclass(frozen=True)
class Example:
    """The store, with the ids that the tests ask for."""

    writer: StoreWriter
    experiment: str
    sweep: str
    baseline: str
    failed: str
    running: str
    retrained: str
    lone: str

    @property
    def uri(self) -> str:
        return self.writer.uri


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    """A sweep with 8 trials, a baseline, a failed, a running, a retrained run; a lone run elsewhere."""
    writer = StoreWriter(tmp_path_factory.mktemp("store"))
    experiment = writer.experiment("digits")
    sweep = writer.sweep(experiment, name=f"grid {EVIL}")
    random = {"masking.strategy": "random"}
    flag = {"amt_ray.baseline": "true"}
    baseline = writer.trial(
        experiment, sweep, "0.75", "0.0", name="mae baseline", params=random, tags=flag,
        values=(0.5, 0.7, 0.85, 0.905), train_s=20, test=0.90, png=True,
    )  # fmt: skip
    for (mask, throw, layers), value in RESULTS.items():
        # The best epoch of the worst run lies above all last values: it must not win.
        middle = 0.99 if value == 0.87 else value - 0.1
        best = value == 0.94
        name = {"name": EVIL} if value == 0.92 else {}
        writer.trial(
            experiment, sweep, mask, throw, layers, values=(0.4, middle, value - 0.01, value),
            train_s=12.4, test=0.935 if best else None, png=best or value == 0.87, **name,
        )  # fmt: skip
    failed = writer.trial(experiment, sweep, "0.6", "0.45", status="FAILED")
    running = writer.trial(experiment, sweep, "0.6", "0.4", status="RUNNING")
    retrained = writer.trial(
        experiment, sweep, "0.45", "0.4", name="best, retrained", kind="retrain",
        params={"train.epochs": "6"},
        values=(0.5, 0.7, 0.8, 0.9, 0.93, 0.95), train_s=18, test=0.945, png=True,
    )  # fmt: skip
    other = writer.experiment("other")
    lone = writer.run(other, "pretrain", "alone", values=(0.5, 0.6), params={"seed": "0"})
    return Example(writer, experiment, sweep, baseline, failed, running, retrained, lone)


@pytest.fixture(scope="session")
def comparison(example: Example) -> Comparison:
    """The sweep, ranked."""
    client = open_store(example.uri)
    study = read_sweep(client, example.sweep)
    curves = read_curves(client, study.runs, "train/loss")
    return rank(study, {run: curve[-1][0] for run, curve in curves.items()})


@pytest.fixture(scope="session")
def page(example: Example, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sweep's page."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    with out.with_suffix(".txt").open("w") as file:
        return compare(example.uri, sweep=example.sweep, out=out, console=Console(file=file)).read_text("utf-8")
