"""Reads what is to be compared from MLflow: a sweep, an experiment, or what a filter finds."""

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException

from amt_ray.directions import MODES, direction
from amt_ray.report.costs import FLOPS, TOKENS
from amt_ray.report.history import read_histories, read_peaks
from amt_ray.report.runs import COMPARED_KINDS, DEFAULT_METRIC, GPU_MEMORY, HOST_MEMORY, LOSS, Run, Source, objective_of

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
        mode: ``max`` or ``min``: which values of the metric are better, where that is not known.

    Raises:
        ValueError: A sweep is given together with an experiment or a filter, or there is no such mode.
    """

    sweep: str | None = None
    experiment: str | None = None
    filter: str | None = None
    metric: str | None = None
    mode: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in (None, *MODES):
            raise ValueError(f"--mode must be max or min, got {self.mode}.")
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
            "--mode": self.mode,
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
        source = _read_sweep(client, wanted.sweep or newest_sweep(client), wanted)
        wanted = replace(wanted, sweep=source.sweep.run_id if source.sweep else None)
    return replace(source, again=wanted.options)


def with_curves(client: MlflowClient, source: Source) -> Source:
    """The same runs with the curves and peaks that are shown."""

    def having(*keys: str) -> dict[str, list[str]]:
        return {key: [run.run_id for run in source.runs if key in run.metrics] for key in keys}

    curves = read_histories(client, having(*dict.fromkeys((source.metric, LOSS, FLOPS, TOKENS))))
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
        images=_images(run),
    )


def _images(run: MlflowRun) -> dict[str, int]:
    """Images by context, from the data sets that the run was given; what cannot be read is left out."""
    found: dict[str, int] = {}
    for given in run.inputs.dataset_inputs if run.inputs else ():
        with suppress(ValueError, KeyError, TypeError):
            count = int(json.loads(given.dataset.profile)["images"])
            found |= {tag.value: count for tag in given.tags if tag.key == "mlflow.data.context"}
    return found


def _read_sweep(client: MlflowClient, run_id: str, wanted: Wanted) -> Source:
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
    experiment = client.get_experiment(parent.info.experiment_id).name
    source = _source(f"Sweep {run_of(parent).name}", [experiment], children, [parent], wanted)
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
    return _source(title, names, found, _parents(client, found), wanted)


def _parents(client: MlflowClient, found: Sequence[MlflowRun]) -> list[MlflowRun]:
    """The sweeps among the runs or above them, oldest first."""
    here = {run.info.run_id: run for run in found if run.data.tags.get("amt_ray.kind") == "sweep"}
    above = {run.data.tags.get("mlflow.parentRunId") for run in found if run.data.tags.get("amt_ray.kind") == "trial"}
    for run_id in sorted(parent for parent in above - set(here) if parent):
        here[run_id] = client.get_run(run_id)
    return sorted(here.values(), key=lambda run: run.info.start_time)


def _source(
    title: str,
    experiments: Sequence[str],
    found: Iterable[MlflowRun],
    sweeps: Sequence[MlflowRun],
    wanted: Wanted,
) -> Source:
    """``sweeps`` say by what to compare where nothing else is ``wanted``: the newest gives the metric, all of them the
    searched keys."""
    runs = tuple(run_of(run) for run in found if run.data.tags.get("amt_ray.kind") in COMPARED_KINDS)
    if not runs:
        raise ValueError(f"{title} must hold at least one trial or pretraining run, got none.")
    own, maximize = objective_of(*((sweeps[-1].data.params, sweeps[-1].data.tags) if sweeps else ({}, {})))
    metric = wanted.metric or own or _most_measured(runs)
    mode = wanted.mode or (("max" if maximize else "min") if metric == own else _mode(metric, runs))
    searched = dict.fromkeys(key for sweep in reversed(sweeps) for key in _searched(sweep))
    return Source(
        title=title,
        experiment=", ".join(experiments),
        runs=runs,
        metric=metric,
        maximize=mode == "max",
        searched=tuple(searched),
        seeds={sweep.info.run_id: seeds for sweep in sweeps if (seeds := _seeds(sweep))},
    )


def _most_measured(runs: Iterable[Run]) -> str:
    """Without a sweep: kNN where it was measured, else the probe that most runs have; what has no known direction (a
    learning rate that a probe chose) only where there is nothing else."""
    counts = Counter(key for run in runs for key in run.metrics if key.startswith("eval/"))
    counts = Counter({key: count for key, count in counts.items() if direction(key)}) or counts
    return DEFAULT_METRIC if DEFAULT_METRIC in counts or not counts else counts.most_common(1)[0][0]


def _mode(metric: str, runs: Iterable[Run]) -> str:
    """Which values of a metric are better, as far as its name tells; nothing is guessed.

    Raises:
        ValueError: It does not tell.
    """
    if (known := direction(metric)) is not None:
        return known
    having = sorted({key for run in runs for key in run.metrics if direction(key)})
    raise ValueError(
        "which values of a metric are better must be known, or be said by --mode max or --mode min, "
        f"got {metric}; known of the metrics of these runs: {', '.join(having) or 'none'}."
    )


def _sweeps(client: MlflowClient) -> list[MlflowRun]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return search(client, experiments, "tags.`amt_ray.kind` = 'sweep'")


def _known_sweeps(client: MlflowClient) -> str:
    names = [f"{run.info.run_id} ({run_of(run).name})" for run in _sweeps(client)[-5:]]
    return f"the newest sweeps: {', '.join(names) or 'none'}."


def _known(client: MlflowClient) -> str:
    return ", ".join(sorted(e.name for e in client.search_experiments())[:NAMES_SHOWN]) or "none"


def _seeds(sweep: MlflowRun) -> tuple[str, ...]:
    try:
        return tuple(str(seed) for seed in json.loads(sweep.data.tags.get("amt_ray.seeds", "[]")))
    except ValueError:
        return ()


def _searched(sweep: MlflowRun) -> list[str]:
    try:
        return [str(key) for key in json.loads(sweep.data.tags.get("amt_ray.searched", "[]"))]
    except ValueError:
        return []
