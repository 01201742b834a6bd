"""Drawn shapes as a task of dense prediction, and small encoders for it."""

import dataclasses

import numpy as np
import torch

from amt_ray.core.datasets.shapes import Shapes
from amt_ray.core.encoder import Encoder
from amt_ray.core.evals import Task
from amt_ray.core.images import ImageArray


def scene_encoder(size_px=32, patch_size=8, width=32, depth=2, seed=0):
    torch.manual_seed(seed)
    encoder = Encoder(size_px, patch_size, 3, width, depth, 4)
    encoder.init_weights()
    return encoder


def image_array(source):
    pixels = np.stack([np.asarray(source.open(i)).transpose(2, 0, 1) for i in range(source.count)])
    return ImageArray(pixels, source.labels, Shapes.mean, Shapes.std, source.classes)


def scenes(learn, held, test=0, size_px=32, max_objects=2, boxes_only=False, one_class=True):
    """A task on drawn shapes; objects are all of one class, or of the five forms."""
    shapes = Shapes(count_train=learn + held, count_test=max(test, 1), size_px=size_px, max_objects=max_objects)
    sources = [shapes.split("train"), shapes.split("test") if test else None]
    if boxes_only:
        sources = [source and without_masks(source) for source in sources]
    if one_class:
        sources = [source and of_one_class(source) for source in sources]
    arrays = [source and image_array(source) for source in sources]
    index = torch.arange(learn + held)
    return Task(arrays[0], index[:learn], index[learn:], arrays[1], (size_px, size_px), 0, *sources)


def without_masks(source):
    objects = source.objects
    return dataclasses.replace(source, objects=lambda i: dataclasses.replace(objects(i), masks=None))


def of_one_class(source):
    objects, labelmap = source.objects, source.labelmap
    return dataclasses.replace(
        source,
        objects=lambda i: dataclasses.replace(objects(i), labels=np.zeros_like(objects(i).labels)),
        object_classes=("shape",),
        labelmap=lambda i: labelmap(i).clip(0, 1),
        labelmap_classes=("background", "shape"),
    )
