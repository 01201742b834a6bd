"""Entries on disk: one JSON line each, and beside them which have been delivered."""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

INFO, QUEUE, ACKED, REFUSED, LOCK = "outbox.json", "queue.jsonl", "acked.jsonl", "refused.jsonl", "lock"


class HeldError(RuntimeError):
    """Another living outbox has the folder."""


@dataclass(frozen=True)
class Entry:
    """One line of the queue.

    Attributes:
        seq: Its number, counted from 0 in the folder.
        kind: ``metrics``, ``params``, ``tags``, ``status`` or ``file``.
        time_ms: When it was put, in milliseconds since 1970.
        body: What it says.
        size: Bytes of the line, or a guess.
    """

    seq: int
    kind: str
    time_ms: int
    body: dict[str, Any]
    size: int = field(default=256, compare=False)


@dataclass(frozen=True)
class Address:
    """Where a folder's entries go; kept in the folder.

    Attributes:
        uri: MLflow's tracking address.
        run_id: The run.
        conflict_tag: Tag that lists the steps whose metrics were put again with another value, or None for no tag.
        volatile: Beginnings of the names of metrics that differ by nature (times), which make no conflict.
    """

    uri: str
    run_id: str
    conflict_tag: str | None = None
    volatile: tuple[str, ...] = ()


class DiskQueue:
    """Entries in a folder, and which of them have been delivered; one living owner a folder.

    Raises:
        HeldError: If the folder has an owner already.
    """

    def __init__(self, folder: Path, address: Address | None = None) -> None:
        self.folder = folder
        self._lock = _locked(folder, make=address is not None)
        if address is not None:
            (folder / INFO).write_text(json.dumps(asdict(address)))
        told = json.loads((folder / INFO).read_text())
        self.address = Address(**{**told, "volatile": tuple(told["volatile"])})
        done = {seq for line in _whole_lines(folder / ACKED) for seq in line}
        entries = [Entry(*line) for line in _whole_lines(folder / QUEUE)]
        self._file = os.open(folder / QUEUE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._end, self._warned = os.fstat(self._file).st_size, False
        self.next_seq = max([*done, *(entry.seq for entry in entries)], default=-1) + 1
        self.left = [entry for entry in entries if entry.seq not in done]

    def append(self, kind: str, body: dict[str, Any], time_ms: int) -> Entry:
        """Write a line; a full disk costs its durability, not the caller's life."""
        line = json.dumps([self.next_seq, kind, time_ms, body], separators=(",", ":")).encode() + b"\n"
        entry = Entry(self.next_seq, kind, time_ms, body, len(line))
        self.next_seq += 1
        with self._surviving():
            try:
                if os.write(self._file, line) != len(line):
                    raise OSError("there was room for a part of a line")
                self._end += len(line)
            except OSError:
                os.ftruncate(self._file, self._end)
                raise
        return entry

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """A disk that is full or gone costs durability only: entries are sent from memory."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                self._warned = True
                log.warning("The outbox %s cannot be written, entries stay in memory (%s).", self.folder, error)

    def sync(self) -> None:
        """Force the lines to the disk."""
        with self._surviving():
            os.fsync(self._file)

    def acknowledge(self, entries: Iterable[Entry]) -> None:
        """Note that these need not be sent again."""
        with self._surviving():
            _append(self.folder / ACKED, [entry.seq for entry in entries])

    def refuse(self, entry: Entry, reason: str) -> None:
        """Keep an entry that MLflow will never take."""
        with self._surviving():
            _append(self.folder / REFUSED, {**asdict(entry), "reason": reason})

    def close(self, empty: bool) -> None:
        """Give the folder up; nothing of it stays if all was delivered."""
        os.close(self._file)
        if empty and not (self.folder / REFUSED).exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def _append(path: Path, value: Any) -> None:
    with path.open("ab") as file:
        file.write(json.dumps(value, separators=(",", ":")).encode() + b"\n")


def _whole_lines(path: Path) -> list[Any]:
    """The JSON values of a file's lines; a last line torn by a crash, which was never promised, is cut off."""
    values, end = [], 0
    if not path.exists():
        return []
    with path.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                values.append(json.loads(line))
            except ValueError:
                break
            end += len(line)
        file.truncate(end)
    return values


def _locked(folder: Path, make: bool) -> int:
    """A descriptor that holds the folder's lock until it is closed or its process ends."""
    while True:
        if make:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        held = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(folder / LOCK).st_ino == os.fstat(held).st_ino:
                return held
        except BlockingIOError:
            os.close(held)
            raise HeldError(f"an outbox must have one owner, got {folder}, which a living process holds.") from None
        except FileNotFoundError:
            if not make:
                raise
        os.close(held)  # its last owner removed the folder meanwhile
