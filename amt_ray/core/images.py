"""The data path: from one shared uint8 array to normalised batches on the device."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from amt_ray.core.geometry import NOISE_COLUMNS, Crops, crop_pixels, draw_crops, whole_images
from amt_ray.core.noise import Purpose, uniform


@dataclass(frozen=True)
class Augmentation:
    """Random resized crop and flip.

    Args:
        size: Rows and columns of the training image.
        scale: Least and greatest area of the crop, as a share of the image.
        ratio: Least and greatest width / height.
        flip: Probability of a mirror image.
        kernel: ``bilinear`` or ``bicubic``.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    kernel: str = "bicubic"

    def draw(self, seed: int, epoch: int, index_B: Tensor, source: tuple[int, int]) -> Crops:
        """The crops of these images in this epoch: a function of its arguments alone."""
        noise_BK = uniform(seed, epoch, index_B, Purpose.CROP, NOISE_COLUMNS)
        return draw_crops(noise_BK, source, self.scale, self.ratio, self.flip)


class ImageArray:
    """Decoded images with labels.

    Args:
        pixels: [n, C, Y, X] uint8, usually a memory map shared by the workers of a node.
        labels: [n] int64, or None.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel.
        classes: Names of the classes.
    """

    def __init__(
        self,
        pixels: np.ndarray,
        labels: np.ndarray | None,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        classes: tuple[str, ...] = (),
    ) -> None:
        self.pixels_nCYX = torch.from_numpy(np.asarray(pixels))
        self.labels_n = None if labels is None else torch.from_numpy(labels)
        self.mean, self.std, self.classes = mean, std, classes

    def __len__(self) -> int:
        return len(self.pixels_nCYX)

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the stored images."""
        return self.pixels_nCYX.shape[2], self.pixels_nCYX.shape[3]

    def load(self, index_B: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Stored pixels [B, C, Y, X], uint8, on the device; ``index_B`` is on the CPU."""
        batch = self.pixels_nCYX[index_B]
        return batch.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else batch

    def crop(self, index_B: Tensor, crops: Crops, size: tuple[int, int], kernel: str = "bicubic") -> Tensor:
        """Normalised crops [B, C, *size], float32, on the crops' device."""
        pixels = crop_pixels(self.load(index_B, crops.box_B4.device).float(), crops, size, kernel)
        # (x / 255 - mean) / std in one pass, bicubic overshoot cut off as 8-bit resizing would
        mean = torch.tensor(self.mean, device=pixels.device).view(1, -1, 1, 1) * 255
        std = torch.tensor(self.std, device=pixels.device).view(1, -1, 1, 1) * 255
        return pixels.clamp_(0, 255).sub_(mean).div_(std)

    def whole(self, index_B: Tensor, size: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
        """Whole images, resized to ``size`` and normalised, [B, C, *size]."""
        return self.crop(index_B, whole_images(len(index_B), device), size)

    def denormalise(self, images_BCYX: Tensor) -> Tensor:
        """Normalised images back to [0, 1]."""
        mean = torch.tensor(self.mean, device=images_BCYX.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=images_BCYX.device).view(1, -1, 1, 1)
        return (images_BCYX * std + mean).clamp(0, 1)
