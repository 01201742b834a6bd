"""Sources of images, one a file.

The contract (`tests/core/test_datasets_contract.py` checks the files that need no network): a class whose lower-cased
name is the file's name without underscores, with ``mean`` and ``std`` of its pixels in [0, 1] and
``split(name) -> Source`` for ``train`` and, where the data has one, ``test`` (KeyError where it has none).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Source:
    """The images of one split, before decoding.

    Attributes:
        count: Number of images.
        open: Image ``i`` as a PIL image; may raise OSError for a broken file.
        name: What image ``i`` is called in messages, a path for instance.
        labels: [count] int64 class indices, or None where the data has no labels.
        classes: Class names; empty without labels.
        fingerprint: Changes whenever the images do; the key of the decoded copy.
    """

    count: int
    open: Callable[[int], Image.Image]
    name: Callable[[int], str]
    labels: np.ndarray | None
    classes: tuple[str, ...]
    fingerprint: str


class Dataset(Protocol):
    """What a file in this folder offers."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def split(self, name: str) -> Source: ...
