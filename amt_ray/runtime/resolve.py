"""Keys whose ``auto`` goes by what the workers have: decided once, on the driver, and recorded as decided."""

import json
import subprocess
import sys
from contextlib import nullcontext

import ray
import torch
from rich.console import Console

from amt_ray.config import Experiment
from amt_ray.core.precision import faster, product_rates
from amt_ray.runtime.cluster import (
    amounts,
    cluster_address,
    concurrent_runs,
    connected,
    gpus_here,
    gpus_there,
    runs_on_ray,
    worker_resources,
)


def resolved(experiment: Experiment, console: Console | None = None) -> Experiment:
    """The experiment without ``auto``: what trials, resumed runs, forks and the retraining of the best go by.

    Args:
        experiment: As it was asked for.
        console: Where a line says what was chosen, and why; and whether a precision that was asked for is a slow one.

    Raises:
        ConfigError: If the cluster, whose workers it goes by, does not answer or has no room for a worker.
    """
    slow = [key for key, value in precisions_of(experiment).items() if value == "bfloat16"]
    if "ray.use_gpu" in experiment.undecided:
        found, why = _use_gpu(experiment)
        experiment = experiment.override({"ray.use_gpu": found})
        _say(console, f"ray.use_gpu: auto is {str(found).lower()} here ({why})")
    wanted = experiment.undecided
    if not wanted and not (slow and console):
        return experiment
    rates = worker_rates(experiment, console)
    chosen, ratio = faster(rates), rates["bfloat16"] / rates["float32"]
    why = f"a worker's matrix products in bfloat16 run at {ratio:.2g} times the rate of float32"
    if wanted:
        experiment = experiment.override(dict.fromkeys(wanted, chosen))
        _say(console, f"{', '.join(wanted)}: auto is {chosen} here ({why})")
    if slow and chosen != "bfloat16":
        _say(console, f"Warning: {', '.join(slow)}: bfloat16 is slow here ({why}); auto chooses the faster one")
    return experiment


def precisions_of(experiment: Experiment) -> dict[str, str]:
    """Every key that is a precision, with its value."""
    return {key: value for key, value in experiment.dotted().items() if key.endswith(".precision") and value}


def worker_rates(experiment: Experiment, console: Console | None = None) -> dict[str, float]:
    """`product_rates` on the device of a worker: of this machine, or of one of a cluster's workers.

    Raises:
        ConfigError: If the cluster does not answer, or has no room for a worker in time.
    """
    device = "cuda" if experiment.ray.on_gpu else "cpu"
    if runs_on_ray(experiment) and cluster_address(experiment):
        with connected(experiment):
            concurrent_runs(experiment, console)
            each = worker_resources(experiment)
            task = ray.remote(product_rates).options(num_cpus=each["CPU"], num_gpus=each.get("GPU", 0), max_retries=3)
            return dict(ray.get(task.remote(device)))
    if device == "cpu" or not runs_on_ray(experiment):
        return product_rates(device)
    code = [sys.executable, "-m", "amt_ray.core.precision", device]
    return dict(json.loads(subprocess.run(code, capture_output=True, check=True).stdout))


def _say(console: Console | None, line: str) -> None:
    if console is not None:
        console.print(line, highlight=False, soft_wrap=True)


def _use_gpu(experiment: Experiment) -> tuple[bool, str]:
    """A GPU where there is one for each worker."""
    wanted = experiment.ray
    if not runs_on_ray(experiment):
        found = torch.cuda.is_available()
        return found, f"PyTorch sees {'a' if found else 'no'} GPU"
    address = cluster_address(experiment)
    with connected(experiment) if address else nullcontext():
        have = gpus_there() if address else gpus_here()
    need = max(wanted.num_workers, 1) * wanted.gpus_per_worker
    asked = f"{max(wanted.num_workers, 1)} worker{'s' * (wanted.num_workers > 1)}"
    return (
        have + 1e-9 >= need,
        f"{asked} of {amounts({'GPU': wanted.gpus_per_worker})}, there: {amounts({'GPU': have})}",
    )
