"""What tests on a real Ray share."""

import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from mlflow import MlflowClient
from ray.cluster_utils import Cluster
from rich.console import Console

from amt_ray.runtime.cluster import QUIET


@contextmanager
def ray_in(folder):
    """One local Ray of two CPUs, with a working directory and a store of its own."""
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


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


class Nodes:
    """A cluster on this machine: a head and further nodes of one CPU, each at its own 127.0.0.x."""

    def __init__(self, folder: Path, head_cpus: int, others: int) -> None:
        self.folder, self.temporary = folder, tempfile.mkdtemp(prefix="ray", dir="/tmp")
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        head = {"num_cpus": head_cpus, "node_ip_address": "127.0.0.2", "object_store_memory": 100_000_000}
        dashboard = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
        self.cluster = Cluster(True, head_node_args=head | dashboard | {"temp_dir": self.temporary})
        self.others, self.next_address = [], 3
        for _ in range(others):
            self.add()

    def add(self):
        """Start one more node; in the main thread, where Ray sets its signal handlers."""
        address, self.next_address = f"127.0.0.{self.next_address}", self.next_address + 1
        self.others.append(self.cluster.add_node(num_cpus=1, node_ip_address=address, object_store_memory=100_000_000))
        return self.others[-1]

    def amt(self, verb: str, *words: str) -> subprocess.CompletedProcess:
        return subprocess.run(self.command(verb, *words), capture_output=True, text=True, timeout=200)

    def command(self, verb: str, *words: str) -> list[str]:
        return [sys.executable, "-m", "amt_ray.cli", verb, "--address", self.url, *words]

    def client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")

    def close(self) -> None:
        self.cluster.shutdown()
        shutil.rmtree(self.temporary, ignore_errors=True)


@contextmanager
def nodes_in(folder, head_cpus=1, others=1):
    """A cluster whose processes know the folder that all share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        patch.setenv("AMT_RAY_DIR", str(folder))
        patch.setenv("AMT_RAY_CACHE", str(folder / "cache"))
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        made = Nodes(folder, head_cpus, others)
        try:
            yield made
        finally:
            made.close()


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
