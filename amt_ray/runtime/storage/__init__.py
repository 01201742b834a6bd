"""Where checkpoints are kept: a local or shared folder, ``s3://``, ``gs://``; each whole or not there at all."""

import os
import tempfile
from pathlib import Path

from amt_ray.runtime.storage.checkpoints import AfterSave, Best, Stored, StoredCheckpoints, to_stderr
from amt_ray.runtime.storage.manifest import MANIFEST, DamagedError, Manifest, StorageError
from amt_ray.runtime.storage.places import COPIES, COPY_PREFIX, download, joined, opened, read_manifest
from amt_ray.secret import without_secrets

__all__ = [
    "AfterSave",
    "Best",
    "DamagedError",
    "Manifest",
    "StorageError",
    "Stored",
    "StoredCheckpoints",
    "fetched",
    "joined",
    "storage_environment",
    "to_stderr",
]

VARIABLES = (
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_EC2_METADATA_DISABLED",
)


def fetched(source: str | Path) -> Path:
    """A path on this machine of weights that are named: a file or a folder, here or in an object store.

    A checkpoint is verified by its manifest; one of an earlier version, which has none, is taken as it is.

    Raises:
        StorageError: If it cannot be read, or is damaged.
    """
    filesystem, place = opened(str(source))
    path = Path(place).expanduser()
    if filesystem is not None:
        copy = tempfile.TemporaryDirectory(prefix=COPY_PREFIX)
        COPIES.add(copy)
        download(filesystem, place, Path(copy.name), str(source))
        file = Path(copy.name) / path.name
        path = file if file.is_file() else Path(copy.name)
    if (path / MANIFEST).is_file():
        try:
            read_manifest(path).verify(path)
        except DamagedError as error:
            raise StorageError(f"the checkpoint {source} must be whole: {error}.") from error
    return path


def storage_environment() -> dict[str, str]:
    """Where the object store is, for workers on other nodes; its keys are the nodes' own."""
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {name: value for name, value in found.items() if without_secrets(value) == value}
