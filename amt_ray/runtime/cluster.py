"""Connecting to Ray: a local one, or the cluster at an address; and whether it can give what a run asks for."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray
import torch
from ray._private.accelerators import get_accelerator_manager_for_resource
from ray._private.state import state
from ray._private.utils import get_num_cpus
from ray.exceptions import AuthenticationError
from ray.util.placement_group import placement_group, remove_placement_group
from rich.console import Console

from amt_ray.config import ConfigError, Experiment
from amt_ray.paths import absolute
from amt_ray.runtime import shared_paths
from amt_ray.runtime.storage import storage_environment
from amt_ray.runtime.tracking import tracking_environment

# Ray reads these when it is imported or when a run starts; a user's own value stays
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a report is taken once a poll; the default of 2 s stalls short epochs
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # epochs without an evaluation report no objective
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # in a submitted job both name variables, which Ray else takes for a conflict
}
CACHE_VARIABLES = ("AMT_RAY_CACHE", "XDG_CACHE_HOME")
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the process that a job starts
START_ATTEMPT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
START_ATTEMPT_S = 30.0
LOOK_AGAIN_S = 2.0


@contextmanager
def connected(experiment: Experiment) -> Iterator[None]:
    """Ray, started here where no address is set; left again (and ended, if started here) afterwards.

    Raises:
        ConfigError: If nothing answers at the address, or a node lacks a path that all must share.
    """
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    # one try to start workers; `StartDeadline` counts the tries together
    os.environ[START_ATTEMPT] = f"{min(START_ATTEMPT_S, experiment.ray.start_timeout_s):g}"
    for name in CACHE_VARIABLES:  # workers run in folders of their own
        if os.environ.get(name):
            os.environ[name] = absolute(os.environ[name])
    if ray.is_initialized():
        yield
        return
    # "local": given nothing, Ray would join what it last heard of on this machine, or wait for it if it was killed
    address = cluster_address(experiment) or "local"
    runtime_env = {} if address == "local" else {"env_vars": passed_on()}  # local workers inherit this environment
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", runtime_env=runtime_env)
    except ConnectionError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"a Ray cluster must answer at ray.address, got {address} ({reason}).") from error
    except AuthenticationError as error:
        raise ConfigError(
            f"RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) must be the cluster's token, got it refused by {address}."
        ) from error
    try:
        if address != "local":
            shared_paths.check(experiment)
        yield
    finally:
        ray.shutdown()


def passed_on() -> dict[str, str]:
    """The environment variables that workers on other machines get from the driver: settings, never a secret."""
    own = {key: os.environ[key] for key in (*QUIET, *CACHE_VARIABLES, START_ATTEMPT) if key in os.environ}
    return own | tracking_environment() | storage_environment()


def cluster_address(experiment: Experiment) -> str | None:
    """Where to join Ray, or None to start one here: ``ray.address``, else ``RAY_ADDRESS``; within a job, the job's own.

    Raises:
        ConfigError: If it is the address that jobs are sent to.
    """
    address = os.environ.get("RAY_ADDRESS")
    if IN_JOB not in os.environ:
        address = experiment.ray.address or address
    if address and address.startswith(("http://", "https://")):
        raise ConfigError(
            f"ray.address (or RAY_ADDRESS) must be one to join, as auto or HOST:6379, got {address}: "
            f"send the work there with amt-ray submit --address {address} ..."
        )
    return address


def runs_on_ray(experiment: Experiment) -> bool:
    """Whether Ray runs it: a sweep always, a pretraining unless ``ray.num_workers`` is 0."""
    return experiment.sweep is not None or experiment.ray.num_workers > 0


def goes_elsewhere(experiment: Experiment) -> bool:
    """Whether an address names other machines for the work than this one."""
    return runs_on_ray(experiment) and bool(experiment.ray.address or os.environ.get("RAY_ADDRESS"))


def gpus_here() -> float:
    """The GPUs of this machine that a Ray started here would give, and PyTorch can use."""
    manager = get_accelerator_manager_for_resource("GPU")
    count, visible = manager.get_current_node_num_accelerators(), manager.get_current_process_visible_accelerator_ids()
    return float(min(count, torch.cuda.device_count(), count if visible is None else len(visible)))


def gpus_there() -> float:
    """The GPUs of the cluster that this process has joined, counting nodes that it may still start."""
    return _resources().get("GPU", 0.0)


def _resources() -> dict[str, float]:
    have: dict[str, float] = dict(ray.cluster_resources())
    for name, most in (state.get_max_resources_from_cluster_config() or {}).items():
        have[name] = max(have.get(name, 0.0), most)
    return have


def check_machine(experiment: Experiment) -> None:
    """See that this machine has what the workers ask for, without starting a Ray.

    Raises:
        ConfigError: If it has not.
    """
    wanted, workers = experiment.ray, experiment.ray.least_workers
    if not runs_on_ray(experiment):
        have, need = {"GPU": float(torch.cuda.device_count())}, {"GPU": float(wanted.on_gpu)}
    else:
        have = ray.cluster_resources() if ray.is_initialized() else {"CPU": float(get_num_cpus()), "GPU": gpus_here()}
        need = {name: amount * workers for name, amount in worker_resources(experiment).items()}
    there = amounts({name: have.get(name, 0.0) for name in need})
    if need.get("GPU", 0.0) > have.get("GPU", 0.0) + 1e-9:
        raise ConfigError(
            f"ray.use_gpu must be false (or auto) where not every worker has a GPU, got true for {workers} worker"
            f"{'s' * (workers > 1)} of {wanted.gpus_per_worker:g} GPU on a machine with {there}."
        )
    if any(have.get(name, 0.0) + 1e-9 < amount for name, amount in need.items()):
        raise ConfigError(f"{_asked(worker_resources(experiment), workers)} must fit on this machine, got {there}.")


def worker_resources(experiment: Experiment) -> dict[str, float]:
    """What one worker asks for."""
    wanted = experiment.ray
    return {"CPU": wanted.cpus_per_worker} | ({"GPU": wanted.gpus_per_worker} if wanted.on_gpu else {})


def concurrent_runs(experiment: Experiment, console: Console | None = None) -> int:
    """How many runs of this experiment fit on the cluster at once, counting nodes that it may still start.

    Waits until the first fits: a cluster may have to start nodes, or be busy. A Ray that was started here does not
    grow, so what it cannot give is told at once.

    Args:
        experiment: What is to run.
        console: Where the waiting is told.

    Raises:
        ConfigError: If not even one fits within ``ray.start_timeout_s``.
    """
    workers = max(experiment.ray.num_workers, 1)
    _await_workers(experiment, experiment.ray.least_workers, console)
    have = _resources()
    need = {name: amount * workers for name, amount in worker_resources(experiment).items()}
    return max(1, int(min(have.get(name, 0.0) / amount + 1e-9 for name, amount in need.items())))


def _await_workers(experiment: Experiment, workers: int, console: Console | None) -> None:
    """Return once all workers of a run could be placed together.

    A placement group is asked for, since only that tells: sums over nodes mislead, and a pending group makes an
    autoscaler start nodes.
    """
    each, timeout_s = worker_resources(experiment), experiment.ray.start_timeout_s
    if cluster_address(experiment) is None and _lacks(each, workers):
        raise ConfigError(f"{_asked(each, workers)} must fit on this machine's Ray, got {there()}.")
    group = placement_group([each] * workers)
    until, told = time.monotonic() + timeout_s, False
    try:
        while not group.wait(min(LOOK_AGAIN_S, timeout_s)):
            if time.monotonic() >= until:
                asked = _asked(each, workers)
                raise ConfigError(f"{asked} must fit within ray.start_timeout_s = {timeout_s:g} s, got {there()}.")
            if console and not told:
                told = True
                waiting = f"Waiting up to {timeout_s:g} s for {_asked(each, workers)}; there: {there()}"
                console.print(waiting, highlight=False, soft_wrap=True)
    finally:
        remove_placement_group(group)


def _lacks(each: Mapping[str, float], workers: int) -> bool:
    have = ray.cluster_resources()
    return any(have.get(name, 0.0) + 1e-9 < amount * workers for name, amount in each.items())


def _asked(each: Mapping[str, float], workers: int) -> str:
    return f"{workers} worker{'s' * (workers > 1)} of {amounts(each)}"


def there() -> str:
    """What the cluster has and what of it is free, in words."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    have, free = ray.cluster_resources(), ray.available_resources()
    shown = {name: have.get(name, 0.0) for name in ("CPU", "GPU")}
    unused = {name: free.get(name, 0.0) for name in shown}
    return f"{amounts(shown)} on {len(nodes)} node{'s' * (len(nodes) > 1)}, free {amounts(unused)}"


def amounts(resources: Mapping[str, float]) -> str:
    """Resources in words: ``4 CPU, 1 GPU``."""
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
