"""Whether a run can be resumed as asked: seen before anything starts, and refused in a line where not."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from rich.console import Console

from amt_ray.address import read_file
from amt_ray.config import ConfigError, Experiment, recorded_yaml
from amt_ray.paths import sqlite_file
from amt_ray.runtime import ledger, tracking
from amt_ray.runtime.storage import StorageError, StoredCheckpoints, joined
from amt_ray.runtime.tracking.opening import FAULTS, short
from amt_ray.runtime.tracking.outbox.sender import answers

CHILDREN = ("trial", "warmup", "retrain")
OPEN = ("RUNNING", "SCHEDULED")


def run_named(run_id: str, uri: str) -> Run:
    """The run that a command names; no store is made to look for it.

    Raises:
        ConfigError: If it is not there, or was deleted.
    """
    file = sqlite_file(uri)
    try:
        if file is not None and not file.is_file():
            raise OSError(f"there is no {file}")
        run = MlflowClient(uri).get_run(run_id)
    except FAULTS as error:
        raise ConfigError(
            f"--run and --resume must name a run of this tracking store, got {run_id} ({short(error)}); "
            "MLFLOW_TRACKING_URI names another."
        ) from error
    if run.info.lifecycle_stage == "deleted":
        raise ConfigError(
            f"--run and --resume must name a run that is not deleted, got {run_id}: restore it with "
            f"MLFLOW_TRACKING_URI={uri} mlflow runs restore --run-id {run_id}."
        )
    return run


def recorded_experiment(experiment_hint: Experiment | None, run_id: str) -> Experiment:
    """The configuration with which a run was started: its artifact, or what the call that created the run carried.

    Its tracking address is the one at which the run was found, wherever the store was when the run was started.

    Raises:
        ConfigError: If there is no such run, or it has no configuration.
    """
    uri = tracking.tracking_uri(experiment_hint)
    run = run_named(run_id, uri)
    try:
        text = tracking.unpacked(run.data.tags) or read_file(MlflowClient(uri), run_id, "config.yaml").decode()
    except (MlflowException, OSError) as error:
        raise ConfigError(
            f"--run and --resume must name a run with its config.yaml, got {run_id} without it ({short(error)}): start "
            "it again from its experiment file."
        ) from error
    experiment = recorded_yaml(text)
    return experiment.override({"tracking.uri": uri}) if experiment.tracking.uri else experiment


def check_kind(run: Run, verb: str) -> None:
    """See that a run is one that the verb resumes.

    Raises:
        ConfigError: With the command that resumes it.
    """
    run_id, kind = run.info.run_id, run.data.tags.get("amt_ray.kind", "none")
    if kind == verb:
        return
    parent = run.data.tags.get("mlflow.parentRunId")
    if kind in ("pretrain", "sweep"):
        how = f"amt-ray {kind} --resume {run_id}"
    elif kind in CHILDREN and parent:
        how = f"amt-ray sweep --resume {parent}, the sweep that it belongs to"
    elif kind == "evaluate":
        how = "the amt-ray evaluate command that started it"
    else:
        raise ConfigError(f"amt-ray {verb} --resume must name a {verb} run of amt-ray, got {run_id}, which is none.")
    raise ConfigError(
        f"amt-ray {verb} --resume must name a {verb} run, got {run_id} of kind {kind}: resume it with {how}."
    )


def finished(run: Run, experiment: Experiment, place: str) -> str | None:
    """What to say of a pretraining of which nothing is left to do; None where something is.

    Raises:
        ConfigError: If the storage cannot be read.
    """
    if run.info.status != "FINISHED":
        return None
    epochs = experiment.train.epochs
    with _readable():
        checkpoints = StoredCheckpoints(place)
        if not checkpoints.place.names():
            lost = f" (its checkpoints are no longer in {place})"
        elif _whole(checkpoints, epochs):
            lost = ""
        else:
            return None
    return f"Run {run.info.run_id} is finished, all {epochs} epochs: nothing to do{lost}."


def _whole(checkpoints: StoredCheckpoints, epoch: int) -> bool:
    """Whether the last checkpoint is there; a file is read to see that, an object store's is not."""
    if "://" in checkpoints.place.uri:
        return any(stored.epoch == epoch for stored in checkpoints.listed())
    try:
        checkpoints.at(epoch)
    except StorageError:
        return False
    return True


def check_checkpoints(client: MlflowClient, run_id: str, place: str, console: Console) -> None:
    """See that a run which has trained finds its checkpoints: without them it would train anew unseen.

    A process that was killed in its first epoch may have recorded that epoch and saved no checkpoint of it.

    Raises:
        ConfigError: If there are none, or the storage cannot be read.
    """
    epochs = _epochs(client, run_id)
    with _readable():
        if not epochs or StoredCheckpoints(place).place.names():
            return
    if epochs > 1 or not ("://" in place or Path(place).parent.is_dir()):
        raise ConfigError(
            f"a run that goes on must find its checkpoints, got none in {place} for run {run_id}, of which MLflow has "
            f"{epochs} epoch{'s' * (epochs > 1)}: put them back there, or start a new run."
        )
    say = f"Run {run_id} was stopped before its first checkpoint: it trains from the start."
    console.print(say, highlight=False, soft_wrap=True)


def check_trials(target: tracking.Target, parent: str, storage: str) -> None:
    """As `check_checkpoints`, of a sweep: where trials are left to go on, some checkpoint of the sweep is there.

    Raises:
        ConfigError: If there is none, or the storage cannot be read.
    """
    runs = [run for kind in ("trial", "warmup") for run in ledger.children(target, parent, kind)]
    trained = [run for run in runs if ledger.LOSS in run.data.metrics]
    with _readable():
        if any(StoredCheckpoints(joined(storage, run.info.run_id)).place.names() for run in trained):
            return
    for run in (run for run in trained if run.info.status != "FINISHED"):
        if (epochs := _epochs(target.client, run.info.run_id)) > 1:
            raise ConfigError(
                f"a sweep that goes on must find its trials' checkpoints, got none in {storage} for sweep {parent}, of "
                f"whose run {run.info.run_id} MLflow has {epochs} epochs: put them back there, or name where they are "
                "with --set ray.storage_path=FOLDER."
            )


def _epochs(client: MlflowClient, run_id: str) -> int:
    return max((point.step for point in client.get_metric_history(run_id, ledger.LOSS)), default=0)


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        raise ConfigError(str(error)) from error


@contextmanager
def children_end(target: tracking.Target, parent: str) -> Iterator[None]:
    """No run of a sweep is RUNNING in MLflow that no process trains: neither at the start, where an earlier driver may
    have been killed, nor when this driver ends, in whatever way. A trial that goes on is RUNNING again."""
    close_children(target, parent)
    try:
        yield
    finally:
        close_children(target, parent)


def close_children(target: tracking.Target, parent: str) -> None:
    """Mark the sweep's open runs as KILLED; where MLflow is away, the next start does it."""
    if not answers(target.uri):
        return
    with suppress(MlflowException, OSError):
        for kind in CHILDREN:
            for run in ledger.children(target, parent, kind):
                if run.info.status in OPEN:
                    tracking.finish(target, run.info.run_id, "KILLED")
