"""The one adapter of the core's checkpoints: a run's, in a local or shared folder or an object store."""

import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from amt_ray.core.ports import Ranks, Solo
from amt_ray.runtime.storage.manifest import DamagedError, Manifest, StorageError
from amt_ray.runtime.storage.places import Place, joined, name_of, place_of, reason

T = TypeVar("T")
Best = tuple[str, str]
AfterSave = Callable[[int, Mapping[str, float], str], None]


@dataclass(frozen=True)
class Stored:
    """A checkpoint that was written to its end.

    Attributes:
        epoch: Epochs completed.
        metrics: Of that epoch.
        uri: Its folder: a path, or an address.
    """

    epoch: int
    metrics: Mapping[str, float]
    uri: str


def to_stderr(line: str) -> None:
    """Warn on the terminal."""
    print(f"amt-ray: {line}", file=sys.stderr, flush=True)


class StoredCheckpoints:
    """A run's checkpoints, ``epoch_NNNNN`` folders, each written whole or not at all.

    Every rank makes one and calls the same methods; rank 0 writes, all wait for it, and all fail where it fails. What
    is damaged is never taken: a manifest with sizes and checksums, written last, says what a checkpoint must be.

    Args:
        uri: The run's folder: a path, ``s3://bucket/...`` or ``gs://bucket/...``. An S3 server of one's own is named in
            the query (``?endpoint_override=http://host:9000``) or by ``AWS_ENDPOINT_URL``; credentials come from the
            environment.
        ranks: The processes that train together.
        keep: How many of the newest stay, at least 1.
        best: A metric, or what its name begins with, and ``max`` or ``min``: the best checkpoint by it stays as well.
        warn: Told in a line, on rank 0, what was passed over.
        after: Called on every rank after a checkpoint was saved, with its epoch, metrics and folder.
        held: Epochs whose checkpoints stay whatever comes after them: other runs go on from them.
    """

    def __init__(
        self,
        uri: str | Path,
        ranks: Ranks | None = None,
        keep: int = 2,
        best: Best | None = None,
        warn: Callable[[str], None] = to_stderr,
        after: AfterSave | None = None,
        held: Collection[int] = (),
    ) -> None:
        if keep < 1:
            raise ValueError(f"at least 1 checkpoint must be kept, got {keep}.")
        self.place: Place = place_of(str(uri))
        self.ranks: Ranks = ranks or Solo()
        self.keep, self.best, self.warn, self.after, self.held = keep, best, warn, after, frozenset(held)

    def latest(self) -> Path | None:
        """A folder of this machine with the newest whole checkpoint, verified; None where there is none yet.

        Raises:
            StorageError: If there are checkpoints and none of them is whole, or the storage cannot be read.
        """
        names = self._on_first(self.place.names)
        for name in reversed(names):
            folder, fault = self._fetched(name)
            if folder is not None:
                return folder
            if self.ranks.rank == 0:
                self.warn(f"the checkpoint {joined(self.place.uri, name)} is not whole and is passed over: {fault}.")
        if names:
            raise StorageError(
                f"a checkpoint to go on from must be whole, got none of {len(names)} at {self.place.uri} "
                "(remove them to start anew)."
            )
        return None

    def at(self, epoch: int) -> Path:
        """A folder of this machine with the checkpoint of an epoch, verified.

        Raises:
            StorageError: If it is not there or not whole.
        """
        folder, fault = self._fetched(name_of(epoch))
        if folder is None:
            raise StorageError(f"the checkpoint {self.uri_of(epoch)} must be whole: {fault}.")
        return folder

    def listed(self) -> list[Stored]:
        """All checkpoints whose manifest can be read, oldest first."""

        def stored() -> list[Stored]:
            return [Stored(m.epoch, m.metrics, self.uri_of(m.epoch)) for m in self._manifests()]

        return self._on_first(stored)

    def uri_of(self, epoch: int) -> str:
        """Path or address of an epoch's folder."""
        return joined(self.place.uri, name_of(epoch))

    def save(self, epoch: int, metrics: Mapping[str, float], write: Callable[[Path], None]) -> None:
        """Keep a checkpoint after ``epoch`` completed epochs; every rank calls it, rank 0's ``write`` is used.

        Raises:
            StorageError: On every rank, if it could not be written; the checkpoints before it are as they were.
        """
        self._on_first(lambda: self._save(epoch, metrics, write))
        self.place.release()  # all ranks have long read the copy from which they resumed
        if self.after is not None:
            self.after(epoch, metrics, self.uri_of(epoch))

    def fork(self, source: "StoredCheckpoints", epoch: int) -> None:
        """Copy a checkpoint of another run here, to go on from it.

        Raises:
            StorageError: If it is not whole, or cannot be copied.
        """
        folder = source.at(epoch)

        def copy() -> None:
            told = source.place.manifest(name_of(epoch))

            def write(to: Path) -> None:
                for name in told.files:
                    shutil.copyfile(folder / name, to / name)

            self._save(epoch, told.metrics, write)

        self._on_first(copy)

    def check(self) -> None:
        """See that a checkpoint can be written, before there is one to lose.

        Raises:
            StorageError: If not.
        """

        def probe() -> None:
            name = f"probe-{socket.gethostname()}"
            self._write(name, 0, {}, lambda folder: (folder / "probe").touch(), "storage must take checkpoints")
            self.place.remove(name)

        self._on_first(probe)

    def _save(self, epoch: int, metrics: Mapping[str, float], write: Callable[[Path], None]) -> None:
        self._write(name_of(epoch), epoch, metrics, write, f"the checkpoint of epoch {epoch} must be written whole")
        try:
            self.place.tidy()
            for gone in self._superfluous(self._manifests()):
                self.place.remove(name_of(gone))
        except StorageError as error:
            self.warn(str(error))

    def _write(
        self, name: str, epoch: int, metrics: Mapping[str, float], write: Callable[[Path], None], rule: str
    ) -> None:
        with self.place.staging(name) as staged:
            try:
                write(staged)
                self.place.commit(name, staged, Manifest.of(staged, epoch, metrics))
            except (
                Exception
            ) as error:  # torch, safetensors, the file system: each has errors of its own for a full disk
                raise StorageError(
                    f"{rule}, got an error at {self.place.uri}: {reason(error, staged)}. Earlier ones are intact."
                ) from error

    def _manifests(self) -> list[Manifest]:
        """Those that can be read, oldest first."""
        found = []
        for name in self.place.names():
            try:
                found.append(self.place.manifest(name))
            except DamagedError:
                continue
        return found

    def _superfluous(self, manifests: list[Manifest]) -> list[int]:
        """Epochs that are neither held, nor of the newest, nor the best (of equals, the first)."""
        kept = self.held | {manifest.epoch for manifest in manifests[-self.keep :]}
        if self.best is not None:
            metric, mode = self.best
            values = {manifest.epoch: value_of(manifest.metrics, metric) for manifest in manifests}
            measured = {epoch: value for epoch, value in values.items() if value is not None}
            if measured:
                kept |= {(max if mode == "max" else min)(measured, key=lambda epoch: measured[epoch])}
        return [manifest.epoch for manifest in manifests if manifest.epoch not in kept]

    def _fetched(self, name: str) -> tuple[Path | None, str]:
        """The checkpoint's folder on this node, which one of its ranks has verified, or None and what is wrong.

        It is whole where it is so on every node, so that all ranks take the same.

        Raises:
            StorageError: On every rank, if a node could not read it, which says nothing of the checkpoint.
        """
        node = (socket.gethostname(), Path(tempfile.gettempdir()).stat().st_dev)
        leader = self.ranks.gather(node).index(node)
        where = f" on {node[0]}" if self.ranks.size > 1 else ""
        found: tuple[Path | None, str, str] = (None, "", "")
        if leader == self.ranks.rank:
            try:
                found = (self.place.fetch(name), "", "")
            except DamagedError as error:
                found = (None, f"{error}{where}", "")
            except StorageError as error:
                found = (None, "", str(error))
        everywhere = self.ranks.gather(found)
        for _, _, failure in everywhere:
            if failure:
                raise StorageError(failure)
        faults = [damage for _, damage, _ in everywhere if damage]
        return (None, faults[0]) if faults else (everywhere[leader][0], "")

    def _on_first(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on rank 0, on every rank, and its failure likewise: none runs ahead into it."""
        found: tuple[T | None, str] = (None, "")
        if self.ranks.rank == 0:
            try:
                found = (work(), "")
            except StorageError as error:
                found = (None, str(error))
        value, fault = self.ranks.gather(found)[0]
        if fault:
            raise StorageError(fault)
        return value  # type: ignore[no-any-return]


def value_of(metrics: Mapping[str, float], metric: str) -> float | None:
    """A metric by its name, else the first whose name begins so."""
    return metrics.get(metric, next((value for name, value in metrics.items() if name.startswith(metric)), None))
