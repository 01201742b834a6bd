"""Paths that all nodes of a cluster must share, tried from every node before training starts."""

import os
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import ray
from mlflow import MlflowClient
from pyarrow import fs
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from amt_ray.config import ConfigError, Experiment
from amt_ray.runtime import tracking
from amt_ray.runtime.tracking import tracking_uri

NODE_TIMEOUT_S = 60.0
SEEN_WITHIN_S = 10.0  # a network file system may show another node's new file late
CONNECT_S = 10.0


@dataclass(frozen=True)
class Place:
    """Something that every node must reach.

    Attributes:
        key: What names it to the user.
        where: A folder, a file, or an address.
        use: ``write`` (every node writes there and reads the others' files), ``read``, ``connect``, or ``secret`` (an
            environment variable that the node must have).
    """

    key: str
    where: str
    use: str


def places(experiment: Experiment) -> list[Place]:
    """What the experiment needs on every node."""
    storage = experiment.ray.storage_path
    if "://" not in storage:
        storage = str(Path(storage).expanduser().resolve())
    found = [Place("ray.storage_path", storage, "write"), *_tracking_places(experiment)]
    for key, path in (("data.root", experiment.data.root), ("model.checkpoint", experiment.model.checkpoint)):
        if path and "://" not in path:
            found.append(Place(key, path, "read"))
    return [*found, *(Place("the tracking store's secret", name, "secret") for name in tracking.credentials())]


def _tracking_places(experiment: Experiment) -> list[Place]:
    uri = tracking_uri(experiment)
    parts = urlsplit(uri)
    if parts.scheme.startswith("sqlite"):
        store = Place("the MLflow store", str(Path(unquote(uri.partition(":///")[2])).parent), "write")
    elif parts.hostname:
        store = Place("the MLflow store", f"{parts.hostname}:{_port(parts.scheme, parts.port)}", "connect")
    else:
        return []
    name = experiment.tracking.experiment or experiment.name
    known = MlflowClient(uri).get_experiment_by_name(name)
    artifacts = urlsplit(known.artifact_location) if known else None
    if artifacts is None or artifacts.scheme not in ("", "file"):
        return [store]
    return [store, Place("MLflow's artifact folder", unquote(artifacts.path), "write")]


def _port(scheme: str, port: int | None) -> int:
    known = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
    return port or known.get(scheme.partition("+")[0], 80)


def check(experiment: Experiment) -> None:
    """Try every place from every node, and see that each has the secrets that the driver has: they are not sent.

    Nodes that an autoscaler starts later are not seen here: they must be made like these.

    Raises:
        ConfigError: With the first place that a node lacks, and that node.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    wanted, token = places(experiment), f".amt_ray_probe_{uuid.uuid4().hex}"
    problems = []
    try:
        for place in wanted:
            if place.use == "write" and (why := _failed(_begin, place.where, token)):
                raise ConfigError(
                    f"{place.key} must be writable here, on the driver's node, got {place.where} ({why})."
                )
        for number, (node, answer) in enumerate(zip(nodes, _from_every(nodes, wanted, token), strict=True)):
            name = f"node {node['NodeManagerAddress']} ({node['NodeManagerHostname']})"
            if isinstance(answer, str):
                problems.append(f"every node must answer when its paths are tried, got {answer} from {name}.")
                continue
            for place in wanted:
                why = answer.get(place, "")
                if place.use == "write" and not why and not _seen(place.where, f"{token}_{number}"):
                    why = "what it writes does not come here"
                if why and place.use == "secret":
                    problems.append(f"{place.key} {place.where} must be in the environment of every node, as in the "
                                    f"driver's, got none on {name}: see Secrets in cluster/README.md.")  # fmt: skip
                elif why:
                    problems.append(f"{place.key} must be one place for all nodes, got {place.where} on {name}: {why}.")
    finally:
        names = [token, *(f"{token}_{number}" for number in range(len(nodes)))]
        for place in wanted:
            if place.use == "write":
                _remove(place.where, names)
    if problems:
        raise ConfigError(problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))


def _from_every(nodes: list[dict[str, Any]], wanted: list[Place], token: str) -> list[dict[Place, str] | str]:
    """What each node answers to `_try`, or why it did not."""
    calls = []
    for number, node in enumerate(nodes):
        on_it = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(_try).options(num_cpus=0, scheduling_strategy=on_it, max_retries=0)
        calls.append(task.remote(wanted, token, f"{token}_{number}"))
    answered, _ = ray.wait(calls, num_returns=len(calls), timeout=NODE_TIMEOUT_S)
    answers: list[dict[Place, str] | str] = []
    for call in calls:
        if call not in answered:
            ray.cancel(call, force=True)
            answers.append(f"nothing within {NODE_TIMEOUT_S:g} s")
            continue
        try:
            answers.append(ray.get(call))
        except ray.exceptions.RayError as error:
            answers.append(_short(str(error).strip().splitlines()[-1]))
    return answers


def _try(wanted: list[Place], theirs: str, ours: str) -> dict[Place, str]:
    """On a node: what is wrong with which place. Where all write, ours is left only beside the driver's."""
    found = {}
    for place in wanted:
        if place.use == "secret":
            why = "" if place.where in tracking.credentials() else "not set"
        elif place.use == "connect":
            why = _failed(_connect, place.where)
        elif place.use == "read":
            why = _failed(_read, place.where)
        elif not _seen(place.where, theirs):
            why = "the driver's file is not there"
        else:
            why = _failed(_write, place.where, ours)
        if why:
            found[place] = why
    return found


def _failed(action: Callable[..., None], *arguments: str) -> str:
    """Why it failed, or nothing."""
    try:
        action(*arguments)
    except (OSError, ValueError) as error:
        return _short(str(error))
    return ""


def _connect(where: str) -> None:
    host, _, port = where.rpartition(":")
    socket.create_connection((host, int(port)), CONNECT_S).close()


def _read(where: str) -> None:
    if os.path.isdir(where):
        with os.scandir(where) as entries:
            if next(entries, None) is None:
                raise ValueError("an empty folder")
    else:
        with open(where, "rb"):
            pass


def _begin(where: str, name: str) -> None:
    """Make the folder, which a node never does: one of its own would hide that the shared one is missing."""
    system, folder = opened(where)
    system.create_dir(folder, recursive=True)
    _write(where, name)


def _write(where: str, name: str) -> None:
    system, folder = opened(where)
    with system.open_output_stream(f"{folder}/{name}") as file:
        file.write(name.encode())


def _seen(where: str, name: str) -> bool:
    system, folder = opened(where)
    there = False
    until = time.monotonic() + SEEN_WITHIN_S
    while not there and time.monotonic() < until:
        there = system.get_file_info(f"{folder}/{name}").type == fs.FileType.File
        time.sleep(0 if there else 0.5)
    return there


def _remove(where: str, names: list[str]) -> None:
    system, folder = opened(where)
    for name in names:
        with suppress(OSError):  # never written
            system.delete_file(f"{folder}/{name}")


def opened(where: str) -> tuple[fs.FileSystem, str]:
    """The file system of a folder or address, and the path in it."""
    if "://" not in where:
        return fs.LocalFileSystem(), where
    system, path = fs.FileSystem.from_uri(where)
    return system, path


def _short(text: str) -> str:
    return " ".join(text.split())[:200]
