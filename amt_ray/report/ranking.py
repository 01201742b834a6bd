"""Who is best, by how much, at what cost: pure functions from runs to a comparison."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from amt_ray.report.costs import Cost, cost_of, seconds_per_epoch
from amt_ray.report.groups import Group, differing_keys, grouped
from amt_ray.report.runs import Run, Source
from amt_ray.report.statistics import Paired, Summary, holm


@dataclass(frozen=True)
class Row:
    """A setting in the table: its runs, one a seed.

    Attributes:
        group: Its runs.
        rank: Place from 1, ``None`` for what cannot be ranked.
        summary: Last values of the metric, one a seed; not the best epoch, which would favour noisy runs.
        test: The same of the test split.
        note: Why it is unranked, unfinished or short; empty for an ordinary one.
        cost: What its runs cost.
        delta: Mean minus the baseline's.
        time_ratio: Training seconds an epoch, relative to the baseline's.
        paired: Against the baseline, seed by seed; None where no seed is common.
    """

    group: Group
    rank: int | None
    summary: Summary | None
    test: Summary | None
    note: str
    cost: Cost
    delta: float | None = None
    time_ratio: float | None = None
    paired: Paired | None = None

    @property
    def name(self) -> str:
        """Name without the seed."""
        return self.group.name

    @property
    def objective(self) -> float | None:
        """Mean over the seeds."""
        return self.summary.mean if self.summary else None

    @property
    def baseline(self) -> bool:
        """Whether it is a sweep's reference."""
        return self.group.baseline


@dataclass(frozen=True)
class Comparison:
    """Everything that the tables, the plots and the page show.

    Attributes:
        source: What was read.
        rows: The ranked settings, best first, then the unranked ones.
        retrained: Best settings trained anew; not comparable with the trials, so never among ``rows``.
        keys: Config keys that differ between the settings, searched ones first.
        reference: What the others are measured against, where there is such a row with an objective.
    """

    source: Source
    rows: tuple[Row, ...]
    retrained: tuple[Row, ...]
    keys: tuple[str, ...]
    reference: Row | None

    @property
    def tested(self) -> bool:
        """Whether any run was measured on the test split."""
        return any(row.test for row in (*self.rows, *self.retrained))

    @property
    def ranked(self) -> tuple[Row, ...]:
        """The rows with a place."""
        return tuple(row for row in self.rows if row.rank)

    @property
    def trials(self) -> tuple[Row, ...]:
        """The ranked rows without the sweeps' baselines."""
        return tuple(row for row in self.ranked if not row.baseline)

    @property
    def best(self) -> Row | None:
        """The best ranked row that is not the reference; of baselines only where nothing else was tried."""
        return next((row for row in self.trials or self.ranked if row is not self.reference), None)

    @property
    def repeated(self) -> bool:
        """Whether any setting has several seeds."""
        return any(row.summary and row.summary.n > 1 for row in (*self.rows, *self.retrained))

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs, by rank of their setting."""
        return tuple(run for row in (*self.rows, *self.retrained) for run in row.group.runs)

    @property
    def reference_name(self) -> str:
        """How sentences call the reference."""
        if self.reference is None:
            return ""
        method = self.reference.group.first.tags.get("method", "").upper()
        return f"{method} baseline".strip() if self.reference.baseline else f"baseline {self.reference.name}"


def rank(source: Source, baseline: str | None = None) -> Comparison:
    """Ranks the settings of a source by the mean of their last values of its metric.

    Args:
        source: The runs.
        baseline: Run id (or its beginning) or name of what the others are measured against; by default the best of the
            sweeps' baselines, or the first where they have nothing else.

    Raises:
        ValueError: No run is called so, or it has no value of the metric.
    """
    groups = grouped(source.runs)
    rows = _ranked([_row(group, source) for group in groups if group.kind != "retrain"], source)
    retrained = [_row(group, source) for group in groups if group.kind == "retrain"]
    reference = _reference([*rows, *retrained], baseline, source)
    tested = _tested([_against(row, reference, source) for row in (*rows, *retrained)])
    keys = differing_keys((run for run in source.runs if run.kind != "retrain"), source.searched)
    return Comparison(
        source,
        tuple(tested[: len(rows)]),
        tuple(tested[len(rows) :]),
        keys,
        next((row for row in tested if reference and row.group is reference.group), None),
    )


def _row(group: Group, source: Source) -> Row:
    summary = group.summary(source.metric)
    note = _note(group, source.metric)
    return Row(group, None, summary, group.summary(source.test_metric), note, cost_of(group.runs))


def _ranked(rows: Sequence[Row], source: Source) -> list[Row]:
    better = -1.0 if source.maximize else 1.0
    ranked = sorted((row for row in rows if row.summary), key=lambda row: better * (row.objective or 0.0))
    return [replace(row, rank=place) for place, row in enumerate(ranked, 1)] + [r for r in rows if not r.summary]


def _reference(rows: Sequence[Row], wanted: str | None, source: Source) -> Row | None:
    if wanted is None:
        ranked = [row for row in rows if row.rank]
        baselines = [row for row in ranked if row.baseline]
        if baselines and len(baselines) == len(ranked):
            started = {run.run_id: place for place, run in enumerate(source.runs)}
            return min(baselines, key=lambda row: min(started[run.run_id] for run in row.group.runs))
        return baselines[0] if baselines else None
    found = [row for row in rows if any(run.run_id.startswith(wanted) for run in row.group.runs)]
    found = found or [row for row in rows if wanted == row.name or any(wanted == run.name for run in row.group.runs)]
    if not found:
        raise ValueError(f"--baseline must be the id or name of a run that is compared, got {wanted}.")
    if found[0].summary is None:
        raise ValueError(f"--baseline must have {source.metric}, got {wanted} without it.")
    return found[0]


def _against(row: Row, reference: Row | None, source: Source) -> Row:
    """The row with its differences to the reference."""
    if reference is None or reference.summary is None or row.summary is None:
        return row
    base, mine = seconds_per_epoch(reference.group), seconds_per_epoch(row.group)
    theirs, ours = (one.group.by_seed(source.metric, whole=True) for one in (reference, row))
    differences = tuple(ours[seed] - theirs[seed] for seed in ours if seed in theirs)
    comparable = row.group is not reference.group and row.group.kind != "retrain"
    return replace(
        row,
        delta=row.summary.mean - reference.summary.mean,
        time_ratio=mine / base if mine and base else None,
        paired=Paired(Summary(differences)) if differences and comparable else None,
    )


def _tested(rows: Sequence[Row]) -> list[Row]:
    """The rows with p-values adjusted for the number of tests."""
    p_values = {place: row.paired.p for place, row in enumerate(rows) if row.paired and row.paired.p is not None}
    adjusted = dict(zip(p_values, holm([p for p in p_values.values() if p is not None])))
    return [
        replace(row, paired=replace(row.paired, adjusted=adjusted[place])) if place in adjusted and row.paired else row
        for place, row in enumerate(rows)
    ]


def _note(group: Group, metric: str) -> str:
    """What to know of the runs; of several, how many it is true for."""
    notes = Counter(note for run in group.runs if (note := run_note(run, metric)))
    if len(group.runs) == 1:
        return next(iter(notes), "")
    return "; ".join(f"{count} of {len(group.runs)}: {note}" for note, count in notes.items())


def run_note(run: Run, metric: str) -> str:
    """Why a run is unranked, unfinished or short; empty for an ordinary one."""
    epochs = f"at epoch {run.epochs}" if run.epochs else "before the first epoch ended"
    if run.status == "FAILED":
        reason = run.tags.get("amt_ray.error", "").strip()
        return f"failed {epochs}" + (f": {reason.splitlines()[0]}" if reason else "")
    if run.unfinished:
        return f"still running, {epochs}" if run.epochs else "still running, no epoch ended yet"
    if metric in run.metrics and run.metric(metric) is None:
        return f"{metric} is {run.metrics[metric]}"
    if run.stopped_early:
        return f"stopped early: {run.stopped_early}"
    if run.status == "KILLED":
        return f"killed {epochs}"
    return "" if metric in run.metrics else f"finished without {metric}"
