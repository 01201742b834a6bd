"""How well the rank at a rung foretells the final rank, for sweeps whose trials were stopped early."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from amt_ray.report.runs import History, Run
from amt_ray.report.statistics import kendall

FEW = 3  # trials, below which a rank correlation says nothing


@dataclass(frozen=True)
class Rung:
    """An epoch at which trials were stopped.

    Attributes:
        epoch: Epochs completed.
        stopped: Trials stopped there.
        compared: Finished trials that have a value at the rung and one later.
        tau: Kendall's tau-b of both over these trials; None where there are fewer than three, or no order.
    """

    epoch: int
    stopped: int
    compared: int
    tau: float | None


def rungs(runs: Sequence[Run], metric: str) -> tuple[Rung, ...]:
    """Every rung at which a trial was stopped, with the agreement of its ranking with the final one."""
    stopped = [int(found[1]) for run in runs if (found := re.search(r"at epoch (\d+)", run.stopped_early or ""))]
    finished = [run.history[metric] for run in runs if _came_to_its_end(run, metric)]
    return tuple(_rung(epoch, stopped.count(epoch), finished) for epoch in sorted(set(stopped)))


def _rung(epoch: int, stopped: int, curves: Sequence[History]) -> Rung:
    pairs = [(early, curve[-1][1]) for curve in curves if (early := value_at(curve, epoch)) is not None]
    tau = kendall([a for a, _ in pairs], [b for _, b in pairs]) if len(pairs) >= FEW else None
    return Rung(epoch, stopped, len(pairs), tau)


def value_at(curve: History, epoch: int) -> float | None:
    """The last value up to an epoch; None where there is none, or none after it."""
    early = [value for step, value in curve if step <= epoch]
    return early[-1] if early and curve[-1][0] > epoch else None


def _came_to_its_end(run: Run, metric: str) -> bool:
    return run.status == "FINISHED" and not run.stopped_early and bool(run.history.get(metric))
