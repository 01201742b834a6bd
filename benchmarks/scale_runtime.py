"""Constants of a sweep and of a cluster at scale: planning, MLflow, what is shipped, start-up."""

import contextlib
import io
import json
import os
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import cloudpickle
from compare import write_store
from mlflow import MlflowClient
from mlflow.store.tracking.dbmodels import models
from rich.console import Console
from scale_core import MB, Constants, experiment, spent
from sqlalchemy import insert

from amt_ray.book import Book
from amt_ray.config import Experiment, experiment_from
from amt_ray.runtime import ledger, ray_train, ray_tune, tracking
from amt_ray.runtime.pretrain import pretrain
from amt_ray.runtime.progress import Board
from amt_ray.runtime.tracking.system import SystemMetrics
from amt_ray.runtime.watch import TrialWatch
from amt_ray.space import sweep_points

GRID_SPACE = {
    "masking.mask_ratio": {"grid": [0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65]},
    "masking.throw_ratio": {"grid": [0.0, 0.1, 0.2, 0.3]},
    "attention.layers": {"grid": [-1, -2, -3, -4, "rollout"]},
}
DRAWN_SPACE = {
    "masking.mask_ratio": {"uniform": [0.2, 0.6]},
    "masking.throw_ratio": {"uniform": [0.0, 0.6]},
    "attention.layers": {"choice": [-1, -2, -3, -4]},
}
SLOTS = 64
TINY = {
    "name": "tiny",
    "data": {"name": "digits", "image_size": 32, "crop_scale": [0.6, 1.0], "flip": 0.0},
    "model": {
        "patch_size": 8,
        "encoder": {"embed_dim": 32, "depth": 2, "num_heads": 2},
        "decoder": {"embed_dim": 32, "depth": 1, "num_heads": 2},
    },
    "masking": {"warmup_epochs": 2, "refresh_every_epochs": 2},
    "optim": {"warmup_epochs": 1},
    "eval": {"every_epochs": 2},
    "tracking": {"log_model": False},
}


def sweep_experiment(trials: int, search: str) -> Experiment:
    """A sweep of so many trials: points of a grid (or drawn by Optuna), a grid's with five seeds."""
    asked: dict[str, Any] = {"metric": "eval/knn_top1", "max_concurrent_trials": SLOTS, "search": search}
    if search == "grid":
        kept = GRID_SPACE | {"masking.mask_ratio": {"grid": GRID_SPACE["masking.mask_ratio"]["grid"][: trials // 100]}}
        asked |= {"space": kept, "seeds": [0, 1, 2, 3, 4]}
    else:
        asked |= {"space": DRAWN_SPACE, "num_samples": trials}
    return experiment("base").override({"sweep": asked})


def planning(trials: int) -> Constants:
    """What the driver does before the first trial, for every report, and for every point that Optuna is asked for."""
    found: Constants = {}
    books: list[Book] = []
    grid = sweep_experiment(trials, "grid")
    planned = spent(lambda: books.append(Book(grid, sweep_points(grid))))
    book = books[0]
    assert len(book.entries) == trials
    found |= {"grid_s": planned.cpu_s, "grid_peak_mb": planned.peak_mb, "warmups": len(book.warmups)}
    found["report_ms"] = 1e3 * _report_s(book)
    drawn = sweep_experiment(trials, "optuna")
    asked: list[Book] = []
    optuna = spent(lambda: asked.append(_asked(drawn, trials)))
    found |= {"optuna_s": optuna.cpu_s, "optuna_peak_mb": optuna.peak_mb}
    again = Book(drawn, sweep_points(drawn), list(asked[0].entries.values()))
    found["optuna_replay_s"] = spent(again._study).cpu_s
    return found


def _report_s(book: Book) -> float:
    """Processor seconds of the driver for one epoch's report, when all trials but one have ended."""
    chance = random.Random(0)
    for entry in list(book.entries.values())[1:]:
        entry.status, entry.value, entry.epoch = "ended", chance.random(), entry.epochs
    with tempfile.TemporaryDirectory() as folder:
        target = tracking.Target(f"sqlite:///{folder}/none.db", "0", folder)
        watch = TrialWatch(book, target, "", folder, Board(Console(file=io.StringIO()), "", 1), lambda task: "")
        watch.noted = float("inf")  # what is spent is written down every 30 s, not here
        trial = mock.Mock(config={"kind": "trial", "index": 0})
        told = {"epoch": 1, "run_id": "0", "eval/knn_top1": 0.5, "perf/train_s": 1.0}
        return statistics.median(spent(lambda: watch.on_trial_result(0, [], trial, told)).cpu_s for _ in range(20))


def _asked(drawn: Experiment, trials: int) -> Book:
    """A book whose points were all asked for, at most ``SLOTS`` running at once, with made-up values."""
    book, chance, running = Book(drawn, sweep_points(drawn)), random.Random(0), []
    for shared in book.warmups.values():
        shared.status, shared.reached, shared.run_id = "ended", shared.warmup.until, "warm-up"
    while (task := book.next()) != "finished":
        running.append(task)
        if len(running) >= SLOTS:
            told = {"epoch": 400, "run_id": str(len(book.entries)), "eval/knn_top1": chance.random()}
            book.progressed(running[0], told)
            book.finished(running.pop(0), failed=False)
    assert len(book.entries) == trials
    return book


def resuming(runs: int, folder: Path) -> Constants:
    """What ``amt-ray sweep --resume`` reads of so many trials of 400 epochs, six metrics each."""
    uri = f"sqlite:///{folder / 'resumed.db'}"
    parent = write_store(uri, folder, runs, 400)
    client = MlflowClient(uri)
    target = tracking.Target(uri, client.get_experiment_by_name("large").experiment_id, str(folder / "outboxes"))
    trials = ledger.children(target, parent, "trial")
    rows = [{"run_uuid": run.info.run_id, "key": ledger.TRIAL, "value": _trial_tag(run)} for run in trials]
    with client._tracking_client.store.ManagedSessionMaker(read_only=False) as session:
        session.execute(insert(models.SqlTag), rows)
    asked = sweep_experiment(1000, "grid")
    entries: list[ledger.Entry] = []
    found: Constants = {
        "children_s": spent(lambda: ledger.children(target, parent, "trial")).cpu_s,
        "entries_s": (
            read := spent(lambda: entries.extend(ledger.known_entries(target, parent, asked, str(folder))))
        ).cpu_s,
        "entries_peak_mb": read.peak_mb,
    }
    assert len(entries) == runs and all(entry.epoch == 400 and len(entry.values) == 400 for entry in entries)
    query = f"tags.`mlflow.parentRunId` = '{parent}' and tags.`amt_ray.kind` = 'trial' and tags.`amt_ray.point` = '7'"
    look_up = [spent(lambda: client.search_runs([target.experiment_id], query)).cpu_s for _ in range(5)]
    found["child_ms"] = 1e3 * statistics.median(look_up)
    size = (folder / "resumed.db").stat().st_size
    found |= {"bytes_per_point": size / (runs * 400 * 6), "database_mb": size / MB}
    return found


def _trial_tag(run: Any) -> str:
    told = {key: run.data.params[key] for key in ("masking.mask_ratio", "masking.throw_ratio")}
    point = {key: float(value) for key, value in told.items()}
    return json.dumps({"point": point, "seed": 0, "baseline": False, "epochs": None, "drawn": None})


def rows_of_a_run(folder: Path) -> Constants:
    """Rows that real runs leave in MLflow's tables: two trainings that differ by four epochs only."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        counted = []
        for epochs in (4, 8):
            uri = f"sqlite:///{folder / f'rows{epochs}.db'}"
            tree = {**TINY, "train": {"epochs": epochs, "batch_size": 256}, "ray": {"num_workers": 0}}
            trained = experiment_from(tree).override({"tracking.uri": uri})
            with mock.patch.dict(os.environ, {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "3600"}):
                run_id = pretrain(trained, Console(file=io.StringIO()))
            counted.append(_rows(folder / f"rows{epochs}.db", run_id))
    finally:
        os.chdir(here)
    few, more = counted
    artifacts = [file.stat().st_size for file in (folder / "mlartifacts").rglob("*") if file.is_file()]
    box = mock.Mock(closed=True)
    return {
        "points_per_epoch": (more["metrics"] - few["metrics"]) / 4,
        "params": more["params"],
        "tags": more["tags"],
        "artifact_kb": sum(artifacts) / 2 / 1e3,
        "system_points_per_sample": len(SystemMetrics(box, 3600).sample()),
    }


def _rows(database: Path, run_id: str) -> dict[str, int]:
    with sqlite3.connect(database) as tables:
        return {
            table: tables.execute(f"select count(*) from {table} where run_uuid = ?", (run_id,)).fetchone()[0]
            for table in ("metrics", "params", "tags")
        }


class _CaughtError(Exception):
    """What was to be shipped is known."""


def shipped(trials: int) -> Constants:
    """Pickled bytes: what all trials share, a trial's task, an epoch's report, what Ray Train tells each worker."""
    asked = sweep_experiment(trials, "grid")
    book, caught = Book(asked, sweep_points(asked)), {}
    target = tracking.Target("http://mlflow:5000", "1", "/shared/outboxes")

    def catch(name: str, kept: object) -> None:
        caught[name] = len(cloudpickle.dumps(kept))
        raise _CaughtError

    board = Board(Console(file=io.StringIO()), "", 1)
    with (
        mock.patch.object(ray_tune, "concurrent_runs", return_value=SLOTS),
        mock.patch.object(ray_tune.tune, "with_parameters", lambda work, told: catch("shared", told)),
        contextlib.suppress(_CaughtError),
    ):
        ray_tune.run_tasks(book, target, "0" * 32, "/shared/runs", board)
    with (
        mock.patch.object(ray_train, "trainer", lambda work, told, *more: catch("worker", told)),
        contextlib.suppress(_CaughtError),
    ):
        ray_train.fit(experiment("large", 64), target, "0" * 32, "/shared/runs")
    for shared in book.warmups.values():
        shared.status, shared.reached, shared.run_id = "ended", shared.warmup.until, "0" * 32
    keys = ("train/loss", "train/lr", "perf/images_per_s", "perf/epoch_s", "perf/data_wait_share", "perf/train_s")
    report = dict.fromkeys(("epoch", "perf/workers", "perf/eval_s", "eval/knn_top1", *keys), 0.1)
    return {
        "shared_bytes": caught["shared"],
        "task_bytes": len(cloudpickle.dumps(book.next())),
        "report_bytes": len(cloudpickle.dumps(report | {"run_id": "0" * 32})),
        "worker_bytes": caught["worker"],
    }


def imports() -> Constants:
    """Processor seconds of a fresh process up to its imports: torch alone, and all that a trial's process imports."""
    found: Constants = {}
    for name, words in (("torch", "import torch"), ("trial", "import amt_ray.runtime.ray_tune")):
        worked = os.times()
        subprocess.run([sys.executable, "-c", words], check=True)
        ended = os.times()
        taken = ended.children_user + ended.children_system - worked.children_user - worked.children_system
        found[f"{name}_cpu_s"] = taken
    return found


def train_start(told: Mapping[str, Any]) -> None:
    """A Ray Train worker that notes when it is where; every rank's own file."""
    import torch
    from ray.train.torch import get_device

    from amt_ray.config import Experiment
    from amt_ray.core.ports import ProcessGroup
    from amt_ray.core.sampling import epoch_steps
    from amt_ray.runtime import local
    from amt_ray.runtime.splits import load_splits

    marks = {"entered": time.time()}
    own, ranks = Experiment.model_validate(told["experiment"]), ProcessGroup(get_device())
    splits = load_splits(own)
    marks["data"] = time.time()
    training = local.build_pretraining(own, splits, ranks)
    marks["built"] = time.time()
    step = next(epoch_steps(torch.arange(len(splits.index)), own.train.batch_size, ranks.rank, ranks.size))
    training.train_step([training.prepared(micro) for micro in step])
    marks["stepped"] = time.time()
    Path(told["folder"], f"{ranks.rank}.json").write_text(json.dumps(marks))


def start_up(workers: tuple[int, ...], folder: Path) -> list[Constants]:
    """From the call of Ray Train to the first step, for some numbers of workers; the slowest rank counts."""
    import ray
    import scale_runtime

    ray.cloudpickle.register_pickle_by_value(scale_runtime)  # workers know nothing of this folder
    began = time.perf_counter()
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="error", num_cpus=max(workers))
    ray_s, found = time.perf_counter() - began, []
    try:
        for count in workers:
            times = folder / f"start{count}"
            times.mkdir()
            own = experiment_from({**TINY, "train": {"epochs": 4, "batch_size": 256}}).override(
                {"ray.num_workers": count}
            )
            told = {"experiment": own.model_dump(mode="json"), "folder": str(times)}
            called = time.time()
            ray_train.trainer(train_start, told, own, f"start{count}", str(folder)).fit()
            ended = time.time()
            marks = [json.loads(file.read_text()) for file in times.iterdir()]
            assert len(marks) == count
            last = {name: max(mark[name] for mark in marks) for name in marks[0]}
            found.append({
                "workers": count, "ray_s": ray_s, "entered_s": last["entered"] - called,
                "data_s": last["data"] - last["entered"], "built_s": last["built"] - last["data"],
                "step_s": last["stepped"] - last["built"], "first_step_s": last["stepped"] - called,
                "end_s": ended - last["stepped"],
            })  # fmt: skip
    finally:
        ray.shutdown()
    return found
