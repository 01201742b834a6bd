"""Sources of images, one a file.

The contract (`tests/core/test_datasets_contract.py` checks the files that need no network): a class whose lower-cased
name is the file's name without underscores, with ``mean`` and ``std`` of its pixels in [0, 1] and
``split(name) -> Source`` for ``train`` and, where the data has them, ``val`` and ``test`` (KeyError where it has none).
``val`` is measured as ``eval/``, in the place of images held out of ``train``; data with one labelled split beside
``train`` offers it as ``test``. Data with images that only pretraining uses names their split in ``pretrain_split``.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
UNKNOWN = 255  # in a label map: a pixel whose class is not known; neither learned from nor measured


@dataclass(frozen=True)
class Objects:
    """What is known to be in one image, in pixels of the image as it was opened.

    Attributes:
        size: Rows and columns of the image.
        boxes: [k, 4] float32: left, top, right, bottom, the last two exclusive.
        labels: [k] int64, indices into the source's ``object_classes``.
        masks: [k, rows, columns] bool, or None where only boxes are known.
        crowd: [k] bool, groups of objects that nobody told apart: not learned from, and no mistake where found. None
            where there are none.
    """

    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None = None
    crowd: np.ndarray | None = None


@dataclass(frozen=True)
class Source:
    """The images of one split, before decoding.

    Attributes:
        count: Number of images.
        open: Image ``i``, upright, in RGB; raises what PIL raises (mostly OSError) for a broken file. Files are
            opened by `amt_ray.core.pixels.open_rgb`; where they may have more than 8 bits, ``open`` takes the range of
            their values as a second argument.
        name: What image ``i`` is called in messages, a path for instance.
        labels: [count] int64 class indices, or None where the data has no labels.
        classes: Class names; empty without labels.
        fingerprint: Changes whenever the images do, or the files that tell what they show; the key of the decoded copy.
        objects: The objects of image ``i``, or None where none are known.
        object_classes: Names of the objects' classes.
        labelmap: The class of each pixel of image ``i``, [rows, columns] uint8 indices into ``labelmap_classes`` or
            ``UNKNOWN``; None where none are known.
        labelmap_classes: Names of the pixels' classes.
        annotated: The objects of image ``i`` as its annotators left them, which average precision is measured against:
            boxes may reach over the border or have no area. None where ``objects`` are just that.
        maskless: Where some objects have a mask and others none, the first without; None otherwise.
        folder: The name of the split's folder; empty where it has none of its own.
        notes: What was skipped, or is otherwise than it seems, a line each.
    """

    count: int
    open: Callable[..., Image.Image]
    name: Callable[[int], str]
    labels: np.ndarray | None
    classes: tuple[str, ...]
    fingerprint: str
    objects: Callable[[int], Objects] | None = None
    object_classes: tuple[str, ...] = ()
    labelmap: Callable[[int], np.ndarray] | None = None
    labelmap_classes: tuple[str, ...] = ()
    annotated: Callable[[int], Objects] | None = None
    maskless: str | None = None
    folder: str = ""
    notes: tuple[str, ...] = ()


class Dataset(Protocol):
    """What a file in this folder offers."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def split(self, name: str) -> Source: ...


def missing(what: str, root: Path, looked_for: Path, command: str) -> ValueError:
    """The error for data that is not where it should be: what, where it was looked for, how to get it."""
    return ValueError(f"data.root must hold {what}, got {root} (looked for {looked_for}). {command}")


def stat_fingerprint(name: str, folder: Path, files: Iterable[str]) -> str:
    """A fingerprint from names, sizes and times of files below a folder; none is opened.

    Args:
        name: Begins the fingerprint.
        folder: The folder.
        files: Paths relative to it. One that cannot be looked at (a broken link) counts by its name.
    """
    top = str(folder.resolve())
    digest = hashlib.sha256(f"{name}\0{top}".encode())
    for file in files:
        try:
            stat = os.stat(os.path.join(top, file))
            digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(f"{file}\0\n".encode())
    return f"{name}-{digest.hexdigest()[:24]}"
