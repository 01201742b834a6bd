"""Ray Train: one run on N workers."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import ray.train
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from amt_ray.config import Experiment
from amt_ray.core.loop import NotFiniteError
from amt_ray.core.ports import ProcessGroup, Silent
from amt_ray.runtime import local
from amt_ray.runtime.cluster import worker_resources
from amt_ray.runtime.deadline import StartDeadline
from amt_ray.runtime.lineage import Origin
from amt_ray.runtime.storage import joined
from amt_ray.runtime.tracking import MlflowReporter, Target
from amt_ray.sections import Attention

RESIZE_EVERY_S = 60.0


def report(epoch: int, metrics: Mapping[str, float], uri: str) -> None:
    """Tell Ray Train of an epoch; all ranks meet here. The checkpoint itself is none of Train's concern."""
    ray.train.report({**metrics, "epoch": epoch})


def train_worker(told: dict[str, Any]) -> str | None:
    """One worker's part of a run.

    Returns:
        What is wrong where the loss is not finite. Raised here, it would be tried again on new workers, which would
        only find the same: retries are for machines that fail.
    """
    experiment, target = Experiment.model_validate(told["experiment"]), Target(**told["target"])
    ranks, extra = ProcessGroup(get_device()), {"mlflow_run_id": told["run_id"]}
    forks = told["forks"] and {e: [Attention.model_validate(a) for a in some] for e, some in told["forks"].items()}
    origin = told["origin"] and Origin(**told["origin"])
    reported = False

    def after(epoch: int, metrics: Mapping[str, float], uri: str = "") -> None:
        nonlocal reported
        reported = True
        report(epoch, {**metrics, "run_id": told["run_id"]}, uri)

    with MlflowReporter(target, told["run_id"]) if ranks.rank == 0 else nullcontext(Silent()) as reporter:
        checkpoints = local.stored(experiment, told["place"], ranks, reporter, after, forks)
        try:
            history = local.run(experiment, ranks, reporter, checkpoints, extra, forks, origin)
        except NotFiniteError as error:
            return str(error)
    if history and not reported:  # all was trained before, and whoever waits for a report has not heard of it
        after(max(history), history[max(history)])
    return None


def fit(
    experiment: Experiment,
    target: Target,
    run_id: str,
    storage: str,
    callbacks: Sequence[Any] = (),
    forks: Mapping[int, Sequence[Attention]] | None = None,
    origin: Origin | None = None,
) -> None:
    """Train on ``ray.num_workers`` workers and wait for the end.

    The run's name in the storage is its MLflow id, so the same call after an interruption goes on from its checkpoint.

    Args:
        experiment: What to train.
        target: The tracking store.
        run_id: The MLflow run, also told with every report.
        storage: Place of the experiment's runs, seen by all nodes.
        callbacks: Ray Train callbacks.
        forks: As in `local.run`.
        origin: As in `local.run`.

    Raises:
        ray.train.TrainingFailedError: If the run failed more often than ``ray.max_failures``.
        NotFiniteError: If the loss is not finite.
    """
    told: dict[str, Any] = {
        "experiment": experiment.model_dump(mode="json"),
        "target": asdict(target),
        "run_id": run_id,
        "place": joined(storage, run_id),
        "forks": forks and {e: [a.model_dump(mode="json") for a in some] for e, some in forks.items()},
        "origin": origin and asdict(origin),
    }
    result = trainer(train_worker, told, experiment, run_id, storage, callbacks).fit()
    if result.return_value is not None:
        raise NotFiniteError(result.return_value)


def trainer(
    work: Callable[[dict[str, Any]], Any],
    told: Mapping[str, Any],
    experiment: Experiment,
    run_id: str,
    storage: str,
    callbacks: Sequence[Any] = (),
) -> TorchTrainer:
    """``work(told)`` on each of ``ray.num_workers`` workers, or of fewer where ``ray.min_workers`` allows it.

    Args:
        work: What a worker does.
        told: What it is told, plain values.
        experiment: Workers and restarts.
        run_id: Name in the storage.
        storage: Place that all nodes see; Train's own records go into ``ray_train`` there.
        callbacks: Ray Train callbacks.
    """
    wanted = experiment.ray
    return TorchTrainer(
        work,
        train_loop_config=dict(told),
        torch_config=TorchConfig(backend="nccl" if wanted.on_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(wanted.min_workers, wanted.num_workers) if wanted.min_workers else wanted.num_workers,
            use_gpu=wanted.on_gpu,
            resources_per_worker=worker_resources(experiment),
            elastic_resize_monitor_interval_s=RESIZE_EVERY_S,
        ),
        run_config=RunConfig(
            name=run_id,
            storage_path=joined(storage, "ray_train"),
            failure_config=FailureConfig(max_failures=wanted.max_failures),
            logging_config=LoggingConfig("ERROR"),
            callbacks=[*callbacks, StartDeadline(experiment)],
        ),
    )
