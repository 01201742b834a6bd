"""What the runs are ranked by: one metric, its direction and how its values are written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

_LABELS = {"knn_top1": "kNN top-1", "linear_top1": "linear top-1", "finetune_top1": "fine-tuned top-1"}


@dataclass(frozen=True)
class Objective:
    """One MLflow metric to rank by.

    Attributes:
        metric: MLflow metric name, such as ``eval/knn_top1``.
        mode: ``max`` when larger is better, ``min`` when smaller is.
    """

    metric: str = "eval/knn_top1"
    mode: Literal["max", "min"] = "max"

    def __post_init__(self) -> None:
        if self.mode not in ("max", "min"):
            raise ValueError(f"sweep.mode must be max or min, got {self.mode!r}.")

    @property
    def label(self) -> str:
        """The metric's name for people."""
        _, _, name = self.metric.rpartition("/")
        return _LABELS.get(name, self.metric)

    @property
    def axis(self) -> str:
        """The label with its unit, for the axis of a plot."""
        return f"{self.label} (%)" if self.is_fraction else self.label

    @property
    def test_metric(self) -> str:
        """The same measurement on the test images."""
        return f"test/{self.metric.rpartition('/')[2]}"

    @property
    def is_fraction(self) -> bool:
        """Whether values lie in 0..1 and are written as per cent, differences as points."""
        return self.metric.endswith(("_top1", "_top5"))

    def of(self, metrics: Mapping[str, float]) -> float | None:
        """The last value of the metric, not the best one over the epochs.

        Picking the best epoch on the validation images would favour noisy runs. A value that is not
        finite is no value.
        """
        value = metrics.get(self.metric)
        return value if value is not None and math.isfinite(value) else None

    def sort_key(self, value: float) -> float:
        """A number that is smaller for a better value."""
        return -value if self.mode == "max" else value

    def gain(self, value: float, reference: float) -> float:
        """The difference to a reference, positive when ``value`` is better."""
        return value - reference if self.mode == "max" else reference - value

    def plotted(self, value: float) -> float:
        """The value in the unit of ``axis``."""
        return 100 * value if self.is_fraction else value

    def text(self, value: float | None) -> str:
        """``0.9423`` as ``94.2%``; a metric that is no fraction with four digits."""
        if value is None:
            return "-"
        return f"{100 * value:.1f}%" if self.is_fraction else f"{value:.4g}"

    def gain_text(self, gain: float | None) -> str:
        """A gain with its sign, in points for a fraction; never a minus zero."""
        if gain is None:
            return "-"
        text = f"{100 * gain:+.1f}" if self.is_fraction else f"{gain:+.3g}"
        return text.replace("-0.0", "+0.0") if text == "-0.0" else text
