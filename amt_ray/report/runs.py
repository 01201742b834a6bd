"""What the report knows of a run, read from MLflow. Nothing here ranks or draws."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException

DEFAULT_METRIC = "eval/knn_top1"
LOSS = "train/loss"
TRAIN_SECONDS = "perf/train_s"
IMAGES_PER_S = "perf/images_per_s"
COMPARED_KINDS = ("trial", "retrain", "pretrain")

History = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        run_id: MLflow id.
        name: The name shown; not unique.
        kind: ``trial``, ``retrain`` or ``pretrain``.
        status: MLflow status, e.g. ``FINISHED``.
        params: Dotted config keys to values as strings.
        tags: MLflow tags.
        metrics: The last value of every metric, finite or not.
        history: Curves of the plotted metrics: pairs (epochs completed, finite value), by rising epoch.
    """

    run_id: str
    name: str
    kind: str
    status: str
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    history: Mapping[str, History] = field(default_factory=dict)

    @property
    def baseline(self) -> bool:
        """Whether the sweep added this run as the reference."""
        return self.tags.get("amt_ray.baseline", "").lower() == "true"

    @property
    def stopped_early(self) -> str | None:
        """Who stopped the trial and when, e.g. ``asha at epoch 4``."""
        return self.tags.get("amt_ray.stopped_early")

    @property
    def epochs(self) -> int | None:
        """Epochs completed, as far as the curves tell."""
        return max((curve[-1][0] for curve in self.history.values() if curve), default=None)

    def metric(self, key: str) -> float | None:
        """Last value of a metric, ``None`` where it is missing or not finite."""
        value = self.metrics.get(key)
        return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Source:
    """The runs to compare and by what.

    Attributes:
        title: What the page is about, e.g. ``Sweep digits_search``.
        experiment: Name of the MLflow experiment.
        runs: Every run compared, in order of start; sweep parents are left out.
        metric: Key of the objective.
        maximize: Whether a larger objective is better.
        searched: Dotted config keys that were searched.
        sweep: The parent run, where one sweep is compared.
    """

    title: str
    experiment: str
    runs: tuple[Run, ...]
    metric: str = DEFAULT_METRIC
    maximize: bool = True
    searched: tuple[str, ...] = ()
    sweep: Run | None = None

    @property
    def test_metric(self) -> str:
        """The same of the test split."""
        return self.metric.replace("eval/", "test/", 1)


def read_sweep(client: MlflowClient, run_id: str) -> Source:
    """Reads a sweep and its trials.

    Raises:
        ValueError: The run is unknown, is not a sweep, or has no trials yet.
    """
    try:
        parent = client.get_run(run_id)
    except MlflowException as error:
        raise ValueError(
            f"the sweep must be a run of this tracking store, got {run_id}; {_known_sweeps(client)}"
        ) from error
    kind = parent.data.tags.get("amt_ray.kind")
    if kind != "sweep":
        raise ValueError(f"the run must be a sweep, got {run_id} of kind {kind}; {_known_sweeps(client)}")
    children = _search(client, [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    experiment = client.get_experiment(parent.info.experiment_id).name
    return _source(client, f"Sweep {_name(parent)}", experiment, children, [parent], parent)


def read_experiment(client: MlflowClient, name: str) -> Source:
    """Reads every run of an experiment, whichever sweeps they belong to.

    Raises:
        ValueError: The experiment is unknown or holds no runs.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        known = ", ".join(sorted(e.name for e in client.search_experiments())) or "none"
        raise ValueError(f"the experiment must be one of the tracking store, got {name}; known: {known}.")
    found = _search(client, [experiment.experiment_id], "")
    sweeps = [run for run in found if run.data.tags.get("amt_ray.kind") == "sweep"]
    return _source(client, f"Experiment {name}", name, found, sweeps, None)


def newest_sweep(client: MlflowClient) -> str:
    """Run id of the sweep that started last.

    Raises:
        ValueError: The tracking store holds no sweep.
    """
    sweeps = _sweeps(client)
    if not sweeps:
        known = ", ".join(sorted(e.name for e in client.search_experiments())) or "none"
        raise ValueError(
            f"the tracking store must hold a sweep, or --experiment be given, got neither; experiments: {known}."
        )
    return str(sweeps[-1].info.run_id)


def _source(
    client: MlflowClient,
    title: str,
    experiment: str,
    found: list[MlflowRun],
    sweeps: list[MlflowRun],
    parent: MlflowRun | None,
) -> Source:
    """``sweeps`` say by what to compare: the newest gives the metric, all of them the searched keys."""
    compared = [run for run in found if run.data.tags.get("amt_ray.kind") in COMPARED_KINDS]
    if not compared:
        raise ValueError(f"{title} must hold at least one trial or pretraining run, got none.")
    settings = sweeps[-1].data.params if sweeps else {}
    metric = settings.get("sweep.metric", DEFAULT_METRIC)
    searched = dict.fromkeys(key for sweep in reversed(sweeps) for key in _searched(sweep))
    return Source(
        title=title,
        experiment=experiment,
        runs=tuple(_run(client, run, (metric, LOSS)) for run in compared),
        metric=metric,
        maximize=settings.get("sweep.mode", "max") != "min",
        searched=tuple(searched),
        sweep=_run(client, parent, ()) if parent else None,
    )


def _search(client: MlflowClient, experiment_ids: list[str], query: str) -> list[MlflowRun]:
    """All pages of a search, oldest run first."""
    found: list[MlflowRun] = []
    token = None
    while True:
        page = client.search_runs(
            experiment_ids, query, ViewType.ACTIVE_ONLY, 1000, order_by=["attributes.start_time ASC"], page_token=token
        )
        found.extend(page)
        token = page.token
        if not token:
            return found


def _sweeps(client: MlflowClient) -> list[MlflowRun]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return _search(client, experiments, "tags.`amt_ray.kind` = 'sweep'")


def _known_sweeps(client: MlflowClient) -> str:
    names = [f"{run.info.run_id} ({_name(run)})" for run in _sweeps(client)[-5:]]
    return f"the newest sweeps: {', '.join(names) or 'none'}."


def _name(run: MlflowRun) -> str:
    return str(run.info.run_name or run.info.run_id)


def _searched(sweep: MlflowRun) -> list[str]:
    try:
        return [str(key) for key in json.loads(sweep.data.tags.get("amt_ray.searched", "[]"))]
    except ValueError:
        return []


def _run(client: MlflowClient, run: MlflowRun, curves: tuple[str, ...]) -> Run:
    tags = dict(run.data.tags)
    return Run(
        run_id=run.info.run_id,
        name=_name(run),
        kind=tags.get("amt_ray.kind", ""),
        status=run.info.status,
        params=dict(run.data.params),
        tags=tags,
        metrics=dict(run.data.metrics),
        history={key: _curve(client, run.info.run_id, key) for key in curves if key in run.data.metrics},
    )


def _curve(client: MlflowClient, run_id: str, key: str) -> History:
    """A resumed run logs some epochs twice: the later value counts."""
    logged = sorted(client.get_metric_history(run_id, key), key=lambda point: (point.step, point.timestamp))
    return tuple({point.step: point.value for point in logged if math.isfinite(point.value)}.items())
