"""A feature pyramid from a plain ViT (ViTDet: Li et al., ECCV 2022, https://arxiv.org/abs/2203.16527).

The maps of all strides are made from the encoder's last map alone. Every block attends to the whole image; the window
attention with which the paper saves memory at 1024 pixels is not here.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from amt_ray.core.encoder import Encoder
from amt_ray.core.fitting import tuned_copy
from amt_ray.core.probing import autocast
from amt_ray.core.tokens import patchify

LEVELS = 4
LAST = (-1,) * LEVELS


def token_maps(encoder: Encoder, images_BCYX: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """Patch tokens after some blocks, before the final norm, as maps.

    Args:
        encoder: A plain ViT.
        images_BCYX: Normalised images of the encoder's size.
        layers: Indices of blocks, negative from the end; one may come more than once.

    Returns:
        A map [B, D, G, W] for each.
    """
    bias, found = encoder.attention_bias(), {}
    tokens = encoder.embed(patchify(images_BCYX, encoder.patch_size))
    for depth, block in enumerate(encoder.blocks):
        tokens = block(tokens) if bias is None else block(tokens, attn_mask=bias.to(tokens.dtype))
        found[depth] = tokens
    patches = [found[layer % encoder.depth][:, 1:].transpose(1, 2) for layer in layers]
    return [tokens_BDN.unflatten(2, encoder.grid) for tokens_BDN in patches]


def rescalers(width: int) -> nn.ModuleList:
    """ViTDet's ways to a quarter, half, once and twice the stride of the patches, of width D/4, D/2, D, D."""
    up = nn.ConvTranspose2d
    quarter = nn.Sequential(
        up(width, width // 2, 2, 2), LayerNorm2d(width // 2), nn.GELU(), up(width // 2, width // 4, 2, 2)
    )
    return nn.ModuleList([quarter, up(width, width // 2, 2, 2), nn.Identity(), nn.MaxPool2d(2, 2)])


class SimplePyramid(nn.Module):
    """Maps at a quarter, half, once and twice the stride of the patches, all of one width.

    Args:
        width: D of the encoder.
        channels: Width of the maps.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.rescale = rescalers(width)
        self.project = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, channels, 1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                LayerNorm2d(channels),
            )
            for inputs in (width // 4, width // 2, width, width)
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps [B, channels, ...], finest first, from four [B, D, G, W] (the same one four times in ViTDet)."""
        stages = zip(maps, self.rescale, self.project, strict=True)
        return [project(rescale(map_BDGW)) for map_BDGW, rescale, project in stages]


class PyramidBackbone(nn.Module):
    """A copy of an encoder under a simple feature pyramid, as torchvision's detectors take it.

    The encoder's final norm is left out, as in ViTDet.

    Args:
        encoder: Is copied.
        channels: Width of the maps.
        drop_path: Rate of stochastic depth in the last block.
        precision: Of the encoder and the pyramid; the maps come out as float32.

    Raises:
        ValueError: If the patch is not a power of two of at least 4 pixels, or a side of the grid is odd.
    """

    def __init__(self, encoder: Encoder, channels: int, drop_path: float = 0.0, precision: str = "float32") -> None:
        super().__init__()
        check_grid(encoder)
        self.encoder = tuned_copy(encoder, drop_path)
        self.pyramid = SimplePyramid(encoder.embed_dim, channels)
        self.out_channels, self.precision = channels, precision

    def forward(self, images_BCYX: Tensor) -> OrderedDict[str, Tensor]:
        """Maps ``0`` to ``3``, finest first, and ``pool``, every second place of the last."""
        with autocast(images_BCYX.device, self.precision):
            maps = self.pyramid(token_maps(self.encoder, images_BCYX, LAST))
        named = OrderedDict((str(level), map_.float()) for level, map_ in enumerate(maps))
        named["pool"] = F.max_pool2d(named[str(LEVELS - 1)], 1, 2)
        return named


def check_grid(encoder: Encoder) -> None:
    """Refuse grids of which no pyramid can be made whose strides torchvision can tell from the maps' sizes.

    Raises:
        ValueError: If the patch is not a power of two of at least 4 pixels, or a side of the grid is odd.
    """
    patch = encoder.patch_size
    if patch < 4 or patch & (patch - 1):
        raise ValueError(f"patch_size must be a power of two of at least 4 for a feature pyramid, got {patch}.")
    if any(side % 2 for side in encoder.grid):
        raise ValueError(f"the patch grid must have even sides for a feature pyramid, got {encoder.grid}.")
