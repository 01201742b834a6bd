"""Who is best, by how much, at what cost: pure functions from runs to a comparison."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from amt_ray import ranking
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
        summary: Values of the metric, one a seed, all at `epoch`: the last that all its seeds reached. Not the best
            epoch, which would favour noisy runs.
        test: The same of the test split.
        note: Why it is unranked, unfinished or short; empty for an ordinary one.
        cost: What its runs cost.
        delta: Mean of the seeds in common minus the baseline's, at the largest epoch that these reached in both.
        time_ratio: Training seconds an epoch, relative to the baseline's.
        paired: The same seed by seed; None where no seed is common.
        standing: Where it stands; None for what has no value.
        against: What it was compared on with the baseline.
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
    standing: ranking.Standing | None = None
    against: ranking.Difference | None = None

    @property
    def epoch(self) -> int | None:
        """Epochs completed where it stands."""
        return self.standing.epoch if self.standing else None

    @property
    def by_seed(self) -> dict[str, float]:
        """Seed -> value where it stands."""
        return self.standing.values if self.standing else {}

    @property
    def seeds(self) -> tuple[str, ...]:
        """The seeds that count."""
        return tuple(self.by_seed)

    @property
    def missing(self) -> tuple[str, ...]:
        """Seeds asked for that have no value there."""
        return tuple(self.standing.missing) if self.standing else ()

    @property
    def compared_epoch(self) -> int | None:
        """Epochs completed where it was compared with the baseline."""
        return self.against.epoch if self.against else None

    @property
    def compared_seeds(self) -> tuple[str, ...]:
        """The seeds on which it was compared with the baseline."""
        return tuple(self.against.values) if self.against else ()

    @property
    def name(self) -> str:
        """Name without the seed."""
        return self.group.name

    @property
    def objective(self) -> float | None:
        """Mean over the seeds where it stands."""
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
    def winner(self) -> Row | None:
        """The best setting, as sweep, API and registry name it; a baseline only where there is nothing else."""
        return ranking.winner(self.ranked)

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
    """Ranks the settings of a source by its metric (`amt_ray.ranking`).

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
    told = [_told(_against(row, reference), reference, rows) for row in (*rows, *retrained)]
    tested = _tested(told)
    keys = differing_keys((run for run in source.runs if run.kind != "retrain"), source.searched)
    return Comparison(
        source,
        tuple(tested[: len(rows)]),
        tuple(tested[len(rows) :]),
        keys,
        next((row for row in tested if reference and row.group is reference.group), None),
    )


def _row(group: Group, source: Source) -> Row:
    standing = ranking.standing(group.setting(source.metric, source.asked(group.runs)))
    summary = Summary(tuple(standing.values.values())) if standing else None
    test = group.summary(source.test_metric)
    cost = cost_of(group.runs, None if standing is None or standing.whole else standing.epoch)
    return Row(group, None, summary, test, _note(group, source.metric), cost, standing=standing)


def _ranked(rows: Sequence[Row], source: Source) -> list[Row]:
    of = {row.standing.setting.key: row for row in rows if row.standing}
    ranked = ranking.ranked((row.standing.setting for row in rows if row.standing), source.maximize)
    placed = [replace(of[one.setting.key], rank=place) for place, one in enumerate(ranked, 1)]
    return placed + [row for row in rows if not row.standing]


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


def _against(row: Row, reference: Row | None) -> Row:
    """The row with its differences to the reference."""
    if reference is None or reference.standing is None or row.standing is None:
        return row
    base, mine = seconds_per_epoch(reference.group), seconds_per_epoch(row.group)
    against = ranking.difference(row.standing, reference.standing)
    comparable = row.group is not reference.group and row.group.kind != "retrain"
    return replace(
        row,
        delta=against.mean if against else None,
        time_ratio=mine / base if mine and base else None,
        paired=Paired(Summary(tuple(against.values.values()))) if against and comparable else None,
        against=against,
    )


def _told(row: Row, reference: Row | None, rows: Sequence[Row]) -> Row:
    """The row with the epoch and the seeds of its figures in its note, where one could think that they are others."""
    standing = row.standing
    if standing is None or row.group.kind == "retrain":
        return row
    curves, here = standing.setting.curves, {run.seed for run in row.group.runs}
    found = [row.note] if row.note else []
    if further := [seed for seed, epoch in standing.at.items() if max(curves[seed]) > epoch]:
        found.append(f"at epoch {row.epoch}, the last that all its seeds reached (beyond it: {_seeds(further)})")
    if not_run := [seed for seed in row.missing if seed not in here]:
        found.append(f"no run of {_seeds(not_run)}")
    if more := sorted(here - standing.setting.asked):
        found.append(f"{_seeds(more)} not counted, which the sweep no longer asks for")
    if row.missing and any(not other.missing for other in rows if other.standing):
        found.append(f"below the settings with all their seeds, as {_seeds(row.missing)} has no value")
    if reference is not None and row.group is not reference.group:
        found += _compared(row, reference)
    return replace(row, note="; ".join(found))


def _compared(row: Row, reference: Row) -> list[str]:
    if row.against is None:
        return ["no seed in common with the baseline"]
    same = (row.against.epoch, row.compared_seeds) == (row.epoch, row.seeds)
    if same and row.compared_epoch == reference.epoch and row.compared_seeds == reference.seeds:
        return []
    return [f"difference at epoch {row.compared_epoch} over {_seeds(row.compared_seeds)}"]


def _seeds(seeds: Sequence[str]) -> str:
    return f"seed{'s' if len(seeds) != 1 else ''} {', '.join(ranking.in_order(seeds))}"


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


def best_run(comparison: Comparison) -> Run | None:
    """The run that stands for the winner: the best of those that came to their end, else the best where it stands."""
    row = comparison.winner
    if row is None or row.standing is None:
        return None
    runs, sign = {run.run_id: run for run in row.group.runs}, 1.0 if comparison.source.maximize else -1.0
    if champion := row.standing.champion(comparison.source.maximize):
        return runs[champion]
    metric, at = comparison.source.metric, row.standing.at
    values = {run.run_id: run.curve(metric).get(at[run.seed]) for run in row.group.runs if run.seed in at}
    return runs[max((sign * value, run_id) for run_id, value in values.items() if value is not None)[1]]
