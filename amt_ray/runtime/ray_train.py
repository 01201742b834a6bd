"""Ray Train: one run on N workers."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.train
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from amt_ray.config import Experiment
from amt_ray.core.ports import ProcessGroup, Silent
from amt_ray.runtime import local
from amt_ray.runtime.cluster import worker_resources
from amt_ray.runtime.deadline import StartDeadline
from amt_ray.runtime.tracking import MlflowReporter, Target


class TrainCheckpoints:
    """Checkpoints reported to Ray Train, which stores them and hands the newest to a restarted worker."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._unpacked: tempfile.TemporaryDirectory[str] | None = None

    def latest(self) -> Path | None:
        """The newest registered checkpoint, copied to this node."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        self._unpacked = tempfile.TemporaryDirectory()
        return Path(checkpoint.to_directory(self._unpacked.name))

    def save(self, epoch: int, metrics: Mapping[str, float], write: Callable[[Path], None]) -> None:
        """Report the epoch; all ranks meet here."""
        with tempfile.TemporaryDirectory() as folder:
            if self.rank == 0:
                write(Path(folder))
            checkpoint = Checkpoint.from_directory(folder) if self.rank == 0 else None
            ray.train.report(dict(metrics), checkpoint=checkpoint, checkpoint_dir_name=f"epoch_{epoch:05d}")


def train_worker(told: dict[str, Any]) -> None:
    """One worker's part of a run."""
    experiment, target = Experiment.model_validate(told["experiment"]), Target(**told["target"])
    ranks = ProcessGroup(get_device())
    extra = {"mlflow_run_id": told["run_id"]}
    with MlflowReporter(target, told["run_id"]) if ranks.rank == 0 else nullcontext(Silent()) as reporter:
        local.run(experiment, ranks, reporter, TrainCheckpoints(ranks.rank), extra)


def fit(
    experiment: Experiment, target: Target, run_id: str, storage: Path | str, callbacks: Sequence[Any] = ()
) -> str | None:
    """Train on ``ray.num_workers`` workers and wait for the end.

    The run's name in the storage is its MLflow id, so the same call after an interruption goes on from its checkpoint.

    Args:
        experiment: What to train.
        target: The tracking store.
        run_id: The MLflow run.
        storage: Folder that all nodes share.
        callbacks: Ray Train callbacks.

    Returns:
        Path of the last checkpoint.

    Raises:
        ray.train.TrainingFailedError: If the run failed more often than ``ray.max_failures``.
    """
    told = {"experiment": experiment.model_dump(mode="json"), "target": asdict(target), "run_id": run_id}
    checkpoint = trainer(train_worker, told, experiment, run_id, storage, callbacks).fit().checkpoint
    return checkpoint.path if checkpoint else None


def trainer(
    work: Callable[[dict[str, Any]], Any],
    told: Mapping[str, Any],
    experiment: Experiment,
    run_id: str,
    storage: Path | str,
    callbacks: Sequence[Any] = (),
) -> TorchTrainer:
    """``work(told)`` on each of ``ray.num_workers`` workers.

    Args:
        work: What a worker does.
        told: What it is told, plain values.
        experiment: Workers and restarts.
        run_id: Name in the storage.
        storage: Folder that all nodes share.
        callbacks: Ray Train callbacks.
    """
    wanted = experiment.ray
    return TorchTrainer(
        work,
        train_loop_config=dict(told),
        torch_config=TorchConfig(backend="nccl" if wanted.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=wanted.num_workers, use_gpu=wanted.use_gpu, resources_per_worker=worker_resources(experiment)
        ),
        run_config=RunConfig(
            name=run_id,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=wanted.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=experiment.train.keep_checkpoints),
            logging_config=LoggingConfig("ERROR"),
            callbacks=[*callbacks, StartDeadline(experiment)],
        ),
    )
