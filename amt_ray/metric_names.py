"""The metrics that an experiment will write, by their exact names, and whether a sweep asks for one of them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from amt_ray.core.evals import Evaluation, Known
from amt_ray.core.evals.box_energy import BoxEnergy
from amt_ray.core.loop import EVERY_EPOCH, SOME_EPOCHS
from amt_ray.directions import direction
from amt_ray.sweep_section import Sweep


def measured(protocols: Iterable[Evaluation], known: Known) -> tuple[str, ...]:
    """What the protocols write, the first one's main measure first."""
    return tuple(name for protocol in protocols for name in protocol.metrics(known))


def check_sweep(sweep: Sweep, protocols: Sequence[Evaluation], known: Known) -> None:
    """Refuse an objective or a cost that no trial would write, before any trial runs.

    Args:
        sweep: What it asks for.
        protocols: Those that measure the trials.
        known: What is known of encoder and data; with the images at hand, all of it.

    Raises:
        ValueError: With the names that there are.
    """
    found = measured(protocols, replace(known, splits=("eval",)))
    if not sweep.force and sweep.metric not in found:
        told = ", ".join(found) or "nothing"
        raise ValueError(f"sweep.metric must be what eval.protocols measure here ({told}), got {sweep.metric}.")
    every = (*EVERY_EPOCH, *(("perf/eval_s",) if protocols else ()), *found)
    at_refresh = BoxEnergy().metrics(replace(known, splits=("attention",)))  # where objects are known
    if sweep.force and sweep.metric not in (*every, *SOME_EPOCHS, *at_refresh, *measured(protocols, known)):
        raise ValueError(f"sweep.metric must be a metric that runs write ({', '.join(every)}), got {sweep.metric}.")
    if direction(sweep.metric) == "min" and sweep.mode == "max":
        raise ValueError(f"sweep.mode must be min for {sweep.metric}, of which less is better, got max.")
    if sweep.cost is not None:
        _check_cost(sweep.cost, sweep.metric, [name for name in every if direction(name) != "max"])


def _check_cost(cost: str, metric: str, smaller: Sequence[str]) -> None:
    """Refuse a second objective that is not written, or that it makes no sense to make small."""
    if direction(cost) == "max":
        raise ValueError(
            f"sweep.cost is made small, so less of it must be better, got {cost}, of which more is better."
        )
    if cost not in smaller:
        raise ValueError(f"sweep.cost must be a metric that every run writes ({', '.join(smaller)}), got {cost}.")
    if cost == metric:
        raise ValueError(f"sweep.cost must be another metric than sweep.metric, got {cost} for both.")
