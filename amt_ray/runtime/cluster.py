"""Connecting to Ray: a local one, or the cluster at an address."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from amt_ray.config import ConfigError, Experiment
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
}
CACHE_VARIABLES = ("AMT_RAY_CACHE", "XDG_CACHE_HOME")


@contextmanager
def connected(experiment: Experiment) -> Iterator[None]:
    """Ray, started here where ``ray.address`` is unset; left again (and ended, if started here) afterwards."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    if ray.is_initialized():
        yield
        return
    variables = {k: os.environ[k] for k in (*QUIET, *CACHE_VARIABLES) if k in os.environ}
    variables |= tracking_environment() | storage_environment()
    ray.init(
        address=experiment.ray.address or os.environ.get("RAY_ADDRESS"),
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": variables},
    )
    try:
        yield
    finally:
        ray.shutdown()


def worker_resources(experiment: Experiment) -> dict[str, float]:
    """What one worker asks for."""
    wanted = experiment.ray
    return {"CPU": wanted.cpus_per_worker} | ({"GPU": wanted.gpus_per_worker} if wanted.use_gpu else {})


def concurrent_runs(experiment: Experiment) -> int:
    """How many runs of this experiment fit on the cluster at once.

    Raises:
        ConfigError: If not even one does.
    """
    have = ray.cluster_resources()
    workers = max(experiment.ray.num_workers, 1)
    need = {name: amount * workers for name, amount in worker_resources(experiment).items()}
    fit = int(min(have.get(name, 0.0) / amount + 1e-9 for name, amount in need.items()))
    if fit < 1:
        there = {name: have.get(name, 0.0) for name in need}
        raise ConfigError(
            f"the cluster must have what the workers ask for, got {there} for {workers} workers of {need} in all."
        )
    return fit
