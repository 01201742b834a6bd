"""What tests on a real Ray share."""

import io
import os
from contextlib import contextmanager

from rich.console import Console

from amt_ray.runtime.cluster import QUIET


@contextmanager
def ray_in(folder):
    """One local Ray of two CPUs, with a working directory and a store of its own."""
    import ray  # not before our runtime, which says how Ray authenticates

    before = os.getcwd()
    os.chdir(folder)
    os.environ.update(QUIET)
    os.environ["AMT_RAY_CACHE"] = str(folder / "cache")
    ray.init("local", num_cpus=2, log_to_driver=False, logging_level="ERROR", include_dashboard=True)
    try:
        yield
    finally:
        ray.shutdown()
        os.chdir(before)


def quiet():
    """A console that is read, not seen."""
    return Console(file=io.StringIO(), width=200)


def steps(client, run_id, key):
    """The epochs at which MLflow has a metric, as recorded."""
    return [point.step for point in client.get_metric_history(run_id, key)]


def children(client, parent, kind="trial"):
    """A sweep's runs of a kind, by the number of the trial."""
    experiment = client.get_run(parent).info.experiment_id
    query = f"tags.`mlflow.parentRunId` = '{parent}' and tags.`amt_ray.kind` = '{kind}'"
    return sorted(client.search_runs([experiment], query), key=lambda run: int(run.data.tags.get("amt_ray.point", 0)))
