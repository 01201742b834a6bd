"""Sweeps as outcomes, without training: the same as a book, as runs of the report, and as a store of MLflow."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from amt_ray.book import Book, Entry
from amt_ray.config import Experiment
from amt_ray.report.ranking import Comparison, rank
from amt_ray.report.runs import Run, Source
from amt_ray.runtime import ledger
from amt_ray.runtime.pretrain import storage_of
from amt_ray.runtime.storage import StoredCheckpoints, joined
from amt_ray.runtime.sweep import _tags
from amt_ray.runtime.tracking import Target
from amt_ray.space import MASK, sweep_points
from amt_ray.trials import Trial, trial_experiment
from tests.tiny import tiny

METRIC = "eval/knn_top1"
MAE = {"masking.strategy": "random", MASK: 0.75, "masking.throw_ratio": 0.0}


@dataclass(frozen=True)
class Made:
    """A trial: its curve by epoch, and how it ended: ``ended``, ``asha``, ``budget`` or ``failed``."""

    ratio: float
    seed: int
    curve: dict[int, float]
    how: str = "ended"
    baseline: bool = False
    now: dict | None = None
    overrides: dict = field(default_factory=dict)

    @property
    def point(self) -> dict:
        return (MAE if self.baseline else {MASK: self.ratio}) | self.overrides

    @property
    def reached(self) -> int:
        return max(self.curve, default=0)


def swept(ratios, seeds=(0,), epochs=9, **sweep) -> Experiment:
    """A sweep over the masking ratio, measured after every epoch."""
    told = {"space": {MASK: {"grid": list(ratios)}}, "seeds": list(seeds), **sweep}
    return tiny(train__epochs=epochs, eval__every_epochs=1, sweep=told)


def trial_of(one: Made, length: int | None = None) -> Trial:
    return Trial(one.point, one.seed, one.baseline, length)


def stopped(one: Made) -> str | None:
    return None if one.how in ("ended", "failed") else f"{one.how} at epoch {one.reached}"


def book_of(experiment: Experiment, made, lengths=None) -> Book:
    """A book in which all of it has happened."""
    entries = []
    for index, one in enumerate(made):
        length = (lengths or {}).get(one.ratio)
        status = "failed" if one.how == "failed" else "ended"
        entry = Entry(
            index, trial_of(one, length), length or experiment.train.epochs, status=status, run_id=f"r{index}"
        )
        entry.values, entry.epoch, entry.early = list(one.curve.items()), one.reached, stopped(one)
        entry.value, entry.now = one.curve.get(one.reached), one.now
        entries.append(entry)
    return Book(experiment, sweep_points(experiment), entries)


def params_and_tags(experiment: Experiment, one: Made, index: int, length=None):
    trial = trial_of(one, length)
    own = trial_experiment(experiment, trial.overrides)
    params = {key: "" if value is None else str(value) for key, value in own.dotted().items()}
    task = {"point": one.point, "seed": one.seed, "baseline": one.baseline, "epochs": length, "drawn": None,
            "member": 0}  # fmt: skip
    tags = {"amt_ray.kind": "trial", **ledger.trial_tags({**task, "index": index})}
    if early := stopped(one):
        tags[ledger.EARLY] = early
    if experiment.sweep.pbt is not None:
        tags[ledger.MEMBER] = "true"
    if one.now is not None:
        tags[ledger.NOW] = json.dumps(one.now)
    return params, tags


def runs_of(experiment: Experiment, made, lengths=None) -> list[Run]:
    """The same as runs of the report."""
    found = []
    for index, one in enumerate(made):
        params, tags = params_and_tags(experiment, one, index, (lengths or {}).get(one.ratio))
        status = "FAILED" if one.how == "failed" else "FINISHED"
        history = {METRIC: tuple(sorted(one.curve.items()))} if one.curve else {}
        last = {METRIC: one.curve[one.reached]} if one.curve else {}
        parent = {"mlflow.parentRunId": "parent"}
        found.append(Run(f"r{index}", f"mask {one.ratio}", "trial", status, params, tags | parent, last, history))
    return found


def page_of(experiment: Experiment, made, lengths=None, runs=None, **about) -> Comparison:
    """The page's comparison of it."""
    seeds = tuple(str(seed) for seed in experiment.sweep.seeds or (experiment.seed,))
    runs = tuple(runs if runs is not None else runs_of(experiment, made, lengths))
    maximize = experiment.sweep.mode == "max"
    return rank(Source("made", "made", runs, metric=METRIC, maximize=maximize, seeds={"parent": seeds}), **about)


class Store:
    """A fresh sqlite store, written as the runtime writes it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.uri = folder, f"sqlite:///{folder / 'mlflow.db'}"
        self.client = MlflowClient(self.uri)
        self.experiment_id = self.client.create_experiment("made", artifact_location=(folder / "artifacts").as_uri())
        self.target = Target(self.uri, self.experiment_id, str(folder / "outbox"))

    def sweep(self, experiment: Experiment, made, lengths=None) -> str:
        tags = {"amt_ray.kind": "sweep", **_tags(experiment)}
        parent = self.client.create_run(self.experiment_id, tags=tags, run_name="made sweep").info.run_id
        self.client.log_param(parent, "sweep.metric", experiment.sweep.metric)
        self.client.log_text(parent, experiment.to_yaml(), "config.yaml")
        for index, one in enumerate(made):
            params, tags = params_and_tags(experiment, one, index, (lengths or {}).get(one.ratio))
            tags["mlflow.parentRunId"] = parent
            run = self.client.create_run(self.experiment_id, tags=tags, run_name=f"trial {index}").info.run_id
            told = [Param(key, value) for key, value in params.items()]
            points = [Metric(METRIC, value, 1, epoch) for epoch, value in one.curve.items()]
            losses = [Metric("train/loss", 1.0, 1, epoch) for epoch in range(1, one.reached + 1)]
            self.client.log_batch(run, metrics=points + losses, params=told[:100])
            self.client.log_batch(run, params=told[100:])
            self.client.set_terminated(run, "FAILED" if one.how == "failed" else "FINISHED")
            if Path(experiment.ray.storage_path).is_absolute():  # what is stored is how far a trial has come
                for epoch, value in one.curve.items():
                    stored = StoredCheckpoints(joined(storage_of(experiment), run), keep=1)
                    stored.save(epoch, {METRIC: value}, lambda folder: (folder / "weights").write_text("x"))
        return parent
