"""Folders of checkpoints: on a file system (this machine's or a shared one), or in an object store.

In both, a name that `names` gives is a checkpoint that was written to its end. On a file system it got that name by
a rename after all its bytes were on the disk; in an object store, where nothing can be renamed, its manifest is
uploaded after everything else.
"""

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

import pyarrow as pa
from pyarrow import fs

from amt_ray.runtime.storage.manifest import MANIFEST, DamagedError, Manifest, StorageError
from amt_ray.secret import refuse_secrets

PARTIAL = ".partial"
COPY_PREFIX = "amt_ray-checkpoint-"
NAME = re.compile(r"epoch_(\d{5,})")
CHUNK_BYTES = 32 << 20  # a request of a download; pyarrow's own 1 MB would make a thousand of a checkpoint
FULL_BYTES = 1 << 20  # with less than this left, a write that failed did so for want of room
COPIES: set[tempfile.TemporaryDirectory[str]] = set()  # they live as long as the process, where nothing releases them
UNREACHABLE = (OSError, pa.ArrowException)


class Place(Protocol):
    """A folder of checkpoints. All methods raise `StorageError` where the storage fails."""

    uri: str

    def names(self) -> list[str]:
        """The checkpoints that were written to their end, oldest first."""
        ...

    def manifest(self, name: str) -> Manifest:
        """What a checkpoint consists of.

        Raises:
            DamagedError: If it has no manifest that can be read.
        """
        ...

    def fetch(self, name: str) -> Path:
        """A folder of this machine with the checkpoint, verified; where it is a copy, it stays until `release`.

        Raises:
            DamagedError: If it is not what its manifest says.
        """
        ...

    def release(self) -> None:
        """Delete the copies."""
        ...

    def staging(self, name: str) -> AbstractContextManager[Path]:
        """An empty folder of this machine to write a checkpoint into; gone afterwards."""
        ...

    def commit(self, name: str, staged: Path, manifest: Manifest) -> None:
        """Make what was staged the checkpoint of that name, whole or not at all."""
        ...

    def remove(self, name: str) -> None:
        """Delete a checkpoint."""
        ...

    def tidy(self) -> None:
        """Delete what interrupted writes left."""
        ...


class FolderPlace:
    """A folder of a file system: of this machine, or one that all nodes mount."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.uri = folder.absolute(), str(folder.absolute())

    def names(self) -> list[str]:
        with failing(f"checkpoints must be readable at {self.uri}"):
            found = [path.name for path in self.folder.iterdir() if path.is_dir()] if self.folder.is_dir() else []
        return by_epoch(found)

    def manifest(self, name: str) -> Manifest:
        return read_manifest(self.folder / name)

    def fetch(self, name: str) -> Path:
        self.manifest(name).verify(self.folder / name)
        return self.folder / name

    def release(self) -> None:
        """There are no copies."""

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        partial = self._hidden(name)
        try:
            with failing(f"checkpoints must be writable at {self.uri}"):
                partial.mkdir(parents=True)
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def commit(self, name: str, staged: Path, manifest: Manifest) -> None:
        target, old = self.folder / name, self._hidden(name)
        (staged / MANIFEST).write_bytes(manifest.to_json())
        for path in (*staged.iterdir(), staged):
            synced(path)
        if target.exists():
            target.rename(old)
        staged.rename(target)
        synced(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def remove(self, name: str) -> None:
        hidden = self._hidden(name)
        with failing(f"checkpoints must be removable at {self.uri}"):
            (self.folder / name).rename(hidden)  # half of a checkpoint must never lie under its name
            shutil.rmtree(hidden)

    def tidy(self) -> None:
        for path in self.folder.glob(f".*{PARTIAL}"):
            shutil.rmtree(path, ignore_errors=True)

    def _hidden(self, name: str) -> Path:
        return self.folder / f".{name}-{secrets.token_hex(4)}{PARTIAL}"


class ObjectPlace:
    """A prefix of an object store (``s3://``, ``gs://``)."""

    def __init__(self, filesystem: fs.FileSystem, path: str, uri: str) -> None:
        self.filesystem, self.path, self.uri = filesystem, path.rstrip("/"), uri
        self.copies: list[tempfile.TemporaryDirectory[str]] = []

    def names(self) -> list[str]:
        with failing(f"checkpoints must be readable at {self.uri}"):
            selector = fs.FileSelector(self.path, allow_not_found=True, recursive=True)
            files = [Path(info.path) for info in self.filesystem.get_file_info(selector)]
        whole = (file.parent for file in files if file.name == MANIFEST)
        return by_epoch(folder.name for folder in whole if str(folder.parent) == self.path)

    def manifest(self, name: str) -> Manifest:
        try:
            with (
                failing(f"checkpoints must be readable at {self.uri}", but=FileNotFoundError),
                self.filesystem.open_input_stream(f"{self.path}/{name}/{MANIFEST}") as stream,
            ):
                return Manifest.from_json(stream.read())
        except FileNotFoundError as error:
            raise DamagedError(f"{MANIFEST} must be there, got none") from error

    def fetch(self, name: str) -> Path:
        manifest = self.manifest(name)
        copy = tempfile.TemporaryDirectory(prefix=COPY_PREFIX)
        try:
            download(self.filesystem, f"{self.path}/{name}", Path(copy.name), joined(self.uri, name))
            manifest.verify(Path(copy.name))
        except BaseException:
            copy.cleanup()
            raise
        self.copies.append(copy)
        COPIES.add(copy)
        return Path(copy.name)

    def release(self) -> None:
        for copy in self.copies:
            COPIES.discard(copy)
            copy.cleanup()
        self.copies.clear()

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix=COPY_PREFIX, ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    def commit(self, name: str, staged: Path, manifest: Manifest) -> None:
        target = f"{self.path}/{name}"
        self._forget(name)
        try:
            fs.copy_files(str(staged), target, fs.LocalFileSystem(), self.filesystem)
            for file, entry in manifest.files.items():
                size = self.filesystem.get_file_info(f"{target}/{file}").size
                if size != entry.size:
                    raise StorageError(f"{file} must arrive with {entry.size} bytes, got {size}")
            with self.filesystem.open_output_stream(f"{target}/{MANIFEST}") as stream:
                stream.write(manifest.to_json())
        except BaseException:
            with suppress(*UNREACHABLE):
                self._forget(name)
                self.filesystem.delete_dir(target)
            raise

    def remove(self, name: str) -> None:
        with failing(f"checkpoints must be removable at {self.uri}"):
            self._forget(name)
            self.filesystem.delete_dir(f"{self.path}/{name}")

    def tidy(self) -> None:
        whole = set(self.names())
        with failing(f"checkpoints must be removable at {self.uri}"):
            for info in self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True)):
                ours = info.type == fs.FileType.Directory and NAME.fullmatch(info.base_name)
                if ours and info.base_name not in whole:
                    self.filesystem.delete_dir(info.path)

    def _forget(self, name: str) -> None:
        """Take the manifest away, and with it the checkpoint; the files may follow."""
        manifest = f"{self.path}/{name}/{MANIFEST}"
        if self.filesystem.get_file_info(manifest).type == fs.FileType.File:
            self.filesystem.delete_file(manifest)


def opened(uri: str) -> tuple[fs.FileSystem | None, str]:
    """The object store of an address and the path in it, or None and the path of this machine's file system.

    Raises:
        StorageError: If no file system has such an address, or it carries a password.
    """
    if "://" not in uri:
        return None, uri
    try:
        refuse_secrets("an address of checkpoints", uri)
    except ValueError as error:
        raise StorageError(str(error)) from None
    with failing(f"storage must be a path, s3:// or gs://, got {uri}"):
        filesystem, path = fs.FileSystem.from_uri(uri)
    return (None if isinstance(filesystem, fs.LocalFileSystem) else filesystem), path


def place_of(uri: str) -> Place:
    """The place at a path or an address."""
    filesystem, path = opened(uri)
    return FolderPlace(Path(path)) if filesystem is None else ObjectPlace(filesystem, path, uri)


def name_of(epoch: int) -> str:
    """Name of an epoch's folder."""
    return f"epoch_{epoch:05d}"


def by_epoch(names: Iterable[str]) -> list[str]:
    """The names of checkpoints among some, oldest first."""
    return sorted(filter(NAME.fullmatch, names), key=lambda name: int(name.removeprefix("epoch_")))


def joined(uri: str, *parts: str) -> str:
    """A place within a place; the query of an address stays at its end."""
    if "://" not in uri:
        return str(Path(uri, *parts))
    address, mark, query = uri.partition("?")
    return "/".join([address.rstrip("/"), *parts]) + mark + query


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a folder of this machine.

    Raises:
        DamagedError: If there is none, or it is damaged.
    """
    try:
        with failing(f"checkpoints must be readable at {folder}", but=FileNotFoundError):
            return Manifest.from_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise DamagedError(f"{MANIFEST} must be there, got none") from error


def download(filesystem: fs.FileSystem, path: str, folder: Path, source: str) -> None:
    """Copy a folder, or one file, of an object store into a folder of this machine."""
    with failing(f"a checkpoint must be readable at {source}"):
        target = folder if filesystem.get_file_info(path).type == fs.FileType.Directory else folder / Path(path).name
        fs.copy_files(path, str(target), filesystem, fs.LocalFileSystem(), chunk_size=CHUNK_BYTES)


def synced(path: Path) -> None:
    """Have the system put a file, or a folder's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def failing(rule: str, but: type[Exception] | tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn the file system's errors, ``but`` some, into a `StorageError` that starts with the rule."""
    try:
        yield
    except but:
        raise
    except UNREACHABLE as error:
        raise StorageError(f"{rule} ({reason(error)}).") from error


def reason(error: BaseException, folder: Path | None = None) -> str:
    """Why something failed, on one line.

    Args:
        error: What was raised; torch's own error of a full disk, for one, does not say so.
        folder: Where it was writing.
    """
    with suppress(OSError):
        if folder is not None and shutil.disk_usage(folder).free < FULL_BYTES:
            return f"no space left on the device of {folder}"
    text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return text[:300].rstrip(". ")
