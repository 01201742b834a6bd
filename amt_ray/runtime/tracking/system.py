"""CPU and memory of this machine and the GPUs of this process, sampled while a run goes on."""

import os
import threading
import time
from typing import Any

from mlflow import MlflowClient
from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

from amt_ray.runtime.tracking.outbox import Outbox

EVERY_S = 10.0
EVERY_SHARE = 1 / 200  # of a run's age


class SystemMetrics:
    """A thread that puts ``system/...`` metrics, named as MLflow names them, into an outbox.

    MLflow's own `SystemMetricsMonitor` stops for good once a server is away; its monitors are used here without it.
    The step of a sample is the whole seconds since the run began, so a restarted run goes on where it was.

    Args:
        outbox: The run's outbox; sampling ends when it is closed.
        every_s: Seconds between samples; None for ``MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL``, or where that is not
            set for 10 s or a two-hundredth of the run's age, whichever is more: a curve of a day needs no more points
            to be seen than one of an hour, and their number grows with the logarithm of the time.
    """

    def __init__(self, outbox: Outbox, every_s: float | None = None) -> None:
        self.outbox = outbox
        told_s = every_s or MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get()
        self.every_s = max(1.0, told_s or EVERY_S)
        self.every_share = 0.0 if told_s else EVERY_SHARE
        self.monitors: list[Any] = [CPUMonitor(), *_gpus()]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system metrics", daemon=True)
        self._thread.start()

    def sample(self) -> dict[str, float]:
        """The values of now; CPU utilisation since the last call."""
        values: dict[str, float] = {}
        for monitor in self.monitors:
            monitor.clear_metrics()
            monitor.collect_metrics()
            values |= {f"system/{key}": float(value) for key, value in monitor.aggregate_metrics().items()}
        return values

    def close(self) -> None:
        """Stop sampling."""
        self._stop.set()

    def _work(self) -> None:
        began_ms, age_s = None, 0.0
        self.sample()  # the first CPU utilisation has nothing before it to be measured from
        while not self._stop.wait(self.wait_s(age_s)) and not self.outbox.closed:
            began_ms = began_ms or self._began_ms()
            if began_ms is not None and not self.outbox.closed:
                age_s = max(0.0, time.time() - began_ms / 1000)
                self.outbox.metrics(self.sample(), int(age_s))

    def wait_s(self, age_s: float) -> float:
        """Seconds from a sample at an age of the run to the next."""
        return max(self.every_s, self.every_share * age_s)

    def _began_ms(self) -> int | None:
        try:
            client = MlflowClient(self.outbox.queue.address.uri)
            return int(client.get_run(self.outbox.run_id).info.start_time)
        except Exception:  # the server is away: asked again at the next sample
            return None


def _gpus() -> list[Any]:
    """A monitor of the GPUs that this process may use: those of other trials on the machine are theirs to record."""
    try:
        monitor = GPUMonitor()
    except (ImportError, RuntimeError):
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [name.strip() for name in visible.split(",") if name.strip()]
        if all(name.isdigit() for name in names):  # else they are UUIDs, and all GPUs are shown
            handles = dict(enumerate(monitor.gpu_handles))
            monitor.gpu_handles = [handles[int(name)] for name in names if int(name) in handles]
    return [monitor]
