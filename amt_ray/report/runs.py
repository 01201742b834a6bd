"""What the report knows of runs. Nothing here reads, ranks or draws."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from amt_ray.ranking import is_value

DEFAULT_METRIC = "eval/knn_top1"
LOSS = "train/loss"
TRAIN_SECONDS = "perf/train_s"
EPOCH_SECONDS = "perf/epoch_s"
IMAGES_PER_S = "perf/images_per_s"
GPU_MEMORY = "system/gpu_0_memory_usage_megabytes"
HOST_MEMORY = "system/system_memory_usage_megabytes"
COMPARED_KINDS = (
    "trial",
    "retrain",
    "pretrain",
)  # what is evaluated or shared (evaluate, warmup) has no place of its own
SEED = "seed"
LENGTH = "train.epochs"

History = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        run_id: MLflow id.
        name: The name shown; not unique.
        kind: ``trial``, ``retrain`` or ``pretrain``.
        status: MLflow status, e.g. ``FINISHED``.
        params: Dotted config keys to values as strings.
        tags: MLflow tags.
        metrics: The last value of every metric, finite or not.
        history: Curves of the metrics that are drawn: pairs (epochs completed, finite value), by rising epoch.
        peaks: The greatest value of metrics that vary within an epoch (memory).
        artifact_uri: Where its artifacts are.
        images: How many images it trained on (``train``), was chosen by (``val``) and tested on (``test``).
    """

    run_id: str
    name: str
    kind: str
    status: str
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    history: Mapping[str, History] = field(default_factory=dict)
    peaks: Mapping[str, float] = field(default_factory=dict)
    artifact_uri: str = ""
    images: Mapping[str, int] = field(default_factory=dict)

    @property
    def baseline(self) -> bool:
        """Whether the sweep added this run as the reference."""
        return self.tags.get("amt_ray.baseline", "").lower() == "true"

    @property
    def seed(self) -> str:
        """Its seed, as it is spelled."""
        return self.params.get(SEED, "")

    @property
    def stopped_early(self) -> str | None:
        """Who stopped the trial and when, e.g. ``asha at epoch 4``; None once it has come to its end all the same."""
        if self.length is not None and (self.epochs or 0) >= self.length:
            return None
        return self.tags.get("amt_ray.stopped_early") or None

    @property
    def ended(self) -> bool:
        """Whether it came to its own end."""
        return self.status == "FINISHED" and not self.stopped_early

    @property
    def length(self) -> int | None:
        """Epochs that it was asked for."""
        asked = self.params.get(LENGTH, "")
        return int(asked) if asked.isdecimal() else None

    @property
    def parent(self) -> str | None:
        """Its sweep, if it belongs to one."""
        return self.tags.get("mlflow.parentRunId")

    @property
    def trial(self) -> Mapping[str, Any]:
        """What its sweep asked of it: ``point``, ``seed``, and ``epochs`` where the sweep gave it a length."""
        return _parsed(self.tags.get("amt_ray.trial", ""))

    @property
    def number(self) -> int | None:
        """Its number in its sweep."""
        told = self.tags.get("amt_ray.point", "")
        return int(told) if told.isdecimal() else None

    @property
    def became(self) -> Mapping[str, Any]:
        """The point at which population-based training left it, where that moved it; its params are where it began."""
        return _parsed(self.tags.get("amt_ray.point_now", ""))

    @property
    def member(self) -> bool:
        """Whether it is of a population, whose members are settings of their own."""
        return "amt_ray.member" in self.tags or bool(self.became)

    def curve(self, metric: str) -> Mapping[int, float]:
        """The metric by epochs completed, as far as it counts: nothing of a run that failed."""
        if self.status == "FAILED":
            return {}
        last, stopped = self.metric(metric), re.search(r"at epoch (\d+)", self.stopped_early or "")
        epoch = self.epochs or (int(stopped[1]) if stopped else 0)
        return dict(self.history.get(metric, ())) or ({} if last is None else {epoch: last})

    @property
    def unfinished(self) -> bool:
        """Whether it may still change."""
        return self.status in ("RUNNING", "SCHEDULED")

    @property
    def epochs(self) -> int | None:
        """Epochs completed, as far as the curves tell."""
        return max((curve[-1][0] for curve in self.history.values() if curve), default=None)

    def metric(self, key: str) -> float | None:
        """Last value of a metric, ``None`` where it is missing or not finite."""
        value = self.metrics.get(key)
        return value if is_value(value) else None

    def rankable(self, metric: str) -> bool:
        """Whether its value of the metric counts."""
        return self.metric(metric) is not None and self.status != "FAILED"


@dataclass(frozen=True)
class Source:
    """The runs to compare and by what.

    Attributes:
        title: What the page is about, e.g. ``Sweep digits_search``.
        experiment: Names of the MLflow experiments.
        runs: Every run compared, in order of start; sweep parents are left out.
        again: The options of ``amt-ray compare`` that read these runs.
        metric: Key of the objective.
        maximize: Whether a larger objective is better.
        searched: Dotted config keys that were searched.
        seeds: The seeds that each sweep asks for, by its run id.
        sweep: The parent run, where one sweep is compared.
    """

    title: str
    experiment: str
    runs: tuple[Run, ...]
    again: str = ""
    metric: str = DEFAULT_METRIC
    maximize: bool = True
    searched: tuple[str, ...] = ()
    sweep: Run | None = None
    seeds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def asked(self, runs: Sequence[Run]) -> frozenset[str]:
        """The seeds with which a setting is to be tried: of a sweep's the sweep's, else those of its own runs."""
        found: set[str] = set()
        for run in runs:
            sweeps = run.kind == "trial" and not run.member and SEED not in run.trial.get("point", {})
            found.update(self.seeds.get(run.parent or "", (run.seed,)) if sweeps else (run.seed,))
        return frozenset(found)

    @property
    def test_metric(self) -> str:
        """The same of the test split; empty where the metric is not one of held-out images."""
        return self.metric.replace("eval/", "test/", 1) if self.metric.startswith("eval/") else ""


def objective_of(params: Mapping[str, str], tags: Mapping[str, str]) -> tuple[str | None, bool]:
    """By what a sweep's run ranks its trials, and whether more is better. A resumed sweep can change it, in its tags;
    its params are those with which it began. None where neither says it."""
    metric = tags.get("amt_ray.metric") or params.get("sweep.metric") or None
    mode = tags.get("amt_ray.mode") or params.get("sweep.mode") or "max"
    return metric, mode != "min"


def _parsed(text: str) -> Mapping[str, Any]:
    try:
        told = json.loads(text)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def as_number(value: str) -> str | float:
    """The number that a parameter spells, else the string itself: ``0.40`` and ``0.4`` are one value."""
    try:
        number = float(value)
    except ValueError:
        return value
    return number if math.isfinite(number) else value
