"""An outbox between training and MLflow: a queue on disk, emptied by a thread. It can be lifted out of this project.

It needs the standard library and MLflow. `Outbox` takes metrics, params, tags, files and a run's status, appends
each as one JSON line to a file, and returns. A thread sends what is there in batches.

- **Server away**: entries stay on disk in order, the thread tries again with growing pauses, the caller never waits.
  What is left at the end is sent by the next `Outbox` on the folder, or by `deliver`.
- **Exactly once**: a metric's first value at a (key, step) is the one that stays. Before the first metric of a key is
  sent, and again after every call whose outcome is not known, the server's history of the key is read, and points that
  it has are left out. So neither a crash between sending and noting it, nor training an epoch again, doubles a point.
  All else (params, tags, files, the status) is the same when sent twice.
- **Order**: metrics, params, tags and the status keep theirs; files keep theirs, and wait for nothing but
  each other, so a place for files that cannot be written never holds up a metric.
- **Durable**: a line is handed to the operating system before `put` returns, so a killed process loses nothing. It is
  forced to the disk (fsync) before it is sent: a power failure can cost what was put in the last second or so.
- **Refused**: what MLflow will never take (a key with a character it does not allow) goes to ``refused.jsonl`` with the
  reason.
"""

import atexit
import itertools
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from amt_ray.runtime.tracking.outbox.queue import INFO, Address, DiskQueue, Entry, HeldError
from amt_ray.runtime.tracking.outbox.sender import METRICS_A_CALL, OTHERS_A_CALL, Sender, answers, first, line, parts

__all__ = ["OPEN", "Address", "HeldError", "Outbox", "deliver"]

FILES = "files"

log = logging.getLogger(__name__)


class Outbox:
    """A run's outbox: what is put here reaches MLflow, now or later, once.

    Args:
        folder: Where entries are kept; what an earlier process left there is sent first.
        address: Where they go; None for what the folder says.
        gather_s: Least time from one round of sending to the next; what comes meanwhile goes together.
        retry_s: Shortest and longest pause after a failure, which doubles from one to the other.

    Raises:
        HeldError: If a living outbox has the folder.
        FileNotFoundError: If ``address`` is None and the folder holds no outbox.
    """

    def __init__(
        self,
        folder: Path,
        address: Address | None = None,
        gather_s: float = 1.0,
        retry_s: tuple[float, float] = (1.0, 60.0),
    ) -> None:
        self.queue = DiskQueue(folder, address)
        self.folder, self.run_id = folder, self.queue.address.run_id
        self.gather_s, self.retry_s = gather_s, retry_s
        self.closed, self.error = False, ""
        self._main: deque[Entry] = deque(e for e in self.queue.left if e.kind != "file")
        self._files: deque[Entry] = deque(e for e in self.queue.left if e.kind == "file")
        self._hurry = self._stop = False
        self._changed = threading.Condition(threading.RLock())  # a signal handler may put while its thread does
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
        self._thread.start()
        OPEN.add(self)
        atexit.register(self.close)

    def metrics(self, values: Mapping[str, float], step: int, time_ms: int | None = None) -> None:
        """Metrics of one step; of a key and step that come again, the first stay."""
        items = list(values.items())
        for start in range(0, len(items), METRICS_A_CALL):
            part = {key: float(value) for key, value in items[start : start + METRICS_A_CALL]}
            self._put("metrics", {"step": int(step), "values": part}, time_ms)

    def params(self, values: Mapping[str, str]) -> None:
        """Params, which MLflow takes once for good."""
        self._put_pairs("params", values)

    def tags(self, values: Mapping[str, str]) -> None:
        """Tags; the last value of a key stays."""
        self._put_pairs("tags", values)

    def _put_pairs(self, kind: str, values: Mapping[str, str]) -> None:
        items = list(values.items())
        for start in range(0, len(items), OTHERS_A_CALL):
            self._put(kind, dict(items[start : start + OTHERS_A_CALL]))

    def status(self, status: str, unless: Iterable[str] = ()) -> None:
        """The run's status as of now; it stays as it is if it is one of ``unless`` when this is delivered."""
        self._put("status", {"status": status, "unless": list(unless)})

    def file(self, name: str, content: bytes) -> None:
        """A file, kept in the outbox until it is uploaded as ``name``."""
        path = Path(FILES) / f"{time.time_ns()}" / Path(name).name
        try:
            (self.folder / path.parent).mkdir(parents=True)
            (self.folder / path).write_bytes(content)
        except OSError as error:
            log.warning("The outbox %s cannot keep %s (%s).", self.folder, name, error)
            return
        self._put("file", {"path": str(path), "folder": str(Path(name).parent) if "/" in name else None})

    def _put(self, kind: str, body: dict[str, Any], time_ms: int | None = None) -> None:
        with self._changed:
            if self.closed:
                raise RuntimeError(f"an outbox must be open to be written to, got {self.folder}, which was closed.")
            entry = self.queue.append(kind, body, time_ms or int(time.time() * 1000))
            idle = not self._main and not self._files
            (self._files if kind == "file" else self._main).append(entry)
            if idle:
                self._changed.notify_all()

    @property
    def left(self) -> int:
        """Entries that have not been delivered."""
        return len(self._main) + len(self._files)

    def flush(self, timeout_s: float = 10.0) -> int:
        """Wait until all is delivered, or the time is over; returns how many entries are left."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self.left, timeout_s)
            self._hurry = False
            return self.left

    def close(self, timeout_s: float = 10.0) -> int:
        """Deliver what can be delivered and stop; returns how many entries are left in the folder, and says so."""
        if not self.closed:
            self.flush(timeout_s)
            with self._changed:
                self.closed = self._stop = True
                self._changed.notify_all()
            self._thread.join(1.0)
            atexit.unregister(self.close)
            OPEN.discard(self)
            if self.left:
                why = f" ({self.error})" if self.error else ""
                log.warning(
                    "%d entries of run %s could not be delivered to %s%s; they are kept in %s.",
                    self.left, self.run_id, self.queue.address.uri, why, self.folder,
                )  # fmt: skip
        return self.left

    def _work(self) -> None:
        """The thread: send, or wait for something to send."""
        sender: Sender | None = None
        failures, sent = 0, 0.0
        while True:
            with self._changed:
                if failures:
                    pause = min(self.retry_s[0] * 2 ** (failures - 1), self.retry_s[1]) * random.uniform(0.5, 1.0)
                    self._changed.wait_for(lambda: self._stop or self._hurry, pause)
                    if self._hurry:  # somebody waits for the end: often, but not without a breath
                        self._changed.wait_for(lambda: self._stop, min(pause, 0.2))
                else:
                    self._changed.wait_for(lambda: self._stop or self.left)
                    left_s = sent + self.gather_s - time.monotonic()
                    self._changed.wait_for(lambda: self._stop or self._hurry, max(0.0, left_s))
                if self._stop:
                    break
            sent = time.monotonic()
            try:
                self.queue.sync()
                if not answers(self.queue.address.uri):
                    raise ConnectionError("there is no answer")
                sender = sender or Sender(self.queue.address, self.folder)
                fine = self._round(sender)
            except Exception as error:
                fine, self.error = False, line(error)
            failures = 0 if fine else failures + 1
            if failures == 3:
                uri = self.queue.address.uri
                log.warning("MLflow at %s takes nothing (%s); its part waits in %s.", uri, self.error, self.folder)
        self.queue.close(empty=not self.left)

    def _round(self, sender: Sender) -> bool:
        """Send all that is there, each lane up to its first failure; returns whether there was none."""
        fine = True
        for lane in (self._main, self._files):
            while lane and not self._stop:
                with self._changed:
                    waiting = list(itertools.islice(lane, METRICS_A_CALL))
                entries = first(waiting)
                try:
                    self._deliver(sender, entries)
                except Exception as error:
                    self.error, fine = line(error), False
                    break
                self.queue.acknowledge(entries)
                with self._changed:
                    for _ in entries:
                        lane.popleft()
                    self._changed.notify_all()
        return fine

    def _deliver(self, sender: Sender, entries: list[Entry]) -> None:
        try:
            sender.send(entries)
        except Exception as error:
            if not sender.refuses(error):
                raise
            single = [part for entry in entries for part in parts(entry)]
            if len(single) > 1:
                for part in single:
                    self._deliver(sender, [part])
                return
            self.queue.refuse(single[0], line(error))
            log.warning("MLflow refuses %s of run %s: %s", single[0].body, self.run_id, line(error))


OPEN: set[Outbox] = set()  # of this process


def deliver(folder: Path, timeout_s: float = 60.0) -> dict[Path, int]:
    """Send what earlier processes left in the outboxes below ``folder``.

    Args:
        folder: Looked through at any depth. Outboxes that living processes hold are left to those.
        timeout_s: How long each may take.

    Returns:
        For every outbox that was tried: how many entries are still left.
    """
    found = {}
    for info in sorted(folder.rglob(INFO)):
        try:
            found[info.parent] = Outbox(info.parent, gather_s=0.0).close(timeout_s)
        except (HeldError, FileNotFoundError):
            continue
    return found
