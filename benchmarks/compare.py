"""Time of `amt-ray compare` on a large sweep: 1,000 runs, each of six metrics with 200 points.

    python benchmarks/compare.py [--quick] [--server] [--json FILE]

The runs are made up (settings, seeds and curves from a formula) and written into MLflow's tables directly. The whole
command is timed in a process of its own; reading is timed apart, against MLflow's client asked for one run at a time.
``--server`` reads through an ``mlflow server`` of this machine as well; ``--quick`` takes 200 runs.
"""

import argparse
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.store.tracking.dbmodels import models
from serving import mlflow_server
from sqlalchemy import insert

from amt_ray.config import Experiment
from amt_ray.report.history import read_histories
from amt_ray.report.runs import DEFAULT_METRIC, LOSS
from amt_ray.report.store import Wanted, find

RATIOS = tuple(round(0.1 * tenth, 1) for tenth in range(1, 10))
LAYERS = ("-1", "-2", "-4", "rollout")
METRICS = ("train/loss", "train/lr", "eval/knn_top1", "perf/images_per_s", "perf/epoch_s", "perf/train_s")
MASK, THROW, LAYER = "masking.mask_ratio", "masking.throw_ratio", "attention.layers"
SEARCHED = (MASK, THROW, LAYER, "optim.base_lr")
SEEDS = 5
BATCH = 50
START_MS = 1_700_000_000_000


def settings(runs: int) -> Iterator[dict[str, str]]:
    """Params of each trial: every feasible point with five seeds, as many as asked."""
    base = {key: "" if value is None else str(value) for key, value in Experiment().dotted().items()}
    grid = itertools.product(("0.00015", "0.0003"), LAYERS, RATIOS, RATIOS)
    points = [p for p in grid if p[2] + p[3] < 0.99]
    random.Random(0).shuffle(points)
    for (rate, layers, mask, throw), seed in itertools.islice(itertools.product(points, range(SEEDS)), runs):
        chosen = (str(mask), str(throw), layers, rate)
        yield base | dict(zip(SEARCHED, chosen)) | {"seed": str(seed), "train.epochs": "200"}


def values(params: dict[str, str], epoch: int, epochs: int, chance: random.Random) -> dict[str, float]:
    """Metrics of an epoch: the probe is best at 0.5 + 0.3 and at the layers before the last."""
    mask, throw = float(params[MASK]), float(params[THROW])
    top = 0.5 - 0.4 * (mask - 0.5) ** 2 - 0.3 * (throw - 0.3) ** 2 + 0.02 * (params[LAYER] == "-2")
    seconds = 10.0 * (1.3 - throw)
    measured = top * (1 - math.exp(-4 * epoch / epochs)) + chance.gauss(0, 0.004)
    found = (1 / (1 + epoch / 20), 1e-4, measured, 50_000 / seconds, seconds, seconds * epoch)
    return dict(zip(METRICS, found, strict=True))


def write_store(uri: str, folder: Path, runs: int, epochs: int) -> str:
    """A sweep of so many trials; the first point is the baseline. Returns the parent's id."""
    client = MlflowClient(uri)
    experiment = client.create_experiment("large", artifact_location=(folder / "artifacts").as_uri())
    parent = client.create_run(experiment, start_time=START_MS, run_name="large sweep").info.run_id
    for key, value in {"amt_ray.kind": "sweep", "amt_ray.searched": json.dumps(SEARCHED)}.items():
        client.set_tag(parent, key, value)
    client.log_param(parent, "sweep.metric", "eval/knn_top1")
    chance = random.Random(0)
    store = client._tracking_client.store
    trials = list(settings(runs))
    for first in range(0, runs, BATCH):
        tables: dict[Any, list[dict[str, Any]]] = {}
        for number, params in enumerate(trials[first : first + BATCH], first):
            fill(tables, experiment, parent, folder, number, params, epochs, chance)
        with store.ManagedSessionMaker(read_only=False) as session:
            for table, rows in tables.items():
                session.execute(insert(table), rows)
    return str(parent)


def fill(
    tables: dict[Any, list[dict[str, Any]]],
    experiment: str,
    parent: str,
    folder: Path,
    number: int,
    params: dict[str, str],
    epochs: int,
    chance: random.Random,
) -> None:
    """Add one run's rows to each of MLflow's tables."""
    run, began = uuid.UUID(int=chance.getrandbits(128)).hex, START_MS + 1000 * number
    name = f"amt mask_ratio={params[MASK]} throw_ratio={params[THROW]} layers={params[LAYER]} seed={params['seed']}"
    about = {
        "mlflow.parentRunId": parent,
        "amt_ray.kind": "trial",
        "amt_ray.point": str(number),
        "mlflow.runName": name,
    }
    about |= {f"version.{package}": "1.0" for package in ("torch", "torchvision", "timm", "ray", "mlflow", "amt_ray")}
    about |= {"amt_ray.baseline": "true"} if number < SEEDS else {}
    artifacts = folder / "artifacts" / run / "artifacts"
    artifacts.mkdir(parents=True)
    (artifacts / "environment.txt").write_text("".join(f"package-{i}==1.{i}\n" for i in range(150)))
    info = {"run_uuid": run, "name": name, "user_id": "", "status": "FINISHED", "start_time": began}
    info |= {"end_time": began + 900, "lifecycle_stage": "active", "source_name": "", "entry_point_name": ""}
    info |= {"source_version": "", "artifact_uri": artifacts.as_uri(), "experiment_id": int(experiment)}
    points = [
        {"run_uuid": run, "key": key, "value": value, "step": epoch, "timestamp": began + epoch, "is_nan": False}
        for epoch in range(1, epochs + 1)
        for key, value in values(params, epoch, epochs, chance).items()
    ]
    for table, rows in (
        (models.SqlRun, [info]),
        (models.SqlParam, [{"run_uuid": run, "key": key, "value": value} for key, value in params.items()]),
        (models.SqlTag, [{"run_uuid": run, "key": key, "value": value} for key, value in about.items()]),
        (models.SqlMetric, points),
        (models.SqlLatestMetric, points[-len(METRICS) :]),
    ):
        tables.setdefault(table, []).extend(rows)


Timed = dict[str, float | str]


def timed(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Medians of seconds, and of processor seconds of this process."""
    wall, cpu = [], []
    for _ in range(repeats):
        began, worked = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - worked)
    return statistics.median(wall), statistics.median(cpu)


def command(uri: str, out: Path, repeats: int) -> tuple[float, float]:
    """Medians of seconds and processor seconds of the whole command, imports and all."""
    words = [sys.executable, "-m", "amt_ray.cli", "compare", "--out", str(out)]
    wall, cpu = [], []
    for _ in range(repeats):
        began, worked = time.perf_counter(), os.times()
        subprocess.run(words, env={**os.environ, "MLFLOW_TRACKING_URI": uri}, check=True, stdout=subprocess.DEVNULL)
        wall.append(time.perf_counter() - began)
        ended = os.times()
        cpu.append(ended.children_user + ended.children_system - worked.children_user - worked.children_system)
    return statistics.median(wall), statistics.median(cpu)


def measure(store: str, uri: str, folder: Path, repeats: int) -> list[Timed]:
    """Rows of one store."""
    client = MlflowClient(uri)
    runs = [run.run_id for run in find(client, Wanted()).runs]
    wanted = {LOSS: runs, DEFAULT_METRIC: runs}

    def one_by_one() -> None:
        for key, run_ids in wanted.items():
            for run_id in run_ids:
                client.get_metric_history(run_id, key)

    rows: list[Timed] = []
    for name, (wall, cpu) in (
        ("the whole command", command(uri, folder / "report.html", repeats)),
        ("finding the runs", timed(lambda: find(client, Wanted()), repeats)),
        ("two curves of each run", timed(lambda: read_histories(client, wanted), repeats)),
        ("the same, one run at a time", timed(one_by_one, 1)),
    ):
        rows.append({"store": store, "what": name, "seconds": wall, "processor_s": cpu})
    return rows


def main() -> None:
    """Write the store, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--server", action="store_true")
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    runs = 200 if told.quick else 1000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        write_store(uri, folder, runs, 200)
        rows = measure("sqlite", uri, folder, 3)
        size = (folder / "report.html").stat().st_size
        if told.server:
            server, address = mlflow_server(folder, "mlflow.db")
            try:
                rows += measure("server", address, folder, 1)
            finally:
                os.killpg(server.pid, 15)
                server.wait()
    print(f"{runs} runs, 200 points of each of {len(METRICS)} metrics; a page of {size / 1e6:.1f} MB")
    print(f"{'store':9}{'what':30}{'seconds':>9}{'processor s':>13}")
    for row in rows:
        print(f"{row['store']:9}{row['what']:30}{row['seconds']:9.2f}{row['processor_s']:13.2f}")
    if told.json:
        told.json.write_text(json.dumps({"rows": rows, "page_bytes": size}, indent=2))


if __name__ == "__main__":
    main()
