"""UPerNet (Xiao et al., ECCV 2018, https://arxiv.org/abs/1807.10221): classes of pixels from a pyramid of maps.

Norms are over the channels of each place, not over the batch as in the paper: they need no exchange between ranks and
do not depend on how many images a rank has.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from amt_ray.core.pyramid import LEVELS

POOLED = (1, 2, 3, 6)  # cells a side of the pyramid pooling module


def convolution(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Convolution that keeps the size, norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), LayerNorm2d(outputs), nn.ReLU()
    )


def resized(map_BCYX: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """A map resized bilinearly."""
    return F.interpolate(map_BCYX, size=tuple(size), mode="bilinear", align_corners=False)


class PyramidPooling(nn.Module):
    """A map beside what it holds on average in ever larger parts (Zhao et al. 2017, https://arxiv.org/abs/1612.01105).

    Args:
        channels: Width of the map, and of what comes out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(cells), convolution(channels, channels, 1)) for cells in POOLED
        )
        self.join = convolution((len(POOLED) + 1) * channels, channels, 3)

    def forward(self, map_BCYX: Tensor) -> Tensor:
        """A map of the same shape."""
        pooled = [resized(part(map_BCYX), map_BCYX.shape[2:]) for part in self.parts]
        joined: Tensor = self.join(torch.cat([map_BCYX, *pooled], dim=1))
        return joined


class UPerNet(nn.Module):
    """Pooling of the coarsest map, a feature pyramid from there down, and all its maps joined at the finest size.

    Args:
        channels: Width of all maps.
        classes: Number of classes.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        finer = LEVELS - 1
        self.pooling = PyramidPooling(channels)
        self.lateral = nn.ModuleList(convolution(channels, channels, 1) for _ in range(finer))
        self.smooth = nn.ModuleList(convolution(channels, channels, 3) for _ in range(finer))
        self.join = convolution(LEVELS * channels, channels, 3)
        self.classify = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits [B, classes, ...] of the finest map's size, from maps [B, channels, ...], finest first."""
        summed = [lateral(map_) for lateral, map_ in zip(self.lateral, maps[:-1], strict=True)]
        summed.append(self.pooling(maps[-1]))
        for coarse, fine in pairwise(reversed(range(LEVELS))):
            summed[fine] = summed[fine] + resized(summed[coarse], summed[fine].shape[2:])
        smooth = [smooth(map_) for smooth, map_ in zip(self.smooth, summed[:-1], strict=True)]
        joined = torch.cat([resized(map_, maps[0].shape[2:]) for map_ in [*smooth, summed[-1]]], dim=1)
        logits: Tensor = self.classify(self.join(joined))
        return logits
