"""Images of another shape than the model's input: how many there are, and cutting them to it.

Images are stored at one size. Those of another aspect (columns over rows) are squashed, or cut to their centre first;
their objects and label maps are cut alike.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from amt_ray.core.datasets import Objects, Source

TOLERANCE = 1.01  # a stretch of less than this is none: sides of whole pixels have no exact aspect
Size = tuple[int, int]


def stretch(shape: Size, size: Size) -> float:
    """How many times longer one side gets than the other where ``shape`` becomes ``size`` (rows, columns); 1: none."""
    ratio = shape[1] * size[0] / (shape[0] * size[1])
    return max(ratio, 1 / ratio)


class OtherShapes(NamedTuple):
    """Images of another aspect than the input's.

    Attributes:
        number: How many there are.
        images: Of how many.
        first: Index of the first; -1 where there is none.
        median: Median stretch of those that there are.
        greatest: Greatest stretch.
    """

    number: int
    images: int
    first: int = -1
    median: float = 1.0
    greatest: float = 1.0


def other_shapes(sizes: Mapping[Size, tuple[int, int]], size: Size) -> OtherShapes:
    """Which images are stretched to get to ``size``.

    Args:
        sizes: How many images have these rows and columns, and the first that does.
        size: Rows and columns of the input.
    """
    images = sum(count for count, _ in sizes.values())
    found = sorted((stretch(shape, size), *known) for shape, known in sizes.items() if stretch(shape, size) > TOLERANCE)
    if not found:
        return OtherShapes(0, images)
    stretches, counts, firsts = map(np.array, zip(*found, strict=True))
    median = float(np.median(np.repeat(stretches, counts)))
    return OtherShapes(int(counts.sum()), images, int(firsts.min()), median, float(stretches[-1]))


def window(shape: Size, size: Size) -> tuple[int, int, int, int]:
    """Left, top, right and bottom (the last two exclusive) of an image's largest centre with the aspect of ``size``.

    Resized to ``size``, it is what resizing the short side and cutting the centre gives.
    """
    rows, columns = shape
    height = min(rows, max(1, round(columns * size[0] / size[1])))
    width = min(columns, max(1, round(rows * size[1] / size[0])))
    left, top = (columns - width) // 2, (rows - height) // 2
    return left, top, left + width, top + height


def cut(source: Source, size: Size) -> Source:
    """The source with objects and label maps of the images' centres, as they are decoded with ``crop``."""
    objects, labelmap = source.objects, source.labelmap
    return dataclasses.replace(
        source,
        objects=objects and (lambda i: cut_objects(objects(i), size)),
        labelmap=labelmap and _cut_maps(labelmap, size),
    )


def _cut_maps(labelmap: Callable[[int], np.ndarray], size: Size) -> Callable[[int], np.ndarray]:
    def of(i: int) -> np.ndarray:
        whole = labelmap(i)
        left, top, right, bottom = window((whole.shape[0], whole.shape[1]), size)
        return whole[top:bottom, left:right].copy()

    return of


def cut_objects(objects: Objects, size: Size) -> Objects:
    """The objects in an image's centre: boxes clipped to it, those without a pixel in it left out."""
    left, top, right, bottom = window(objects.size, size)
    high = np.array([right - left, bottom - top] * 2, dtype=np.float32)
    boxes = (objects.boxes - np.array([left, top, left, top], dtype=np.float32)).clip(0, high)
    seen = (boxes[:, :2] < boxes[:, 2:]).all(1)
    masks = None if objects.masks is None else objects.masks[:, top:bottom, left:right]
    if masks is not None:
        seen &= masks.any((1, 2))
    return Objects(
        (bottom - top, right - left),
        boxes[seen],
        objects.labels[seen],
        None if masks is None else masks[seen],
        None if objects.crowd is None else objects.crowd[seen],
    )
