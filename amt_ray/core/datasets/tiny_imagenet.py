"""Tiny ImageNet (Stanford CS231n): 200 classes of ImageNet at 64 x 64 pixels, one object box an image."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from amt_ray.core.datasets import Objects, Source, missing, stat_fingerprint
from amt_ray.core.datasets.imagefolder import folder_source
from amt_ray.core.pixels import ValueRange

SIZE_PX = 64
ARCHIVE = "tiny-imagenet-200"
Box = tuple[int, ...]


class TinyImageNet:
    """100,000 train images, and the 10,000 labelled images of ``val`` as the test split; boxes for all.

    Args:
        root: The folder with ``wnids.txt``, ``words.txt``, ``train`` and ``val``, or the one in which the archive was
            unpacked. Fewer classes than 200 are taken as they are.

    Raises:
        ValueError: If the files are missing or do not belong together.
    """

    mean = (0.4802, 0.4481, 0.3975)
    std = (0.2770, 0.2691, 0.2821)
    published = 100_000

    def __init__(self, root: str | None = None) -> None:
        given = Path(root or "data").expanduser()
        self.root = next((r for r in (given, given / ARCHIVE) if (r / "wnids.txt").is_file()), given)
        if not (self.root / "wnids.txt").is_file():
            command = f"curl -O http://cs231n.stanford.edu/{ARCHIVE}.zip && unzip {ARCHIVE}.zip -d {given}"
            raise missing("Tiny ImageNet", given, given / "wnids.txt", command)
        self.wnids = tuple(sorted((self.root / "wnids.txt").read_text().split()))

    def split(self, name: str) -> Source:
        """The train or test split."""
        source, boxes = {"train": self._train, "test": self._val}[name]()
        assert source.labels is not None
        files = [Path(source.name(i)).name for i in range(source.count)]
        if unknown := [file for file in files if file not in boxes]:
            raise ValueError(
                f"every image must have a line in the text files of boxes, got {len(unknown)} of {len(files)} without, "
                f"first: {source.name(files.index(unknown[0]))}."
            )
        return dataclasses.replace(
            source,
            open=lambda i, value_range=None: _sized(source.open, i, value_range),
            fingerprint=stat_fingerprint(source.fingerprint, self.root, self._texts(name)),
            objects=_objects([boxes[file] for file in files], source.labels),
            object_classes=self._words(),
        )

    def _texts(self, split: str) -> list[str]:
        """The files of a split's boxes, relative to the root."""
        of_classes = [f"train/{wnid}/{wnid}_boxes.txt" for wnid in self.wnids]
        return of_classes if split == "train" else ["val/val_annotations.txt"]

    def _train(self) -> tuple[Source, dict[str, Box]]:
        source = folder_source(self.root / "train", reads=("_boxes.txt",))
        if source.classes != self.wnids:
            raise ValueError(
                f"train must hold the {len(self.wnids)} class folders of wnids.txt, got {len(source.classes)} folders "
                f"in {self.root / 'train'}."
            )
        boxes: dict[str, Box] = {}
        for wnid in self.wnids:
            boxes |= {row[0]: _box(row) for row in _rows(self.root / "train" / wnid / f"{wnid}_boxes.txt")}
        return source, boxes

    def _val(self) -> tuple[Source, dict[str, Box]]:
        source = dataclasses.replace(folder_source(self.root / "val" / "images"), folder="val")
        rows = {row[0]: row for row in _rows(self.root / "val" / "val_annotations.txt")}
        number = {wnid: i for i, wnid in enumerate(self.wnids)}
        files = [Path(source.name(i)).name for i in range(source.count)]
        labels = np.array([number[rows[file][1]] if file in rows else 0 for file in files], dtype=np.int64)
        boxes = {file: _box(row) for file, row in rows.items()}
        return dataclasses.replace(source, labels=labels, classes=self.wnids), boxes

    def _words(self) -> tuple[str, ...]:
        words = dict(line.split("\t", 1) for line in (self.root / "words.txt").read_text().splitlines() if line)
        return tuple(words.get(wnid, wnid) for wnid in self.wnids)


def _rows(path: Path) -> list[list[str]]:
    if not path.is_file():
        raise ValueError(f"Tiny ImageNet must have its text files of boxes, found no {path}.")
    return [line.split("\t") for line in path.read_text().splitlines() if line]


def _box(row: list[str]) -> Box:
    left, top, right, bottom = map(int, row[-4:])
    return left, top, right + 1, bottom + 1  # the files name the last column and row inside: 63 for a whole side


def _sized(open: Callable[..., Image.Image], i: int, value_range: ValueRange | None) -> Image.Image:
    image = open(i, value_range)
    if image.size != (SIZE_PX, SIZE_PX):  # the boxes would lie elsewhere
        raise ValueError(f"it must have {SIZE_PX} x {SIZE_PX} pixels, got {image.height} x {image.width}")
    return image


def _objects(boxes: list[Box], labels: np.ndarray) -> Callable[[int], Objects]:
    boxes_n4 = np.array(boxes, dtype=np.float32)
    return lambda i: Objects((SIZE_PX, SIZE_PX), boxes_n4[i : i + 1], labels[i : i + 1])
