"""CIFAR-10 (Krizhevsky 2009): torchvision's own files, downloaded where there is a network, or a folder of images."""

import functools
import os
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
from PIL import Image
from torchvision import datasets

from amt_ray.core.datasets import Source, missing, stat_fingerprint
from amt_ray.core.datasets.imagefolder import split_sources
from amt_ray.core.folders import split_folders


class CIFAR10:
    """50,000 train and 10,000 test images of 32 x 32 pixels in 10 classes.

    Args:
        root: A folder with ``train/<class>/*`` and ``test/<class>/*`` (named as for ``imagefolder``), or the folder in
            which torchvision keeps (or is to put) ``cifar-10-batches-py``.

    Raises:
        ValueError: If the files are neither there nor to be had.
    """

    mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465)
    std: tuple[float, ...] = (0.2470, 0.2435, 0.2616)
    published = 50_000
    files: Any = datasets.CIFAR10

    def __init__(self, root: str | None = None) -> None:
        self.root = Path(root or "data").expanduser()
        self.is_folder = "train" in split_folders(self.root)

    @functools.cached_property
    def _splits(self) -> dict[str, Source]:
        return split_sources(self.root)

    def split(self, name: str) -> Source:
        """The train or test split, and the val split of a folder that has one."""
        if self.is_folder:
            return self._splits[name]
        return torchvision_source(self.files, self.root, name, self.files.base_folder)


def torchvision_source(files: Any, root: Path, split: str, keeps: str) -> Source:
    """The train or test split of a small data set that torchvision keeps in memory.

    Args:
        files: The class in ``torchvision.datasets``, with ``train`` and ``download`` among its arguments.
        root: Where it keeps its files, or is to put them.
        split: ``train`` or ``test``.
        keeps: The folder that it makes in ``root``.

    Raises:
        ValueError: If the files are neither there nor to be had.
    """
    train = {"train": True, "test": False}[split]
    try:
        data = files(root, train=train, download=True)
    except (URLError, OSError, RuntimeError) as error:
        title = files.__name__
        command = f'python -c "import torchvision; torchvision.datasets.{title}({str(root)!r}, download=True)"'
        raise missing(f"{title} as torchvision keeps it", root, root / keeps, command) from error
    pixels, name = np.asarray(data.data), f"{files.__name__.lower()}-{split}"
    return Source(
        count=len(pixels),
        open=lambda i: Image.fromarray(pixels[i]).convert("RGB"),
        name=lambda i: f"{name}/{i}",
        labels=np.asarray(data.targets, dtype=np.int64),
        classes=tuple(data.classes),
        fingerprint=stat_fingerprint(
            f"{files.__name__.lower()}-{split}", root / keeps, sorted(os.listdir(root / keeps))
        ),
    )
