"""CIFAR-10 (Krizhevsky 2009): torchvision's own files, downloaded where there is a network, or a folder of images."""

from pathlib import Path
from urllib.error import URLError

import numpy as np
from PIL import Image
from torchvision import datasets

from amt_ray.core.datasets import Source
from amt_ray.core.datasets.imagefolder import SPLIT_FOLDERS, folder_source


class CIFAR10:
    """50,000 train and 10,000 test images of 32 x 32 pixels in 10 classes.

    Args:
        root: A folder with ``train/<class>/*`` and ``test/<class>/*``, or the folder in which torchvision keeps (or is
            to put) ``cifar-10-batches-py``.

    Raises:
        ValueError: If the files are neither there nor to be had.
    """

    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)

    def __init__(self, root: str | None = None) -> None:
        self.root = Path(root or "data").expanduser()
        self.is_folder = (self.root / "train").is_dir()

    def split(self, name: str) -> Source:
        """The train or test split."""
        if self.is_folder:
            folder = next((f for f in SPLIT_FOLDERS[name] if (self.root / f).is_dir()), None)
            if folder is None:
                raise KeyError(name)
            return folder_source(self.root / folder)
        data = self._torchvision(train={"train": True, "test": False}[name])
        return Source(
            count=len(data.data),
            open=lambda i: Image.fromarray(data.data[i]),
            name=lambda i: f"cifar10/{name}/{i}",
            labels=np.asarray(data.targets, dtype=np.int64),
            classes=tuple(data.classes),
            fingerprint=f"cifar10-{name}-1",
        )

    def _torchvision(self, train: bool) -> datasets.CIFAR10:
        try:
            return datasets.CIFAR10(self.root, train=train, download=True)
        except (URLError, OSError, RuntimeError) as error:
            raise ValueError(
                f"data.root must hold CIFAR-10 (train/<class>/*, or cifar-10-batches-py) where it cannot be "
                f"downloaded, got {self.root} ({error})."
            ) from error
