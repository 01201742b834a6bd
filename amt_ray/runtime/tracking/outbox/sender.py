"""From entries to calls of MLflow, each of which may be made again with the same result."""

import shutil
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from ssl import SSLError
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from amt_ray.runtime.tracking.outbox.queue import Address, Entry

# MLflow takes 1000 metrics, 100 params and 100 tags a call, 1000 together, and 1 MB; the sender may add a tag
METRICS_A_CALL, OTHERS_A_CALL, BYTES_A_CALL = 800, 99, 500_000
PROBE_TIMEOUT_S = 5.0
RUNNING_SINCE = "outbox.running_since_ms"
NOT_TAKEN = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


def answers(uri: str) -> bool:
    """Whether a server can be reached; asked before MLflow is, whose own retries would take minutes."""
    if not uri.startswith(("http://", "https://")):
        return True
    parts = urllib.parse.urlsplit(uri)
    place = parts._replace(netloc=parts.netloc.rpartition("@")[2], path=f"{parts.path.rstrip('/')}/health")
    try:
        urllib.request.urlopen(place.geturl(), timeout=PROBE_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        return error.code < 502
    except urllib.error.URLError as error:
        return isinstance(error.reason, SSLError)  # MLflow's own settings know which certificates to trust
    except OSError:
        return False
    return True


class Sender:
    """Makes calls of MLflow from entries. Every call may be made again with the same result."""

    def __init__(self, address: Address, folder: Path) -> None:
        self.address, self.run_id, self.folder = address, address.run_id, folder
        self.client = MlflowClient(address.uri)
        self.have: dict[str, dict[int, float]] = {}  # key -> step -> value, of the keys met so far

    def send(self, entries: list[Entry]) -> None:
        """Send entries of one lane: a batch of metrics, params and tags, or one of another kind."""
        kind, body = entries[0].kind, entries[0].body
        if kind == "status":
            self._status(body["status"], set(body["unless"]), entries[0].time_ms)
        elif kind == "file":
            path = self.folder / body["path"]
            if path.exists():  # it is removed once uploaded
                self.client.log_artifact(self.run_id, str(path), body["folder"])
                shutil.rmtree(path.parent, ignore_errors=True)
        else:
            self._batch(entries)

    def _batch(self, entries: list[Entry]) -> None:
        new: dict[tuple[str, int], Metric] = {}
        again: set[int] = set()
        for entry in (entry for entry in entries if entry.kind == "metrics"):
            step = entry.body["step"]
            for key, value in entry.body["values"].items():
                first = new[key, step].value if (key, step) in new else self._recorded(key).get(step)
                if first is None:
                    new[key, step] = Metric(key, value, entry.time_ms, step)
                elif not _same(first, value) and not key.startswith(self.address.volatile):
                    again.add(step)
        params = {key: value for e in entries if e.kind == "params" for key, value in e.body.items()}
        tags = {key: value for e in entries if e.kind == "tags" for key, value in e.body.items()}
        if again and (name := self.address.conflict_tag):
            noted = self.client.get_run(self.run_id).data.tags.get(name, "")
            tags[name] = ",".join(map(str, sorted(again | {int(step) for step in noted.split(",") if step})))
        if not (new or params or tags):
            return
        try:
            self.client.log_batch(
                self.run_id,
                metrics=list(new.values()),
                params=[Param(key, value) for key, value in params.items()],
                tags=[RunTag(key, value) for key, value in tags.items()],
            )
        except BaseException:
            self.have.clear()  # the server may have taken it, and said so to nobody
            raise
        for (key, step), metric in new.items():
            self.have[key][step] = metric.value

    def _recorded(self, key: str) -> dict[int, float]:
        if key not in self.have:
            self.have[key] = {point.step: point.value for point in self.client.get_metric_history(self.run_id, key)}
        return self.have[key]

    def _status(self, status: str, unless: set[str], time_ms: int) -> None:
        """Set the status as of ``time_ms``; what has happened to the run since then is left alone."""
        run = self.client.get_run(self.run_id)
        since, ended = int(run.data.tags.get(RUNNING_SINCE, 0)), run.info.end_time or 0
        if time_ms < (since if run.info.status == "RUNNING" else ended) or run.info.status in unless:
            return
        if status == "RUNNING":
            self.client.set_tag(self.run_id, RUNNING_SINCE, str(time_ms))
            self.client.update_run(self.run_id, status=status)
        else:
            self.client.set_terminated(self.run_id, status, end_time=time_ms)

    def refuses(self, error: Exception) -> bool:
        """Whether MLflow will never take what it has just been given; a deleted run may come back."""
        if not isinstance(error, MlflowException) or error.error_code not in NOT_TAKEN:
            return False
        return bool(self.client.get_run(self.run_id).info.lifecycle_stage == "active")


def _same(one: float, other: float) -> bool:
    """Whether two values are one to MLflow, whose stores hold infinity as the largest number."""
    limit = sys.float_info.max
    return (one != one and other != other) or max(min(one, limit), -limit) == max(min(other, limit), -limit)


def first(waiting: Iterable[Entry]) -> list[Entry]:
    """The entries for the next call: as many as one call takes, in order."""
    taken: list[Entry] = []
    room = {"metrics": METRICS_A_CALL, "params": OTHERS_A_CALL, "tags": OTHERS_A_CALL}
    bytes_left = BYTES_A_CALL
    for entry in waiting:
        if entry.kind not in room:
            return taken or [entry]
        count = len(entry.body["values"]) if entry.kind == "metrics" else len(entry.body)
        room[entry.kind] -= count
        bytes_left -= entry.size
        if taken and (room[entry.kind] < 0 or bytes_left < 0):
            break
        taken.append(entry)
    return taken


def line(error: Exception) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def parts(entry: Entry) -> list[Entry]:
    """An entry of several values as entries of one."""
    if entry.kind == "metrics":
        step, values = entry.body["step"], entry.body["values"]
        bodies: list[dict[str, Any]] = [{"step": step, "values": {key: value}} for key, value in values.items()]
    elif entry.kind in ("params", "tags"):
        bodies = [{key: value} for key, value in entry.body.items()]
    else:
        return [entry]
    return [Entry(entry.seq, entry.kind, entry.time_ms, body) for body in bodies]
