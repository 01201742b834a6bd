"""How far an accuracy can be trusted for the number of images that it was measured on."""

import math
from collections.abc import Iterable

from amt_ray.report.runs import Run

COUNTED = ("top1", "top5")  # shares of images; an overlap or a precision is none
CONTEXTS = {"eval/": "val", "test/": "test"}  # as the data set's parts are called in MLflow


def images_measured(runs: Iterable[Run], metric: str) -> tuple[int, int] | None:
    """Fewest and most images on which a share of images was measured; None where that is not recorded, or no share."""
    context = next((name for split, name in CONTEXTS.items() if metric.startswith(split)), None)
    if context is None or not metric.endswith(COUNTED):
        return None
    counts = [run.images[context] for run in runs if run.images.get(context)]
    return (min(counts), max(counts)) if counts else None


def standard_error(share: float, images: int) -> float:
    """Of a share of images that were drawn at random: binomial."""
    return math.sqrt(max(0.0, share * (1 - share)) / images)
