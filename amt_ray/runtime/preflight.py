"""Whatever must hold before a run is made: the same for a start and for ``amt-ray validate``."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.db.db_types import DATABASE_ENGINES
from rich.console import Console
from sqlalchemy import create_engine, make_url
from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError

from amt_ray.address import tracking_uri
from amt_ray.config import ConfigError, Experiment
from amt_ray.runtime import local
from amt_ray.runtime.cluster import check_machine, cluster_address, concurrent_runs, connected, runs_on_ray
from amt_ray.runtime.splits import Splits, load_splits
from amt_ray.runtime.storage import StorageError, StoredCheckpoints
from amt_ray.space import sweep_points
from amt_ray.trials import trial_experiment

INPUTS = ("data", "model", "eval")  # the sections that say what is read


def check(experiment: Experiment, console: Console, elsewhere: bool = False, test: bool = True) -> Splits | None:
    """See that a start would find all that it needs, and say which images there are; nothing is started or kept, but
    images are decoded, which the workers of this machine find done.

    Args:
        experiment: A pretraining, or a sweep where it has a ``sweep`` section.
        console: Where it is said.
        elsewhere: The work goes to other machines: then a line says what was not checked on this one.
        test: Whether the test split is measured.

    Returns:
        The images; None if elsewhere.

    Raises:
        ConfigError: If one thing is not as it must be.
    """
    kinds = list(_kinds(experiment))
    for own in kinds:
        _ = own.course.plans  # of every epoch
    if elsewhere:
        say = "Not checked here, since the work goes elsewhere: GPUs and CPU cores, data.root, ray.storage_path, "
        console.print(f"{say}model.checkpoint, and the tracking store with its driver", highlight=False, soft_wrap=True)
        return None
    _check_workers(experiment, console)
    check_store(tracking_uri(experiment))
    _check_storage(experiment)
    splits = [check_inputs(own, console, test) for own in kinds]
    return splits[0]


def check_inputs(experiment: Experiment, console: Console, test: bool = True) -> Splits:
    """Read the checkpoint to start from if there is one, decode the data set, look at it as the probes do, and say what
    it is.

    Raises:
        ConfigError: If one of them is not as it must be.
    """
    if experiment.model.checkpoint and (note := local.checkpoint_note(experiment)):
        console.print(note, highlight=False, soft_wrap=True)
    with console.status("Decoding images ..."):
        splits = load_splits(experiment)
    local.check_protocols(experiment, splits.task)
    for line in [*splits.lines(test), *local.figures_left_out(experiment, splits.task, test)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return splits


def _kinds(experiment: Experiment) -> Iterator[Experiment]:
    """The experiment, and those trials of a sweep that read something else."""
    yield experiment
    if experiment.sweep is None:
        return
    points = sweep_points(experiment)
    seen = {_inputs(experiment)}
    for point in (*points.baselines, *points.listed, experiment.sweep.retrain_best or {}):
        if any(key.partition(".")[0] in INPUTS for key in point):
            own = trial_experiment(experiment, point)
            if _inputs(own) not in seen:
                seen.add(_inputs(own))
                yield own


def _inputs(experiment: Experiment) -> str:
    return experiment.model_dump_json(include=set(INPUTS))


def _check_workers(experiment: Experiment, console: Console) -> None:
    """On this machine by what it has; on a cluster, which may have to start nodes, by asking for the workers."""
    if runs_on_ray(experiment) and cluster_address(experiment) is not None:
        with connected(experiment):
            concurrent_runs(experiment, console)
        return
    check_machine(experiment)
    again = (experiment.sweep and experiment.sweep.retrain_best) or {}
    if asked := {key: value for key, value in again.items() if key.startswith("ray.")}:
        check_machine(experiment.override(asked))


def _check_storage(experiment: Experiment) -> None:
    """Write and remove a probe, and the folders that were made for it."""
    from amt_ray.runtime.pretrain import storage_of  # which starts what is checked here

    place = storage_of(experiment)
    folder = Path(place)
    made = [] if "://" in place else [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        StoredCheckpoints(place).check()
    except StorageError as error:
        raise ConfigError(str(error)) from error
    for path in made:
        with suppress(OSError):
            path.rmdir()


def check_store(uri: str) -> None:
    """See that the tracking store can be opened; nothing is made in it.

    Raises:
        ConfigError: If it does not answer, or its database has no driver here.
    """
    try:
        if uri.startswith(("http://", "https://")):
            MlflowClient(uri).search_experiments(max_results=1)
        elif uri.partition(":")[0].partition("+")[0] in DATABASE_ENGINES:
            _check_database(uri)
    except MlflowException as error:
        raise ConfigError(f"the MLflow tracking store must be reachable, got {uri} ({_line(error)}).") from error


def _check_database(uri: str) -> None:
    url = uri
    try:
        parts = make_url(uri)
        url = parts.render_as_string(hide_password=True)
        engine = create_engine(parts)
        if parts.get_backend_name() == "sqlite" and not Path(parts.database or "").exists():
            folder = Path(parts.database or "").absolute().parent
            if not folder.is_dir():
                raise ConfigError(f"the folder of the MLflow tracking store must exist, got {folder}.")
            return
        engine.connect().close()
    except (ImportError, NoSuchModuleError) as error:
        raise ConfigError(
            f"the driver of the tracking store's database must be installed, got {url} ({_line(error)})."
        ) from error
    except (SQLAlchemyError, OSError) as error:
        raise ConfigError(f"the MLflow tracking store must be reachable, got {url} ({_line(error)}).") from error


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
