"""One pretraining run, from the driver's side: start or resume it, wait for it, record how it ended."""

from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from ray.train import TrainingFailedError
from rich.console import Console

from amt_ray.address import read_file, to_type
from amt_ray.config import ConfigError, Experiment, recorded_yaml
from amt_ray.core.loop import NotFiniteError
from amt_ray.core.ports import Solo
from amt_ray.runtime import local, ray_train, tracking
from amt_ray.runtime.cluster import concurrent_runs, connected
from amt_ray.runtime.progress import following
from amt_ray.runtime.splits import load_splits
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
    check_inputs(experiment, console)
    target = tracking.prepare(experiment)
    run_id = resume or tracking.start_experiment_run(target, experiment, experiment.name, "pretrain")
    train_run(experiment, target, run_id, console, experiment.name)
    return run_id


def check_inputs(experiment: Experiment, console: Console) -> None:
    """See that checkpoints can be written, read the one to start from if there is one, decode the data set (the workers
    of this node find it done) and say what it is.

    Raises:
        ConfigError: If one of them is not as it must be.
    """
    try:
        StoredCheckpoints(storage_of(experiment)).check()
    except StorageError as error:
        raise ConfigError(str(error)) from error
    if experiment.model.checkpoint:
        local.build_model(experiment)
    with console.status("Decoding images ..."):
        splits = load_splits(experiment)
    local.check_protocols(experiment, splits.task)
    console.print(f"Images: {experiment.data.name}, {splits.summary}", highlight=False, soft_wrap=True)


def train_run(experiment: Experiment, target: tracking.Target, run_id: str, console: Console, title: str) -> None:
    """Train an MLflow run to its end, on Ray's workers or (``ray.num_workers: 0``) here.

    Raises:
        ConfigError: If the cluster is not as the run needs it.
        RunFailedError: If training failed or was stopped.
    """
    storage = storage_of(experiment)
    how = f"Go on with: {to_type(f'amt-ray pretrain --resume {run_id}', experiment)}"
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
    ranks = Solo("cuda" if experiment.ray.use_gpu else "cpu")
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


def recorded_experiment(experiment_hint: Experiment | None, run_id: str) -> Experiment:
    """The configuration with which a run was started, from its artifact.

    Raises:
        ConfigError: If there is no such run, or it has no configuration.
    """
    client = MlflowClient(tracking.tracking_uri(experiment_hint))
    try:
        text = read_file(client, run_id, "config.yaml").decode()
    except (MlflowException, OSError) as error:
        raise ConfigError(
            f"--run and --resume must name a run of this tracking store, got {run_id} ({str(error).splitlines()[0]}); "
            "MLFLOW_TRACKING_URI names another."
        ) from error
    return recorded_yaml(text)
