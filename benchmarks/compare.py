"""Time of `amt-ray compare` on a large sweep: 1,000 runs, each metric with 200 points, in an sqlite store.

    python benchmarks/compare.py [--quick] [--server] [--keep FOLDER] [--json FILE]

The runs are made up (settings, seeds and curves from a formula) and written through MLflow's own tables at once, since
logging them one by one takes an hour. ``--server`` also reads them through an ``mlflow server`` of this machine.
"""

import itertools
import json
import math
import random
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.store.tracking.dbmodels import models
from sqlalchemy import insert

from amt_ray.config import Experiment

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
