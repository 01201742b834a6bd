"""The reporter that writes a training to its MLflow run."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from amt_ray.runtime.tracking.system import SystemMetrics
from amt_ray.runtime.tracking.target import Target

CLOSE_S = 10.0
WARNING = "amt_ray.warning"


class MlflowReporter:
    """Writes one run's metrics, an epoch a call, without ever waiting for MLflow.

    One trial is one run for life. After a restart, a resume, or a roll-back to the checkpoint of epoch E, the epochs
    after E are trained and reported again. MLflow can delete no point of a metric, so the points that were recorded
    first stay and those that come again are dropped: every (metric, epoch) is there once. At the same number of workers
    training is a function of the checkpoint, and both are equal. Where they are not (another world size, another GPU),
    the tag ``amt_ray.retrained_epochs`` lists the epochs whose recorded values are not those of the weights that
    training went on with. Times and speeds differ always and make no such note.

    Args:
        target: The tracking store.
        run_id: The run.
        system_every_s: Seconds between samples of this machine's CPU, memory and GPUs, at least 1; None for MLflow's
            own setting, else 10; 0 for none.
    """

    def __init__(self, target: Target, run_id: str, system_every_s: float | None = None) -> None:
        self.target, self.run_id = target, run_id
        self.outbox = target.outbox(run_id, "worker")
        self.system = None if system_every_s == 0 else SystemMetrics(self.outbox, system_every_s)

    def __enter__(self) -> "MlflowReporter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def metrics(self, values: Mapping[str, float], epoch: int) -> None:
        """One entry an epoch: all of its values or none."""
        self.outbox.metrics(values, epoch)

    def progress(self, epoch: int, share: float) -> None:
        """The position within the epoch, as a tag (it has no history to keep)."""
        self.outbox.tags({"amt_ray.progress": f"{epoch + share:.3f}"})

    def file(self, name: str, content: bytes) -> None:
        """Keep it as an artifact."""
        self.outbox.file(name, content)

    def warning(self, line: str) -> None:
        """Keep the newest warning as a tag, which whoever follows the run shows."""
        self.outbox.tags({WARNING: line})

    def changed(self, values: Mapping[str, Any], epoch: int) -> None:
        """Settings that change during the run, which MLflow's params cannot.

        Args:
            values: By dotted key; a number becomes a point of the metric ``hp/<key>``, anything a tag ``hp.<key>``.
            epoch: Epochs completed before the change.
        """
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        self.outbox.metrics({f"hp/{key}": value for key, value in numbers.items()}, epoch)
        self.outbox.tags({f"hp.{key}": str(value) for key, value in values.items()})

    def close(self, timeout_s: float = CLOSE_S) -> int:
        """Deliver what can be delivered; returns how many entries are left in the outbox, to be delivered later."""
        if self.system is not None:
            self.system.close()
        return self.outbox.close(timeout_s)
