"""MLflow: the runs of an experiment, and the reporter that writes to one of them."""

import importlib.metadata
import json
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from amt_ray.config import ConfigError, Experiment

logging.getLogger("alembic").setLevel(logging.ERROR)
logging.getLogger("mlflow").setLevel(logging.ERROR)

PACKAGES = ("amt-ray", "torch", "torchvision", "timm", "ray", "mlflow")
PARAMS_A_CALL = 100


def tracking_uri(experiment: Experiment | None = None) -> str:
    """The configured address, else ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the working directory."""
    configured = experiment.tracking.uri if experiment else None
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


@dataclass(frozen=True)
class Target:
    """Where runs are written: made once by the driver, handed to every process."""

    uri: str
    experiment_id: str

    @property
    def client(self) -> MlflowClient:
        """A client of the tracking store."""
        return MlflowClient(self.uri)


def prepare(experiment: Experiment) -> Target:
    """Create the tracking store's schema and the experiment, before any worker could race for it.

    Raises:
        ConfigError: If the store cannot be reached or opened.
    """
    uri, name = tracking_uri(experiment), experiment.tracking.experiment or experiment.name
    try:
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        if found is not None:
            return Target(uri, found.experiment_id)
        # workers run in other folders, so a store without a server needs an absolute place for artifacts
        location = None if uri.startswith("http") else (Path.cwd() / "mlartifacts" / name).as_uri()
        return Target(uri, client.create_experiment(name, artifact_location=location))
    except (MlflowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the MLflow tracking store must be reachable, got {uri} ({reason}).") from error


def start_run(
    target: Target, name: str, kind: str, params: Mapping[str, Any], tags: Mapping[str, str], parent: str | None = None
) -> str:
    """Create a run with its params and tags; returns its id."""
    all_tags = {"amt_ray.kind": kind, "mlflow.source.name": "amt-ray", **environment_tags(), **tags}
    if parent:
        all_tags["mlflow.parentRunId"] = parent
    run_id: str = target.client.create_run(target.experiment_id, run_name=name, tags=all_tags).info.run_id
    entries = [Param(key, "" if value is None else str(value)) for key, value in params.items()]
    for start in range(0, len(entries), PARAMS_A_CALL):
        target.client.log_batch(run_id, params=entries[start : start + PARAMS_A_CALL])
    return run_id


def start_experiment_run(
    target: Target,
    experiment: Experiment,
    name: str,
    kind: str,
    tags: Mapping[str, str] | None = None,
    parent: str | None = None,
) -> str:
    """A run that trains ``experiment``: its dotted keys as params, its resolved YAML as an artifact."""
    about = {"method": experiment.model.method, "strategy": experiment.masking.strategy, **(tags or {})}
    run_id = start_run(target, name, kind, experiment.dotted(), about, parent)
    log_text(target, run_id, "config.yaml", experiment.to_yaml())
    return run_id


def child_run(target: Target, experiment: Experiment, name: str, parent: str, point: int, baseline: bool) -> str:
    """The run of a sweep's point: found again after a retry or a resumed sweep, else created."""
    query = f"tags.`mlflow.parentRunId` = '{parent}' and tags.`amt_ray.point` = '{point}'"
    if found := target.client.search_runs([target.experiment_id], query):
        run_id: str = found[0].info.run_id
        target.client.update_run(run_id, status="RUNNING")
        return run_id
    tags = {"amt_ray.point": str(point)} | ({"amt_ray.baseline": "true"} if baseline else {})
    return start_experiment_run(target, experiment, name, "trial", tags, parent)


def log_text(target: Target, run_id: str, name: str, text: str) -> None:
    """Keep a text as an artifact."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / Path(name).name
        file.write_text(text)
        target.client.log_artifact(run_id, str(file), str(Path(name).parent) if "/" in name else None)


def environment_tags() -> dict[str, str]:
    """The git commit of the working directory, and the versions of the packages that matter."""
    tags = {f"version.{name.replace('-', '_')}": importlib.metadata.version(name) for name in PACKAGES}
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return tags
    if commit.returncode == 0:
        tags["git.commit"] = commit.stdout.strip() + ("+changes" if changed.stdout.strip() else "")
    return tags


class MlflowReporter:
    """Writes one run's metrics, an epoch a call; epochs already there are left alone, so a restart doubles nothing.

    Args:
        target: The tracking store.
        run_id: The run.
    """

    def __init__(self, target: Target, run_id: str) -> None:
        self.target, self.run_id, self.client = target, run_id, target.client
        history = self.client.get_metric_history(run_id, "train/loss")
        self.last_epoch = max((point.step for point in history), default=0)

    def metrics(self, values: Mapping[str, float], epoch: int) -> None:
        """One batch an epoch: all of its values or none."""
        if epoch <= self.last_epoch:
            return
        now = int(time.time() * 1000)
        self.client.log_batch(self.run_id, metrics=[Metric(key, value, now, epoch) for key, value in values.items()])
        self.last_epoch = epoch

    def progress(self, epoch: int, share: float) -> None:
        """The position within the epoch, as a tag (it has no history to keep)."""
        self.client.set_tag(self.run_id, "amt_ray.progress", f"{epoch + share:.3f}")

    def image(self, name: str, png: bytes) -> None:
        """Keep a picture as an artifact."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / Path(name).name
            file.write_bytes(png)
            self.client.log_artifact(self.run_id, str(file), str(Path(name).parent))


def finish(target: Target, run_id: str, status: str, tags: Mapping[str, str] | None = None) -> None:
    """End a run that has not ended yet."""
    client = target.client
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in (tags or {}).items()])
    if client.get_run(run_id).info.status not in ("FINISHED", "FAILED") or status == "FINISHED":
        client.set_terminated(run_id, status)


def note_checkpoint(target: Target, run_id: str, path: str) -> None:
    """Record where a run's final checkpoint is."""
    log_text(target, run_id, "checkpoint.json", json.dumps({"path": path}, indent=2))
    target.client.set_tag(run_id, "amt_ray.checkpoint", path)
