"""Reads what is to be compared from MLflow: a sweep, an experiment, or what a filter finds."""

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException

from amt_ray.report.history import read_histories, read_peaks
from amt_ray.report.runs import COMPARED_KINDS, DEFAULT_METRIC, GPU_MEMORY, HOST_MEMORY, LOSS, Run, Source

PAGE = 1000
NAMES_SHOWN = 10  # in a message about an unknown name


@dataclass(frozen=True)
class Wanted:
    """What is to be compared; with nothing given, the newest sweep.

    Attributes:
        sweep: Run id of a sweep.
        experiment: Name of an experiment.
        filter: MLflow's filter string, over the experiment or over all.
        metric: Compared by this instead of the sweep's metric.

    Raises:
        ValueError: A sweep is given together with an experiment or a filter.
    """

    sweep: str | None = None
    experiment: str | None = None
    filter: str | None = None
    metric: str | None = None

    def __post_init__(self) -> None:
        if self.sweep and (self.experiment or self.filter):
            other = f"--experiment {self.experiment}" if self.experiment else f"--filter {self.filter}"
            raise ValueError(
                f"only one of --sweep and --experiment or --filter may be given, got {self.sweep} and {other}."
            )

    @property
    def options(self) -> str:
        """As they are typed."""
        given = {
            "--sweep": self.sweep,
            "--experiment": self.experiment,
            "--filter": self.filter,
            "--metric": self.metric,
        }
        return " ".join(f"{name} {shlex.quote(value)}" for name, value in given.items() if value)


def read(client: MlflowClient, wanted: Wanted) -> Source:
    """Find the runs and read their curves.

    Raises:
        ValueError: As `find`.
    """
    return with_curves(client, find(client, wanted))


def find(client: MlflowClient, wanted: Wanted) -> Source:
    """The runs and what they are compared by, without curves.

    Raises:
        ValueError: A name is unknown, the filter is wrong, or there is nothing to compare.
    """
    if wanted.experiment or wanted.filter:
        source = _read_found(client, wanted)
    else:
        source = _read_sweep(client, wanted.sweep or newest_sweep(client))
        wanted = replace(wanted, sweep=source.sweep.run_id if source.sweep else None)
    source = replace(source, again=wanted.options)
    if wanted.metric:
        source = replace(source, metric=wanted.metric, maximize=_larger_is_better(source, wanted.metric))
    return source


def with_curves(client: MlflowClient, source: Source) -> Source:
    """The same runs with the curves and peaks that are shown."""

    def having(*keys: str) -> dict[str, list[str]]:
        return {key: [run.run_id for run in source.runs if key in run.metrics] for key in keys}

    curves = read_histories(client, having(*dict.fromkeys((source.metric, LOSS))))
    peaks = read_peaks(client, having(GPU_MEMORY, HOST_MEMORY))
    runs = [replace(run, history=curves.get(run.run_id, {}), peaks=peaks.get(run.run_id, {})) for run in source.runs]
    return replace(source, runs=tuple(runs))


def newest_sweep(client: MlflowClient) -> str:
    """Run id of the sweep that started last.

    Raises:
        ValueError: The tracking store holds no sweep.
    """
    sweeps = _sweeps(client)
    if not sweeps:
        raise ValueError(
            "the tracking store must hold a sweep, or --experiment be given, got neither; "
            f"experiments: {_known(client)}."
        )
    return str(sweeps[-1].info.run_id)


def search(client: MlflowClient, experiment_ids: Sequence[str], query: str) -> list[MlflowRun]:
    """All pages of a search, oldest run first."""
    found: list[MlflowRun] = []
    token = None
    while True:
        page = client.search_runs(
            experiment_ids, query, ViewType.ACTIVE_ONLY, PAGE, order_by=["attributes.start_time ASC"], page_token=token
        )
        found.extend(page)
        token = page.token
        if not token:
            return found


def run_of(run: MlflowRun) -> Run:
    """The run without curves."""
    tags = dict(run.data.tags)
    return Run(
        run_id=run.info.run_id,
        name=str(run.info.run_name or run.info.run_id),
        kind=tags.get("amt_ray.kind", ""),
        status=run.info.status,
        params=dict(run.data.params),
        tags=tags,
        metrics=dict(run.data.metrics),
        artifact_uri=run.info.artifact_uri or "",
    )


def _read_sweep(client: MlflowClient, run_id: str) -> Source:
    try:
        parent = client.get_run(run_id)
    except MlflowException as error:
        raise ValueError(
            f"the sweep must be a run of this tracking store, got {run_id}; {_known_sweeps(client)}"
        ) from error
    kind = parent.data.tags.get("amt_ray.kind")
    if kind != "sweep":
        raise ValueError(f"the run must be a sweep, got {run_id} of kind {kind}; {_known_sweeps(client)}")
    children = search(client, [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    source = _source(
        f"Sweep {run_of(parent).name}", [client.get_experiment(parent.info.experiment_id).name], children, [parent]
    )
    return replace(source, sweep=run_of(parent))


def _read_found(client: MlflowClient, wanted: Wanted) -> Source:
    """The runs of an experiment, of a filter, or of a filter within an experiment, whichever sweeps they belong to."""
    experiments = {e.experiment_id: e.name for e in client.search_experiments()}
    if wanted.experiment:
        experiments = {number: name for number, name in experiments.items() if name == wanted.experiment}
    if not experiments:
        known = _known(client)
        raise ValueError(f"the experiment must be one of the tracking store, got {wanted.experiment}; known: {known}.")
    try:
        found = search(client, list(experiments), wanted.filter or "")
    except MlflowException as error:
        raise ValueError(f"--filter must be MLflow's, got {wanted.filter} ({error.message.splitlines()[0]})") from error
    names = list(dict.fromkeys(experiments[run.info.experiment_id] for run in found))
    title = " in ".join(
        filter(
            None,
            (
                f"Runs with {wanted.filter}" if wanted.filter else "",
                wanted.experiment and f"Experiment {wanted.experiment}",
            ),
        )
    )
    return _source(title, names, found, _parents(client, found))


def _parents(client: MlflowClient, found: Sequence[MlflowRun]) -> list[MlflowRun]:
    """The sweeps among the runs or above them, oldest first."""
    here = {run.info.run_id: run for run in found if run.data.tags.get("amt_ray.kind") == "sweep"}
    above = {run.data.tags.get("mlflow.parentRunId") for run in found if run.data.tags.get("amt_ray.kind") == "trial"}
    for run_id in sorted(parent for parent in above - set(here) if parent):
        here[run_id] = client.get_run(run_id)
    return sorted(here.values(), key=lambda run: run.info.start_time)


def _source(title: str, experiments: Sequence[str], found: Iterable[MlflowRun], sweeps: Sequence[MlflowRun]) -> Source:
    """``sweeps`` say by what to compare: the newest gives the metric, all of them the searched keys."""
    runs = tuple(run_of(run) for run in found if run.data.tags.get("amt_ray.kind") in COMPARED_KINDS)
    if not runs:
        raise ValueError(f"{title} must hold at least one trial or pretraining run, got none.")
    settings = sweeps[-1].data.params if sweeps else {}
    searched = dict.fromkeys(key for sweep in reversed(sweeps) for key in _searched(sweep))
    return Source(
        title=title,
        experiment=", ".join(experiments),
        runs=runs,
        metric=settings.get("sweep.metric") or _most_measured(runs),
        maximize=settings.get("sweep.mode", "max") != "min",
        searched=tuple(searched),
    )


def _most_measured(runs: Iterable[Run]) -> str:
    """Without a sweep: kNN where it was measured, else the probe that most runs have."""
    counts = Counter(key for run in runs for key in run.metrics if key.startswith("eval/"))
    return DEFAULT_METRIC if DEFAULT_METRIC in counts or not counts else counts.most_common(1)[0][0]


def _larger_is_better(source: Source, metric: str) -> bool:
    return source.maximize if metric == source.metric else "loss" not in metric


def _sweeps(client: MlflowClient) -> list[MlflowRun]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return search(client, experiments, "tags.`amt_ray.kind` = 'sweep'")


def _known_sweeps(client: MlflowClient) -> str:
    names = [f"{run.info.run_id} ({run_of(run).name})" for run in _sweeps(client)[-5:]]
    return f"the newest sweeps: {', '.join(names) or 'none'}."


def _known(client: MlflowClient) -> str:
    return ", ".join(sorted(e.name for e in client.search_experiments())[:NAMES_SHOWN]) or "none"


def _searched(sweep: MlflowRun) -> list[str]:
    try:
        return [str(key) for key in json.loads(sweep.data.tags.get("amt_ray.searched", "[]"))]
    except ValueError:
        return []
