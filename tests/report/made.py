"""Runs and sources without a store."""

from amt_ray.report.ranking import Comparison, rank
from amt_ray.report.runs import Run, Source

METRIC = "eval/knn_top1"


def run(
    name: str, value: float | None, seed: int = 0, baseline: bool = False, curve=(), status="FINISHED", **about
) -> Run:
    """A trial with one value; ``about`` are params, dots written as two underscores, and ``tags``."""
    tags = {**about.pop("tags", {}), **({"amt_ray.baseline": "true"} if baseline else {})}
    params = {key.replace("__", "."): str(value) for key, value in about.items()} | {"seed": str(seed)}
    metrics = {} if value is None else {METRIC: value}
    history = {METRIC: tuple(curve)} if curve else {}
    return Run(f"{name}-{seed}", name, "trial", status, params, tags, metrics, history)


def compared(runs, searched=(), **about) -> Comparison:
    """Their comparison."""
    return rank(Source("made", "made", tuple(runs), searched=tuple(searched)), **about)
