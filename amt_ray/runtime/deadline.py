"""A run that waits for nodes that do not come must end: Ray Train by itself waits for ever."""

import time
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    RestartingState,
    SchedulingState,
)

from amt_ray.config import Experiment
from amt_ray.runtime.cluster import amounts, there, worker_resources

WAITING = (InitializingState, ReschedulingState, RestartingState, SchedulingState)


class NoWorkersError(RuntimeError):
    """Workers could not be started in time."""


class StartDeadline(ControllerCallback):
    """Ends a Ray Train run whose workers have not been running for ``ray.start_timeout_s``; runs in its controller.

    Ray's own limit counts failed starts over the whole run, so that a long run on spot nodes would use it up.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.timeout_s = experiment.ray.start_timeout_s
        self.asked = f"{experiment.ray.least_workers} workers of {amounts(worker_resources(experiment))}"
        self.waiting_since: float | None = None

    def after_controller_start(self, train_run_context: Any) -> None:
        """The first start is awaited from now on."""
        self.waiting_since = time.monotonic()

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """The workers have started, have stopped, or could not be started once more.

        Raises:
            NoWorkersError: If that has gone on for too long.
        """
        if not isinstance(current_state, WAITING):
            self.waiting_since = None
            return
        self.waiting_since = self.waiting_since or time.monotonic()
        if time.monotonic() - self.waiting_since >= self.timeout_s:
            raise NoWorkersError(
                f"{self.asked} must start within ray.start_timeout_s = {self.timeout_s:g} s, got {there()}."
            )
