"""Which way a metric is better: the one table. What is not in it has no known direction, and none is guessed."""

from fnmatch import fnmatchcase
from typing import Literal

Mode = Literal["max", "min"]
MODES = ("max", "min")

MEASURES = (
    *("*_top1", "*_top5", "miou", "pixel_accuracy", "box_ap", "box_ap50", "mask_ap", "mask_ap50"),
    *("box_energy", "box_energy_layer_*"),
)  # of the evaluation protocols
DIRECTIONS: dict[str, Mode] = {
    **{f"{split}/{measure}": "max" for split in ("eval", "test") for measure in MEASURES},
    "attention/box_energy": "max",
    "attention/box_energy_layer_*": "max",
    "train/loss": "min",
    "cost/flops": "min",
    "cost/visible_tokens": "min",
    "perf/images_per_s": "max",
    "perf/epoch_s": "min",
    "perf/train_s": "min",
    "perf/refresh_s": "min",
    "perf/eval_s": "min",
    "perf/data_wait_share": "min",
    "system/gpu_*_memory_usage_megabytes": "min",
    "system/system_memory_usage_megabytes": "min",
}


def direction(metric: str) -> Mode | None:
    """``max`` where more is better, ``min`` where less is, None where that is not known (a learning rate, a count)."""
    return next((mode for pattern, mode in DIRECTIONS.items() if fnmatchcase(metric, pattern)), None)
