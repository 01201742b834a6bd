"""What the report knows of runs. Nothing here reads, ranks or draws."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

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
# where a run was made, not what it is: runs that differ in nothing else are one point
PLACES = frozenset(
    {
        *("name", "data.root", "data.cache_dir", "tracking.uri", "tracking.experiment"),
        *("ray.storage_path", "ray.address", "ray.max_failures", "train.keep_checkpoints"),
    }
)

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
        """Who stopped the trial and when, e.g. ``asha at epoch 4``."""
        return self.tags.get("amt_ray.stopped_early")

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
        return value if value is not None and math.isfinite(value) else None

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

    @property
    def test_metric(self) -> str:
        """The same of the test split."""
        return self.metric.replace("eval/", "test/", 1)


def as_number(value: str) -> str | float:
    """The number that a parameter spells, else the string itself: ``0.40`` and ``0.4`` are one value."""
    try:
        number = float(value)
    except ValueError:
        return value
    return number if math.isfinite(number) else value
