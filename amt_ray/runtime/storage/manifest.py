"""What a checkpoint consists of, by size and SHA-256: its manifest, the file that is written last."""

import errno
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

MANIFEST = "manifest.json"
FORMAT = 1


class StorageError(RuntimeError):
    """A checkpoint could not be written or read; the message is one line for the user."""


class DamagedError(StorageError):
    """A checkpoint is not what its manifest says."""


@dataclass(frozen=True)
class Entry:
    """One file.

    Attributes:
        size: Bytes.
        sha256: Of its content, in hexadecimal.
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A whole checkpoint.

    Attributes:
        epoch: Epochs completed.
        metrics: Finite metrics of that epoch.
        files: Name -> size and checksum; all lie flat in the checkpoint's folder.
    """

    epoch: int
    metrics: Mapping[str, float]
    files: Mapping[str, Entry]

    @classmethod
    def of(cls, folder: Path, epoch: int, metrics: Mapping[str, float]) -> "Manifest":
        """The manifest of the files in a folder."""
        files = {path.name: Entry(path.stat().st_size, sha256(path)) for path in sorted(folder.iterdir())}
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        return cls(epoch, finite, files)

    def to_json(self) -> bytes:
        """The file's content; the manifest has a checksum of its own, for nothing else vouches for it."""
        told = {"format": FORMAT, **asdict(self)}
        return (json.dumps(told | {"sha256": _digest(told)}, indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes) -> "Manifest":
        """Read a manifest.

        Raises:
            DamagedError: If it is not as it was written, or of a format that is not known.
        """
        try:
            told = json.loads(content)
            if told.pop("sha256") != _digest(told):
                raise DamagedError(f"{MANIFEST} must have the checksum that it names")
            if told.pop("format") != FORMAT:
                raise DamagedError(f"{MANIFEST} must be of format {FORMAT}")
            files = {name: Entry(**entry) for name, entry in told.pop("files").items()}
            return cls(files=files, **told)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{MANIFEST} must be readable") from error

    def verify(self, folder: Path) -> None:
        """Compare a folder with the manifest.

        Raises:
            DamagedError: With the first file that is missing or not the one that was written.
        """
        for name, entry in self.files.items():
            file = folder / name
            size = file.stat().st_size if file.is_file() else None
            if size != entry.size:
                raise DamagedError(f"{name} must have {entry.size} bytes, got {'no file' if size is None else size}")
            try:
                found = sha256(file)
            except OSError as error:
                kind = DamagedError if error.errno == errno.EIO else StorageError  # a bad sector
                raise kind(f"{file} must be readable ({error.strerror}).") from error
            if found != entry.sha256:
                raise DamagedError(f"{name} must have the SHA-256 {entry.sha256[:12]}..., got {found[:12]}...")


def sha256(file: Path) -> str:
    """Checksum of a file."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digest(told: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
