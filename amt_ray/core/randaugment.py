"""RandAugment in batch, on the device: timm's operations and strengths, with torchvision's kernels.

Cubuk et al. 2020 (https://arxiv.org/abs/1909.13719) in the variant that MAE, SimMIM and DeiT train with, timm's
``rand-m9-mstd0.5-inc1``: two operations an image from the same fifteen, each applied with probability 0.5, their
strength normal about the magnitude. Images of a batch that draw the same operation share one of `DRAWS` strengths, so
that each kernel runs on many images; an image's own distribution is timm's. Shears, shifts and rotations interpolate
bilinearly (timm: bicubic).
"""

import math
import random
from collections.abc import Callable

import torch
from timm.data.auto_augment import LEVEL_TO_ARG
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

DRAWS = 2
LAYERS = 2
PROBABILITY = 0.5
GREATEST = 10.0
BILINEAR = InterpolationMode.BILINEAR
SOLARIZE_ADD_BELOW = 128


def _moved(images: Tensor, fill: list[float], angle: float = 0.0, **move: list[float]) -> Tensor:
    how = {"translate": [0.0, 0.0], "shear": [0.0, 0.0], **move}
    moved: Tensor = F.affine(images, angle=angle, scale=1.0, interpolation=BILINEAR, fill=fill, **how)
    return moved


def _sheared(images: Tensor, fill: list[float], x: float = 0.0, y: float = 0.0) -> Tensor:
    degrees = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return _moved(images, fill, shear=degrees, center=[0.0, 0.0])


def _solarize_add(images: Tensor, add: int) -> Tensor:
    return torch.where(images < SOLARIZE_ADD_BELOW, (images.int() + add).clamp_max(255).to(images.dtype), images)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "AutoContrast": lambda images, fill: F.autocontrast(images),
    "Equalize": lambda images, fill: F.equalize(images),
    "Invert": lambda images, fill: F.invert(images),
    "Rotate": lambda images, fill, angle: _moved(images, fill, angle=-angle),
    "PosterizeIncreasing": lambda images, fill, bits: F.posterize(images, bits),
    "SolarizeIncreasing": lambda images, fill, threshold: F.solarize(images, threshold),
    "SolarizeAdd": lambda images, fill, add: _solarize_add(images, add),
    "ColorIncreasing": lambda images, fill, factor: F.adjust_saturation(images, factor),
    "ContrastIncreasing": lambda images, fill, factor: F.adjust_contrast(images, factor),
    "BrightnessIncreasing": lambda images, fill, factor: F.adjust_brightness(images, factor),
    "SharpnessIncreasing": lambda images, fill, factor: F.adjust_sharpness(images, factor),
    "ShearX": lambda images, fill, factor: _sheared(images, fill, x=factor),
    "ShearY": lambda images, fill, factor: _sheared(images, fill, y=factor),
    "TranslateXRel": lambda images, fill, share: _moved(images, fill, translate=[-share * images.shape[-1], 0.0]),
    "TranslateYRel": lambda images, fill, share: _moved(images, fill, translate=[0.0, -share * images.shape[-2]]),
}


def arguments(name: str, magnitude: float) -> tuple[float, ...]:
    """timm's arguments of an operation at this magnitude; the sign is drawn."""
    of_level = LEVEL_TO_ARG[name]
    return () if of_level is None else tuple(of_level(magnitude, {}))


def apply(name: str, images_BCYX: Tensor, fill: list[float], *of_operation: float) -> Tensor:
    """One operation on all images."""
    return OPERATIONS[name](images_BCYX, fill, *of_operation)


def rand_augment(
    images_BCYX: Tensor, magnitude: float, fill: list[float], generator: torch.Generator, deviation: float = 0.5
) -> Tensor:
    """Augmented images.

    Args:
        images_BCYX: uint8; not changed.
        magnitude: Mean strength, of at most 10.
        fill: Value of each channel where nothing is left.
        generator: On the CPU; decides what each image gets. Strengths come from Python's `random`, as in timm.
        deviation: Of the strength.

    Returns:
        uint8 images of the same shape.
    """
    images = images_BCYX.clone()
    names = list(OPERATIONS)
    for _ in range(LAYERS):
        drawn_B = torch.randint(len(names) * DRAWS, (len(images),), generator=generator)
        applied_B = torch.rand(len(images), generator=generator) < PROBABILITY
        for draw in drawn_B[applied_B].unique().tolist():
            rows = torch.where(applied_B & (drawn_B == draw))[0].to(images.device)
            name = names[draw % len(names)]
            strength = min(max(random.gauss(magnitude, deviation), 0.0), GREATEST)
            images[rows] = apply(name, images[rows], fill, *arguments(name, strength))
    return images
