"""How runs end: FINISHED, FAILED or KILLED, whatever happens to the process or the server."""

import atexit
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from amt_ray.runtime.tracking.outbox import OPEN, Outbox, deliver
from amt_ray.runtime.tracking.target import Target
from amt_ray.secret import without_secrets

DRIVER = "driver"
CLOSE_S, LAST_S = 10.0, 1.0
ENDED = ("FINISHED", "FAILED")
TERMINATIONS = (signal.SIGTERM, signal.SIGHUP)

_held: dict[str, Outbox] = {}  # outboxes of the runs whose `run_status` is open in this process


def last_line(error: BaseException) -> str:
    """What went wrong, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@contextmanager
def run_status(target: Target, run_id: str, reason: Callable[[BaseException], str] = last_line) -> Iterator[Outbox]:
    """Record how the body ends: FINISHED, KILLED (Ctrl-C, SIGTERM, a closed terminal, an exit) or FAILED with a reason.

    The status goes through the outbox: written down before this returns, delivered when MLflow can take it. Only what
    cannot be caught (SIGKILL, power) leaves a run RUNNING.

    Args:
        target: The tracking store.
        run_id: The run; RUNNING from now on.
        reason: The one line about an error that becomes the tag ``amt_ray.error``.
    """
    box = target.outbox(run_id, DRIVER)

    def killed() -> None:
        box.status("KILLED", ENDED)

    box.status("RUNNING")
    _held[run_id] = box
    atexit.register(killed)
    try:
        with terminations_raise():
            try:
                yield box
            except (KeyboardInterrupt, SystemExit, GeneratorExit):
                _end(target, run_id, box, "KILLED")
                raise
            except BaseException as error:
                _end(target, run_id, box, "FAILED", {"amt_ray.error": reason(error)[:500]})
                raise
            _end(target, run_id, box, "FINISHED")
    finally:
        atexit.unregister(killed)
        _held.pop(run_id, None)
        _close(target, run_id, box, LAST_S)


@contextmanager
def terminations_raise() -> Iterator[None]:
    """Turn signals that would end the process without a word into `SystemExit`; a handler that is there stays."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()
    ours = [n for n in TERMINATIONS if main and signal.getsignal(n) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in ours:
            if signal.getsignal(number) is leave:
                signal.signal(number, signal.SIG_DFL)


def begin(target: Target, run_id: str) -> None:
    """A run goes on."""
    with _writing(target, run_id) as box:
        box.status("RUNNING")


def finish(target: Target, run_id: str, status: str, tags: Mapping[str, str] | None = None) -> None:
    """End a run that has not ended yet, once what its processes left has been delivered."""
    with _writing(target, run_id) as box:
        _end(target, run_id, box, status, tags)


def set_tags(target: Target, run_id: str, tags: Mapping[str, str]) -> None:
    """Tag a run, now or, where MLflow is away, later."""
    with _writing(target, run_id) as box:
        box.tags(tags)


def record(target: Target, run_id: str, values: Mapping[str, float], step: int) -> None:
    """Record metrics of a run."""
    with _writing(target, run_id) as box:
        box.metrics(values, step)


def note_checkpoint(target: Target, run_id: str, path: str) -> None:
    """Record where a run's final checkpoint is."""
    with _writing(target, run_id) as box:
        box.file("checkpoint.json", json.dumps({"path": path}, indent=2).encode())
        box.tags({"amt_ray.checkpoint": path})


@contextmanager
def _writing(target: Target, run_id: str) -> Iterator[Outbox]:
    if run_id in _held:
        yield _held[run_id]
        return
    box = target.outbox(run_id, DRIVER)
    try:
        yield box
    finally:
        _close(target, run_id, box, CLOSE_S)


def _close(target: Target, run_id: str, box: Outbox, timeout_s: float) -> None:
    box.close(timeout_s)
    with suppress(OSError):  # where nothing is left
        target.outbox_folder(run_id).rmdir()


def _end(target: Target, run_id: str, box: Outbox, status: str, tags: Mapping[str, str] | None = None) -> None:
    """Write the status down, then wait a while for what was written before it."""
    box.tags({key: without_secrets(value) for key, value in (tags or {}).items()})
    box.status(status, () if status == "FINISHED" else ENDED)
    until = time.monotonic() + CLOSE_S
    for other in [other for other in OPEN if other.run_id == run_id]:
        other.flush(max(0.0, until - time.monotonic()))
    deliver(target.outbox_folder(run_id), max(0.0, until - time.monotonic()))
