"""One crop and flip an image, applied to pixels and to score map alike, in batch, on the device of the batch.

Cropping, resizing and flipping an upright box is separable: every output row is a weighted sum of input rows, and so is
every column. So a batch of crops is two small matrices an image, and one function applies them to anything that lives
on the image: to pixels with an interpolation kernel, to score maps with the exact area of each cell that a new cell
covers. Nothing is rounded to whole pixels or cells.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

ATTEMPTS = 10
NOISE_COLUMNS = 2 * ATTEMPTS + 3


class Crops(NamedTuple):
    """One box and flip an image.

    Attributes:
        box_B4: top, left, height, width as fractions of the image.
        flip_B: bool, whether the box is mirrored left to right.
    """

    box_B4: Tensor
    flip_B: Tensor


def draw_crops(
    noise_BK: Tensor,
    source: tuple[int, int],
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
) -> Crops:
    """Random resized crops: area uniform in ``scale``, aspect log-uniform in ``ratio``, place uniform.

    The distribution is that of torchvision's RandomResizedCrop without its rounding to whole pixels: of ten drawn
    shapes the first that fits is taken, else the largest central one of allowed aspect.

    Args:
        noise_BK: Uniform in (0, 1), K = NOISE_COLUMNS.
        source: Rows and columns of the source images in pixels.
        scale: Least and greatest area, as a share of the image's.
        ratio: Least and greatest width / height in pixels.
        flip: Probability of a mirror image.
    """
    rows, columns = source
    tall = rows / columns
    area = scale[0] + (scale[1] - scale[0]) * noise_BK[:, :ATTEMPTS]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + (high - low) * noise_BK[:, ATTEMPTS : 2 * ATTEMPTS]).exp()
    widths, heights = (area * aspect * tall).sqrt(), (area / aspect / tall).sqrt()
    fits = (widths <= 1) & (heights <= 1)
    first = fits.int().argmax(dim=1, keepdim=True)
    any_fits = fits.any(dim=1)
    whole = min(max(1 / tall, ratio[0]), ratio[1]) * tall  # width / height in fractions, nearest to the image's own
    width = torch.where(any_fits, widths.gather(1, first).squeeze(1), min(1.0, whole))
    height = torch.where(any_fits, heights.gather(1, first).squeeze(1), min(1.0, 1 / whole))
    place = torch.where(any_fits.unsqueeze(1), noise_BK[:, 2 * ATTEMPTS : 2 * ATTEMPTS + 2], 0.5)
    top, left = place[:, 0] * (1 - height), place[:, 1] * (1 - width)
    return Crops(torch.stack([top, left, height, width], dim=1), noise_BK[:, 2 * ATTEMPTS + 2] < flip)


def whole_images(count: int, device: torch.device | str = "cpu") -> Crops:
    """The crops that leave ``count`` images whole."""
    box_B4 = torch.tensor([0.0, 0.0, 1.0, 1.0], device=device).expand(count, 4)
    return Crops(box_B4, torch.zeros(count, dtype=torch.bool, device=device))


def released_corner(crops: Crops, grid: tuple[int, int]) -> Crops:
    """The boxes that AMT's released code looks up in the score map instead of the crops' own.

    It divides offsets that are shares already by the image's size once more, so every box shrinks to the first cell and
    rounding makes 2 or 3 cells of it: the map's top left corner, wherever the crop is. Only for measuring what the
    alignment is worth.

    Args:
        crops: The boxes of the pixels.
        grid: Rows and columns of the score map.
    """
    cells = torch.tensor(grid, device=crops.box_B4.device)
    start_B2, length_B2 = crops.box_B4[:, :2], crops.box_B4[:, 2:]
    corner_B2 = (1 + length_B2.ceil() + start_B2.ceil()).minimum(cells) / cells
    return Crops(torch.cat([torch.zeros_like(corner_B2), corner_B2], dim=1), crops.flip_B)


def crop_pixels(images_BCYX: Tensor, crops: Crops, size: tuple[int, int], kernel: str = "bicubic") -> Tensor:
    """Crop, flip and resize images.

    Args:
        images_BCYX: Pixels, float, any size.
        crops: A box and flip an image.
        size: Rows and columns of the result.
        kernel: ``bilinear`` or ``bicubic`` (a = -0.5); antialiased where the box shrinks.

    Returns:
        images of ``size``, in the range of the input but for bicubic's small overshoot.

    Raises:
        ValueError: If the kernel is unknown.
    """
    if kernel not in _KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(_KERNELS)}, got {kernel!r}.")
    top, left, height, width = crops.box_B4.unbind(1)
    weights_y = _interpolation(top, height, None, images_BCYX.shape[2], size[0], kernel)
    weights_x = _interpolation(left, width, crops.flip_B, images_BCYX.shape[3], size[1], kernel)
    return _apply(images_BCYX, weights_y, weights_x)


def crop_scores(scores_BGW: Tensor, crops: Crops, grid: tuple[int, int]) -> Tensor:
    """Crop and flip score maps: each new cell is the mean score over the area of the image that it covers.

    Args:
        scores_BGW: Maps on the patch grid of the whole image.
        crops: The same box and flip an image as its pixels have.
        grid: Rows and columns of the crop's patch grid.

    Returns:
        scores_BGW on the crop's grid, within the range of the input.
    """
    top, left, height, width = crops.box_B4.unbind(1)
    weights_y = _overlap(top, height, None, scores_BGW.shape[1], grid[0])
    weights_x = _overlap(left, width, crops.flip_B, scores_BGW.shape[2], grid[1])
    return _apply(scores_BGW.float().unsqueeze(1), weights_y, weights_x).squeeze(1)


def _apply(maps_BCYX: Tensor, weights_y: Tensor, weights_x: Tensor) -> Tensor:
    """weights [B, out, in] on rows and columns."""
    B, C, Y, X = maps_BCYX.shape
    columns = weights_x.shape[1]  # not -1, which a batch of no images leaves open
    across = torch.bmm(maps_BCYX.reshape(B, C * Y, X), weights_x.transpose(1, 2)).reshape(B, C, Y, columns)
    return weights_y.unsqueeze(1) @ across


def _positions(count: int, flip_B: Tensor | None, like: Tensor) -> Tensor:
    """0 .. count - 1 [B or 1, count], reversed where flipped."""
    position = torch.arange(count, device=like.device, dtype=like.dtype).unsqueeze(0)
    return position if flip_B is None else torch.where(flip_B.unsqueeze(1), count - 1 - position, position)


def _interpolation(
    start_B: Tensor, length_B: Tensor, flip_B: Tensor | None, inputs: int, outputs: int, kernel: str
) -> Tensor:
    step_B1 = (length_B * inputs / outputs).unsqueeze(1)
    centre_BO = (start_B * inputs).unsqueeze(1) + (_positions(outputs, flip_B, start_B) + 0.5) * step_B1
    input_centres = torch.arange(inputs, device=start_B.device, dtype=start_B.dtype) + 0.5
    distance_BOI = (input_centres - centre_BO.unsqueeze(2)) / step_B1.clamp_min(1).unsqueeze(2)
    weights = _KERNELS[kernel](distance_BOI.abs_())
    return weights / weights.sum(dim=2, keepdim=True)


def _overlap(start_B: Tensor, length_B: Tensor, flip_B: Tensor | None, inputs: int, outputs: int) -> Tensor:
    step_B1 = (length_B * inputs / outputs).unsqueeze(1)
    low_BO1 = ((start_B * inputs).unsqueeze(1) + _positions(outputs, flip_B, start_B) * step_B1).unsqueeze(2)
    cell = torch.arange(inputs, device=start_B.device, dtype=start_B.dtype)
    covered = torch.minimum(low_BO1 + step_B1.unsqueeze(2), cell + 1) - torch.maximum(low_BO1, cell)
    weights = covered.clamp_min(0)
    return weights / weights.sum(dim=2, keepdim=True)


def _bilinear(distance: Tensor) -> Tensor:
    return (1 - distance).clamp_min(0)


def _bicubic(distance: Tensor) -> Tensor:
    """Keys' cubic with a = -0.5, whose two pieces meet at 1 and end at 2."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


_KERNELS = {"bilinear": _bilinear, "bicubic": _bicubic}
