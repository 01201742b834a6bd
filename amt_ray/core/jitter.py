"""Random size, place and flip of an image and of all that lies on it: boxes, masks, label maps.

Large-scale jitter (Ghiasi et al. 2021, https://arxiv.org/abs/2012.07177): mirror, resize by a random factor, then cut
out a window of the encoder's size at random, or fill up to it at the right and the bottom.
"""

from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import TVTensor

from amt_ray.core.noise import Purpose, uniform

T = TypeVar("T", bound=TVTensor)


class Move(NamedTuple):
    """What is done to one image.

    Attributes:
        scale: Factor of the size.
        top: Place of the window among all that fit, from 0 (topmost) to 1.
        left: The same from left to right.
        flip: Whether it is mirrored first.
    """

    scale: float = 1.0
    top: float = 0.0
    left: float = 0.0
    flip: bool = False


@dataclass(frozen=True)
class Jitter:
    """Random moves.

    Args:
        scale: Least and greatest factor of the size, drawn uniformly.
        flip: Probability of a mirror image.

    Raises:
        ValueError: If the factors or the probability are out of their range.
    """

    scale: tuple[float, float] = (0.1, 2.0)
    flip: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] or not 0 <= self.flip <= 1:
            raise ValueError(f"scale must rise from above 0 and flip be in [0, 1], got {self.scale} and {self.flip}.")

    def draw(self, seed: int, epoch: int, index_B: Tensor) -> list[Move]:
        """The moves of these images in this epoch: a function of its arguments alone."""
        low, high = self.scale
        noise = uniform(seed, epoch, index_B, Purpose.CROP, 4).tolist()
        return [Move(low + (high - low) * size, top, left, flip < self.flip) for size, top, left, flip in noise]


def moved(item: T, move: Move, size: tuple[int, int], fill: float = 0) -> T:
    """An image, boxes or masks after a move; each may come in a resolution of its own.

    Args:
        item: tv_tensors of torchvision; masks and label maps are resized to the nearest pixel.
        move: What to do.
        size: Rows and columns of the result, and of the whole image at a scale of 1.
        fill: Value of what lies outside the image.

    Returns:
        The same kind. Boxes are cut at the border; those outside are left without an area.
    """
    rows, columns = (max(1, round(side * move.scale)) for side in size)
    if move.flip:
        item = F.horizontal_flip(item)
    item = F.resize(item, [rows, columns], antialias=True)
    top, left = int(move.top * max(rows - size[0] + 1, 0)), int(move.left * max(columns - size[1] + 1, 0))
    height, width = min(rows, size[0]), min(columns, size[1])
    item = F.crop(item, min(top, rows - height), min(left, columns - width), height, width)
    if (height, width) == tuple(size):
        return item
    filled: T = F.pad(item, [0, 0, size[1] - width, size[0] - height], fill=fill)
    return filled
