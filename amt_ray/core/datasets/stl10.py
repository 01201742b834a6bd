"""STL-10 (Coates, Lee, Ng 2011): 100,000 unlabelled images to pretrain on, few labelled ones to probe with."""

from pathlib import Path

import numpy as np
from PIL import Image

from amt_ray.core.datasets import Source, missing, stat_fingerprint

FOLDER = "stl10_binary"
SIZE_PX = 96
IMAGE_BYTES = 3 * SIZE_PX**2
CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


class STL10:
    """5,000 train, 8,000 test and 100,000 unlabelled images of 96 x 96 pixels; 10 classes.

    The images stay on disk: each is read from its place in the file when it is opened.

    Args:
        root: The folder in which torchvision keeps ``stl10_binary``.
    """

    mean = (0.4467, 0.4398, 0.4066)
    std = (0.2603, 0.2566, 0.2713)
    pretrain_split = "unlabeled"
    published = 100_000

    def __init__(self, root: str | None = None) -> None:
        self.root = Path(root or "data").expanduser()

    def split(self, name: str) -> Source:
        """The train, test or unlabeled split.

        Raises:
            ValueError: If its files are missing, cut short, or do not belong together.
        """
        pixels = self._pixels({"train": "train_X.bin", "test": "test_X.bin", "unlabeled": "unlabeled_X.bin"}[name])
        labels = None if name == "unlabeled" else self._labels(f"{name}_y.bin", len(pixels))
        return Source(
            count=len(pixels),
            open=lambda i: Image.fromarray(np.ascontiguousarray(pixels[i].transpose(2, 1, 0))),
            name=lambda i: f"stl10/{name}/{i}",
            labels=labels,
            classes=() if labels is None else CLASSES,
            fingerprint=stat_fingerprint(f"stl10-{name}", self.root / FOLDER, [f"{name}_X.bin", f"{name}_y.bin"]),
        )

    def _file(self, name: str) -> Path:
        path = self.root / FOLDER / name
        if not path.is_file():
            command = f'python -c "import torchvision; torchvision.datasets.STL10({str(self.root)!r}, download=True)"'
            raise missing("STL-10 as torchvision keeps it", self.root, path, command)
        return path

    def _pixels(self, name: str) -> np.ndarray:
        """[n, channel, column, row]: the files hold each channel column by column."""
        path = self._file(name)
        count, rest = divmod(path.stat().st_size, 3 * SIZE_PX**2)
        if rest or not count:
            raise ValueError(
                f"{path} must hold whole images of {3 * SIZE_PX**2} bytes, got {path.stat().st_size} bytes."
            )
        return np.memmap(path, dtype=np.uint8, mode="r", shape=(count, 3, SIZE_PX, SIZE_PX))

    def _labels(self, name: str, count: int) -> np.ndarray:
        path = self._file(name)
        labels = np.fromfile(path, dtype=np.uint8).astype(np.int64) - 1
        if len(labels) != count or labels.min() < 0 or labels.max() >= len(CLASSES):
            raise ValueError(f"{path} must hold {count} labels of 1 to {len(CLASSES)}, got {len(labels)} bytes.")
        return labels
