"""A sweep that waits for nodes that do not come must end: Ray Tune by itself waits for ever."""

import time
from typing import Any

from ray import tune

from amt_ray.config import Experiment
from amt_ray.runtime.cluster import amounts, there, worker_resources
from amt_ray.runtime.deadline import NoWorkersError


class TrialDeadline(tune.Callback):
    """Ends a sweep of which no trial has been running, though some wait, for ``ray.start_timeout_s``; in its driver."""

    def __init__(self, experiment: Experiment) -> None:
        self.timeout_s = experiment.ray.start_timeout_s
        self.asked = amounts(worker_resources(experiment))
        self.waiting_since: float | None = None

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tune has looked at its trials.

        Raises:
            NoWorkersError: If that has gone on for too long.
        """
        states = {trial.status for trial in trials}
        if "RUNNING" in states or "PENDING" not in states:
            self.waiting_since = None
            return
        self.waiting_since = self.waiting_since or time.monotonic()
        if time.monotonic() - self.waiting_since >= self.timeout_s:
            raise NoWorkersError(
                f"a trial of {self.asked} must start within ray.start_timeout_s = {self.timeout_s:g} s, got {there()}."
            )
