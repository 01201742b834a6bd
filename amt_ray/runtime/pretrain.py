"""One pretraining run, from the driver's side: start or resume it, wait for it, record how it ended."""

from pathlib import Path

from mlflow import MlflowClient
from ray.train import TrainingFailedError
from rich.console import Console

from amt_ray.address import to_type
from amt_ray.config import Experiment, located
from amt_ray.core.loop import NotFiniteError
from amt_ray.core.ports import Solo
from amt_ray.phases import check_acts, warnings_of
from amt_ray.runtime import local, ray_train, resuming, tracking
from amt_ray.runtime.cluster import concurrent_runs, connected
from amt_ray.runtime.preflight import check
from amt_ray.runtime.progress import following
from amt_ray.runtime.resolve import resolved
from amt_ray.runtime.resuming import recorded_experiment as recorded_experiment
from amt_ray.runtime.storage import StorageError, StoredCheckpoints, joined


class RunFailedError(RuntimeError):
    """A run ended without its result; the message says how to go on."""


def storage_of(experiment: Experiment) -> str:
    """Absolute place of the experiment's runs, each of which has its checkpoints in a folder of its id."""
    path = experiment.ray.storage_path
    return joined(path if "://" in path else str(Path(path).expanduser().resolve()), experiment.name)


def pretrain(experiment: Experiment, console: Console, resume: str | None = None) -> str:
    """Run or resume a pretraining.

    Args:
        experiment: What to train; ignored where ``resume`` names a run, which brings its own.
        console: Where progress is shown.
        resume: MLflow id of an interrupted run.

    Returns:
        The MLflow run id.

    Raises:
        ConfigError: If the images, the tracking store or the cluster are not as the run needs them.
        RunFailedError: If training failed; its last whole checkpoint is kept.
    """
    experiment = located(experiment, find_data=resume is None)
    if resume and (nothing_left := _resumed(experiment, console, resume)):
        console.print(nothing_left, highlight=False, soft_wrap=True)
        return resume
    if resume is None:
        check_acts(experiment)
    experiment = resolved(experiment, console)
    splits = check(experiment.model_copy(update={"sweep": None}), console)
    for line in warnings_of(experiment, len(splits.index) if splits else None):
        console.print(line, highlight=False, soft_wrap=True)
    target = tracking.prepare(experiment)
    if resume:
        tracking.complete(target, resume, experiment, experiment.dotted())
    run_id = resume or tracking.start_experiment_run(target, experiment, experiment.name, "pretrain")
    train_run(experiment, target, run_id, console, experiment.name)
    return run_id


def _resumed(experiment: Experiment, console: Console, run_id: str) -> str | None:
    """See that the run can be resumed; what to say where nothing of it is left to do."""
    uri, place = tracking.tracking_uri(experiment), joined(storage_of(experiment), run_id)
    run = resuming.run_named(run_id, uri)
    resuming.check_kind(run, "pretrain")
    if nothing_left := resuming.finished(run, experiment, place):
        return nothing_left
    resuming.check_checkpoints(MlflowClient(uri), run_id, place, console)
    return None


def train_run(
    experiment: Experiment,
    target: tracking.Target,
    run_id: str,
    console: Console,
    title: str,
    command: str = "amt-ray pretrain --resume {run_id}",
) -> None:
    """Train an MLflow run to its end, on Ray's workers or (``ray.num_workers: 0``) here.

    ``command`` resumes it, as a stopped run says.

    Raises:
        ConfigError: If the cluster is not as the run needs it.
        RunFailedError: If training failed or was stopped.
    """
    storage = storage_of(experiment)
    how = f"Go on with: {to_type(command.format(run_id=run_id), experiment)}"
    try:
        with tracking.run_status(target, run_id, _reason):
            with following(console, target, run_id, title, experiment.train.epochs):
                if experiment.ray.num_workers == 0:
                    _here(experiment, target, run_id, joined(storage, run_id))
                else:
                    with connected(experiment):
                        concurrent_runs(experiment, console)
                        ray_train.fit(experiment, target, run_id, storage)
            tracking.note_checkpoint(target, run_id, StoredCheckpoints(joined(storage, run_id)).listed()[-1].uri)
    except (KeyboardInterrupt, SystemExit):  # Ray Train turns Ctrl-C into an exit
        raise RunFailedError(f"Stopped. {how}") from None
    except (TrainingFailedError, NotFiniteError, StorageError) as error:
        raise RunFailedError(f"{_reason(error)} {how}") from error


def _here(experiment: Experiment, target: tracking.Target, run_id: str, place: str) -> None:
    ranks = Solo("cuda" if experiment.ray.on_gpu else "cpu")
    with tracking.MlflowReporter(target, run_id) as reporter:
        checkpoints = local.stored(experiment, place, ranks, reporter)
        local.run(experiment, ranks, reporter, checkpoints, {"mlflow_run_id": run_id})


def _reason(error: BaseException) -> str:
    """The innermost line that says what went wrong."""
    failures = getattr(error, "worker_failures", None) or {}
    cause = next(iter(failures.values()), error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    return last.rpartition("Error: ")[2]
