"""Placement groups of trials that were stopped: given back by us, where Ray Train's own cleaner is blind.

Tune ends a trial by killing its process, and with it the controller of its workers. Ray Train leaves the workers'
placement group to a cleaner that asks the dashboard whether the controller lives; without an answer (no dashboard,
several Rays on one machine) the group, and the CPUs and GPUs in it, are held for good (ray-project/ray#54305).
"""

import time
from typing import Any

import ray
from ray import tune
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup

GRACE_S = 5.0  # from a trial's end; by then its process is gone, and nothing starts workers anew


@ray.remote(num_cpus=0)
class Groups:
    """Which placement groups each run has."""

    def __init__(self) -> None:
        self.held: dict[str, list[PlacementGroup]] = {}

    def hold(self, run_id: str, group: PlacementGroup) -> None:
        """A run's workers have started in a group."""
        self.held.setdefault(run_id, []).append(group)

    def give(self, run_id: str) -> list[PlacementGroup]:
        """A run's groups, which are the caller's from now on."""
        return self.held.pop(run_id, [])


class Holding(WorkerGroupCallback):
    """In a run's controller: tells of its placement groups.

    Args:
        groups: The `Groups` actor.
        run_id: The MLflow run.
    """

    def __init__(self, groups: Any, run_id: str) -> None:
        self.groups, self.run_id = groups, run_id

    def after_worker_group_start(self, worker_group: Any) -> None:
        """The workers have started."""
        group = worker_group.get_worker_group_state().placement_group_handle.placement_group
        ray.get(self.groups.hold.remote(self.run_id, group))


class GivingBack(tune.Callback):  # type: ignore[misc]
    """In the driver: removes the groups of trials that run no longer (ended, stopped, paused)."""

    def __init__(self, groups: Any) -> None:
        self.groups = groups
        self.since: dict[str, float] = {}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tune has looked at its trials."""
        now = time.monotonic()
        for trial in trials:
            run_id = (trial.last_result or {}).get("run_id")
            if run_id is None:
                continue
            if trial.status == "RUNNING":
                self.since.pop(run_id, None)
            elif now - self.since.setdefault(run_id, now) > GRACE_S:
                self.since[run_id] = float("inf")  # once
                self.give_back(run_id)

    def give_back(self, run_id: str) -> None:
        """Remove what a run still holds; what is gone already stays gone."""
        for group in ray.get(self.groups.give.remote(run_id)):
            remove_placement_group(group)

    def give_all_back(self) -> None:
        """The sweep is over: nothing of it holds anything."""
        for run_id in list(self.since):
            self.give_back(run_id)
