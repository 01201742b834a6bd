"""Who is best, by how much, at what cost: pure functions from runs to a comparison."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from amt_ray.report.runs import IMAGES_PER_S, TRAIN_SECONDS, Run, Source


@dataclass(frozen=True)
class Row:
    """A run in the table.

    Attributes:
        run: The run.
        rank: Place from 1, ``None`` for the runs that cannot be ranked.
        objective: Last value of the metric; not the best epoch, which would favour noisy runs.
        note: Why the run is unranked, unfinished or short; empty for an ordinary run.
        delta: Objective minus the baseline's.
        time_ratio: Training seconds an epoch, relative to the baseline's.
    """

    run: Run
    rank: int | None
    objective: float | None
    note: str
    delta: float | None
    time_ratio: float | None


@dataclass(frozen=True)
class Reference:
    """What the trials are measured against: the mean over the baseline runs that have an objective."""

    name: str
    count: int
    objective: float
    epochs: int | None
    seconds_per_epoch: float | None
    test: float | None


@dataclass(frozen=True)
class Comparison:
    """Everything that the table, the plots and the page show.

    Attributes:
        source: What was read.
        rows: The ranked runs, best first, then the unranked ones.
        retrained: Best settings trained anew; not comparable with the trials, so never among ``rows``.
        keys: Config keys that differ between the runs, searched ones first.
        reference: The baseline, where there is one with an objective.
    """

    source: Source
    rows: tuple[Row, ...]
    retrained: tuple[Row, ...]
    keys: tuple[str, ...]
    reference: Reference | None

    @property
    def tested(self) -> bool:
        """Whether any run was measured on the test split."""
        return any(row.run.metric(self.source.test_metric) is not None for row in (*self.rows, *self.retrained))

    @property
    def best(self) -> Row | None:
        """The best ranked run that is not a baseline."""
        return next((row for row in self.rows if row.rank and not row.run.baseline), None)


def rank(source: Source) -> Comparison:
    """Ranks the runs of a source by the last value of its metric."""
    reference = _reference(source)
    trials = [run for run in source.runs if run.kind != "retrain"]
    better = -1.0 if source.maximize else 1.0
    ranked = sorted(
        (run for run in trials if _rankable(run, source.metric)), key=lambda r: better * r.metrics[source.metric]
    )
    unranked = [run for run in trials if not _rankable(run, source.metric)]
    rows = [_row(run, place, source, reference) for place, run in enumerate(ranked, 1)]
    rows += [_row(run, None, source, reference) for run in unranked]
    retrained = [_row(run, None, source, reference) for run in source.runs if run.kind == "retrain"]
    return Comparison(source, tuple(rows), tuple(retrained), differing_keys(trials, source.searched), reference)


def differing_keys(runs: Iterable[Run], first: Sequence[str] = ()) -> tuple[str, ...]:
    """Config keys with at least two values among the runs that have them; ``first`` lead, in their order.

    A run that failed before its parameters were logged makes no key differ.
    """
    values: dict[str, set[str | float]] = {}
    for run in runs:
        for key, value in run.params.items():
            values.setdefault(key, set()).add(as_number(value))
    differing = [key for key, found in values.items() if len(found) > 1]
    return tuple([key for key in first if key in differing] + sorted(set(differing) - set(first)))


def as_number(value: str) -> str | float:
    """The number that a parameter spells, else the string itself: ``0.40`` and ``0.4`` are one value."""
    try:
        number = float(value)
    except ValueError:
        return value
    return number if math.isfinite(number) else value


def replicates(comparison: Comparison, run: Run) -> int:
    """Ranked runs with the settings of ``run`` in all but the seed; at least 1."""
    keys = [key for key in comparison.keys if key != "seed"]
    mine = [run.params.get(key) for key in keys]
    return sum([row.run.params.get(key) for key in keys] == mine for row in comparison.rows if row.rank)


def cost(run: Run) -> tuple[float | None, float | None]:
    """Training seconds and images per second of a run."""
    return run.metric(TRAIN_SECONDS), run.metric(IMAGES_PER_S)


def _rankable(run: Run, metric: str) -> bool:
    return run.metric(metric) is not None and run.status != "FAILED"


def _row(run: Run, place: int | None, source: Source, reference: Reference | None) -> Row:
    objective = run.metric(source.metric)
    delta = objective - reference.objective if reference and objective is not None else None
    base, mine = reference.seconds_per_epoch if reference else None, _seconds_per_epoch(run)
    return Row(run, place, objective, _note(run, source.metric), delta, mine / base if mine and base else None)


def _note(run: Run, metric: str) -> str:
    epochs = f"at epoch {run.epochs}" if run.epochs else "before the first epoch ended"
    if run.status == "FAILED":
        reason = run.tags.get("amt_ray.error", "").strip()
        return f"failed {epochs}" + (f": {reason.splitlines()[0]}" if reason else "")
    if run.status in ("RUNNING", "SCHEDULED"):
        return f"still running, {epochs}" if run.epochs else "still running, no epoch ended yet"
    if metric in run.metrics and run.metric(metric) is None:
        return f"{metric} is {run.metrics[metric]}"
    if run.stopped_early:
        return f"stopped early: {run.stopped_early}"
    if run.status == "KILLED":
        return f"killed {epochs}"
    return "" if metric in run.metrics else f"finished without {metric}"


def _reference(source: Source) -> Reference | None:
    runs = [run for run in source.runs if run.baseline and run.kind != "retrain" and _rankable(run, source.metric)]
    if not runs:
        return None
    epochs = {run.epochs for run in runs}
    tests = [value for run in runs if (value := run.metric(source.test_metric)) is not None]
    seconds = [value for run in runs if (value := _seconds_per_epoch(run)) is not None]
    method = runs[0].tags.get("method", "").upper()
    return Reference(
        name=f"{method} baseline".strip() if len(runs) == 1 else f"{method} baseline (mean of {len(runs)})".strip(),
        count=len(runs),
        objective=fmean(run.metrics[source.metric] for run in runs),
        epochs=epochs.pop() if len(epochs) == 1 else None,
        seconds_per_epoch=fmean(seconds) if seconds else None,
        test=fmean(tests) if tests else None,
    )


def _seconds_per_epoch(run: Run) -> float | None:
    """Per epoch, so that a trial stopped early does not look cheap."""
    seconds = run.metric(TRAIN_SECONDS)
    return seconds / run.epochs if seconds is not None and run.epochs else None
