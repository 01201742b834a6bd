"""Runs that differ only in the seed are one point of a comparison."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from amt_ray import ranking
from amt_ray.report.runs import LENGTH, SEED, Run, as_number
from amt_ray.report.statistics import Summary
from amt_ray.sweep_section import makes_setting

_LAST = 10**9  # behind every trial's number
NO_OPTIONS = "{}"  # the value of a section of options that names none


@dataclass(frozen=True)
class Group:
    """The runs of one setting.

    Attributes:
        runs: By seed; at least one.
    """

    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """One of them, for what they have in common."""
        return self.runs[0]

    @property
    def name(self) -> str:
        """Their name without the seed; of a member of a population with what it became."""
        if became := self.first.became:
            told = " ".join(f"{key.rpartition('.')[2]}={shown(value)}" for key, value in became.items())
            return f"{self.first.name}, became {told}"
        bare = {re.sub(r"[\s,]*\bseed[= ]\d+", "", run.name).strip() or run.name for run in self.runs}
        return bare.pop() if len(bare) == 1 else self.first.name

    @property
    def baseline(self) -> bool:
        """Whether it is a sweep's reference."""
        return self.first.baseline

    @property
    def kind(self) -> str:
        """``trial``, ``retrain`` or ``pretrain``."""
        return self.first.kind

    @property
    def epochs(self) -> int | None:
        """Epochs that the longest run completed."""
        return max((run.epochs for run in self.runs if run.epochs), default=None)

    def counted(self, metric: str) -> list[Run]:
        """The runs whose value of the metric counts."""
        return [run for run in self.runs if run.rankable(metric)]

    def setting(self, metric: str, asked: frozenset[str]) -> ranking.Setting:
        """The same in the terms of `amt_ray.ranking`, ``asked`` being the seeds with which it is to be tried."""
        outcomes = tuple(
            ranking.Outcome(run.seed, run.curve(metric), run.length, run.ended, run.run_id) for run in self.runs
        )
        order = min((_LAST if run.number is None else run.number, run.run_id) for run in self.runs)
        return ranking.Setting(str(order), asked, outcomes, self.baseline, order)

    def by_seed(self, metric: str) -> dict[str, float]:
        """Seed -> last value of the metric, whatever its epoch; of a seed that was run twice, the mean."""
        found: dict[str, list[float]] = {}
        for run in self.counted(metric):
            found.setdefault(run.seed, []).append(run.metrics[metric])
        return {seed: fmean(values) for seed, values in found.items()}

    def summary(self, metric: str) -> Summary | None:
        """The metric over the seeds; None where no run has it."""
        values = tuple(self.by_seed(metric).values())
        return Summary(values) if values else None

    def mean(self, metric: str) -> float | None:
        """The metric's mean over the seeds."""
        summary = self.summary(metric)
        return summary.mean if summary else None


def grouped(runs: Iterable[Run]) -> list[Group]:
    """The settings, each with its runs by seed, in order of their first run."""
    found: dict[object, list[Run]] = {}
    for run in runs:
        found.setdefault(_settings(run), []).append(run)
    return [Group(tuple(sorted(members, key=_by_seed))) for members in found.values()]


def shown(value: object) -> object:
    """A value of a point, short."""
    return f"{value:.4g}" if isinstance(value, float) else value


def _by_seed(run: Run) -> tuple[bool, str | float]:
    seed = as_number(run.seed)
    return isinstance(seed, str), seed


def _settings(run: Run) -> object:
    """Equal for runs that differ only in seed and place; a run without params, and a member of a population, is like
    no other. A length that a sweep gave a trial, so that it costs what others cost, follows from the rest."""
    if not run.params or run.member:
        return run.run_id
    aside = (SEED, LENGTH) if run.trial.get("epochs") is not None else (SEED,)
    kept = {key: as_number(value) for key, value in run.params.items() if makes_setting(key) and key not in aside}
    return run.kind, run.baseline, frozenset(kept.items())


def differing_keys(runs: Iterable[Run], first: Sequence[str] = ()) -> tuple[str, ...]:
    """Config keys with at least two values among the runs that have them; ``first`` lead, in their order.

    The seed and the places are left out. A run that failed before its parameters were logged makes no key differ. An
    option that only some name differs from its default in the others.
    """
    values: dict[str, set[str | float]] = {}
    known = [run.params for run in runs if run.params]
    for params in known:
        for key, value in params.items():
            if value != NO_OPTIONS:
                values.setdefault(key, set()).add(as_number(value))
    for key, found in values.items():
        if ".options." in key and any(key not in params for params in known):
            found.add("")
    differing = [key for key, found in values.items() if len(found) > 1 and key != SEED and makes_setting(key)]
    return tuple([key for key in first if key in differing] + sorted(set(differing) - set(first)))
