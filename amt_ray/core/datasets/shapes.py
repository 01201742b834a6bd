"""Coloured shapes on noise, drawn on demand: every mask, box and class is known exactly, and nothing is downloaded."""

import math

import numpy as np
from PIL import Image, ImageDraw

from amt_ray.core.datasets import Objects, Source

CLASSES = ("circle", "square", "triangle", "star", "cross")
LEAST_PX = 16
RADIUS = (0.12, 0.30)  # of the image's side
TEXTURE_CELLS = 6
TEXTURE_SPAN = 0.35  # of the grey scale
NOISE_SPAN = 0.12


class Shapes:
    """One to ``max_objects`` shapes an image; the label is the class of the one with the most visible pixels.

    An image is a function of seed, split and index alone. Colours say nothing about classes. Shapes lie wholly inside
    the image; a later one hides what is under it, and one hidden whole is no object.

    Args:
        root: Not used; the images are drawn.
        count_train: Number of train images.
        count_test: Number of test images.
        size_px: Rows and columns.
        max_objects: Most shapes drawn in an image.
        seed: Of all draws.

    Raises:
        ValueError: If a number is too small to draw with.
    """

    mean = (0.5, 0.5, 0.5)
    std = (0.29, 0.29, 0.29)

    def __init__(
        self,
        root: str | None = None,
        count_train: int = 2000,
        count_test: int = 500,
        size_px: int = 64,
        max_objects: int = 3,
        seed: int = 0,
    ) -> None:
        if min(count_train, count_test, max_objects) < 1 or size_px < LEAST_PX or seed < 0:
            raise ValueError(
                f"shapes must have counts and max_objects of 1 or more, size_px of {LEAST_PX} or more and no negative "
                f"seed, got {count_train}, {count_test}, {max_objects}, {size_px} and {seed}."
            )
        self.counts = {"train": count_train, "test": count_test}
        self.size_px, self.max_objects, self.seed = size_px, max_objects, seed

    def split(self, name: str) -> Source:
        """The train or test split; its labels need every image's shapes placed, about 0.2 ms each."""
        count = self.counts[name]

        def generator(i: int) -> np.random.Generator:
            return np.random.default_rng((self.seed, list(self.counts).index(name), i))

        def objects(i: int) -> Objects:
            return _objects(*_place(generator(i), self.size_px, self.max_objects))

        def draw(i: int) -> Image.Image:
            random = generator(i)
            return _paint(_place(random, self.size_px, self.max_objects)[1], random)

        return Source(
            count=count,
            open=draw,
            name=lambda i: f"shapes/{name}/{i}",
            labels=np.array([_largest(objects(i)) for i in range(count)], dtype=np.int64),
            classes=CLASSES,
            fingerprint=f"shapes-{name}-{count}-{self.size_px}-{self.max_objects}-{self.seed}-1",
            objects=objects,
            object_classes=CLASSES,
            labelmap=lambda i: _labelmap(objects(i)),
            labelmap_classes=("background", *CLASSES),
        )


def outline(shape: str) -> np.ndarray:
    """Corners [k, 2] of a shape of ``CLASSES`` whose farthest ones lie on the unit circle."""
    if shape == "cross":
        arm, end = 0.32, math.sqrt(1 - 0.32**2)
        quarter = np.array([(end, -arm), (end, arm), (arm, arm)])
        turn = np.array([(0, 1), (-1, 0)])
        return np.concatenate([quarter @ np.linalg.matrix_power(turn, q) for q in range(4)])
    corners = {"circle": 48, "square": 4, "triangle": 3, "star": 10}[shape]
    angles = np.arange(corners) * (2 * math.pi / corners)
    radii = np.where(np.arange(corners) % 2, 0.45, 1.0) if shape == "star" else np.ones(corners)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


OUTLINES = tuple(outline(shape) for shape in CLASSES)


def _place(random: np.random.Generator, size_px: int, max_objects: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes [k] and visible masks [k, rows, columns] of the shapes, in the order of drawing."""
    count = 1 + int(random.random() * max_objects)
    draws = random.random((max_objects, 5))[:count]
    kinds = (draws[:, 0] * len(CLASSES)).astype(np.int64)
    masks = np.stack([_mask(kind, draw, size_px) for kind, draw in zip(kinds, draws[:, 1:])])
    hidden = np.zeros_like(masks)
    hidden[:-1] = np.logical_or.accumulate(masks[:0:-1])[::-1]
    return kinds, masks & ~hidden


def _mask(kind: int, draw: np.ndarray, size_px: int) -> np.ndarray:
    radius = (RADIUS[0] + (RADIUS[1] - RADIUS[0]) * draw[0]) * (size_px - 1)
    centre = radius + draw[1:3] * (size_px - 1 - 2 * radius)
    turn = draw[3] * 2 * math.pi
    turned = OUTLINES[kind] @ np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    canvas = Image.new("1", (size_px, size_px))
    ImageDraw.Draw(canvas).polygon([tuple(p) for p in centre + radius * turned], fill=1)
    return np.array(canvas)


def _paint(masks: np.ndarray, random: np.random.Generator) -> Image.Image:
    size_px = masks.shape[1]
    ground = random.random(3)
    texture = Image.fromarray((random.random((TEXTURE_CELLS, TEXTURE_CELLS, 3)) * 255).astype(np.uint8))
    smooth = np.asarray(texture.resize((size_px, size_px), Image.Resampling.BICUBIC)) / 255 - 0.5
    pixels = ground + TEXTURE_SPAN * smooth
    for mask in masks:
        # at least a quarter of the scale, taken as a ring, from the ground in every channel
        pixels[mask] = (ground + 0.25 + 0.5 * random.random(3)) % 1
    pixels += NOISE_SPAN * (random.random(pixels.shape) - 0.5)
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def _objects(kinds: np.ndarray, masks: np.ndarray) -> Objects:
    seen = masks.reshape(len(masks), -1).any(1)
    return Objects((masks.shape[1], masks.shape[2]), boxes_around(masks[seen]), kinds[seen], masks[seen])


def boxes_around(masks: np.ndarray) -> np.ndarray:
    """The tight boxes [k, 4] (left, top, right, bottom, the last two exclusive) of masks that are not empty."""
    sides = []
    for axis in (1, 2):
        line: np.ndarray = masks.max(axis)
        sides += [line.argmax(1), line.shape[1] - line[:, ::-1].argmax(1)]
    left, right, top, bottom = sides
    return np.stack([left, top, right, bottom], 1).astype(np.float32)


def _labelmap(objects: Objects) -> np.ndarray:
    """0 for the ground, the class + 1 inside a shape; visible masks are apart."""
    assert objects.masks is not None
    found: np.ndarray = (objects.masks * (objects.labels + 1)[:, None, None]).sum(0).astype(np.uint8)
    return found


def _largest(objects: Objects) -> int:
    assert objects.masks is not None
    return int(objects.labels[objects.masks.sum((1, 2)).argmax()])
