"""A class for every pixel, from the patch tokens of a plain ViT."""

import torch
from torch import Tensor, nn

from amt_ray.core.encoder import Encoder
from amt_ray.core.fitting import Tuned, tuned_copy
from amt_ray.core.heads import Standardise
from amt_ray.core.ports import Ranks
from amt_ray.core.probing import autocast
from amt_ray.core.pyramid import SimplePyramid, token_maps
from amt_ray.core.tokens import patchify
from amt_ray.core.upernet import UPerNet, convolution

AUXILIARY_LEVEL = 2  # at the patches' stride


def layers_of(depth: int) -> list[int]:
    """The blocks whose tokens UPerNet takes, as BEiT's and MAE's segmentation does: 3, 5, 7 and 11 of 12."""
    return [max(0, round(depth * share) - 1) for share in (1 / 3, 1 / 2, 2 / 3, 1)]


class LinearHead(nn.Module):
    """Batch normalisation without learned scale, then a linear map of each patch token.

    Args:
        width: D of the tokens.
        classes: Number of classes.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.standardise, self.linear = Standardise(width), nn.Linear(width, classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens_BND: Tensor, ranks: Ranks, counted_B: Tensor | None) -> Tensor:
        """Logits [B, N, classes]; ``counted_B`` is false for padding, None where nothing is learned."""
        if counted_B is None:
            found: Tensor = self.linear(self.standardise(tokens_BND))
            return found
        counted = counted_B.repeat_interleave(tokens_BND.shape[1])
        moments_2D = self.standardise.observe(tokens_BND.detach().flatten(0, 1), ranks, counted)
        learned: Tensor = self.linear(self.standardise(tokens_BND, moments_2D))
        return learned


class Segmenter(Tuned):
    """Logits of every pixel.

    Args:
        encoder: Is copied.
        classes: Number of classes.
        head: ``linear`` on the normalised patch tokens, or ``upernet`` on a pyramid of four blocks' tokens.
        frozen: Whether the encoder stays as it is.
        channels: Width of UPerNet.
        auxiliary: Whether UPerNet has a second, smaller head on a map in the middle.
        drop_path: Rate of stochastic depth in the encoder's last block.
        precision: Of the encoder and its pyramid; heads are in float32.
    """

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        head: str,
        frozen: bool,
        channels: int = 768,
        auxiliary: bool = True,
        drop_path: float = 0.0,
        precision: str = "float32",
    ) -> None:
        super().__init__()
        self.encoder = tuned_copy(encoder, drop_path).requires_grad_(not frozen)
        self.frozen, self.precision = frozen, precision
        self.linear = LinearHead(encoder.embed_dim, classes) if head == "linear" else None
        self.pyramid = self.upernet = self.auxiliary = None
        if head == "upernet":
            self.pyramid = SimplePyramid(encoder.embed_dim, channels)
            self.upernet = UPerNet(channels, classes)
        if head == "upernet" and auxiliary:
            width = max(1, channels // 3)  # 256 for 768
            self.auxiliary = nn.Sequential(convolution(channels, width, 3), nn.Conv2d(width, classes, 1))
        self.to(encoder.cls_token.device)

    def train(self, mode: bool = True) -> "Segmenter":
        """Train mode; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, images_BCYX: Tensor, ranks: Ranks, counted_B: Tensor | None = None) -> list[Tensor]:
        """Logits [B, classes, ...] of each head, the one that counts first, each in its own resolution.

        Args:
            images_BCYX: Normalised images of the encoder's size.
            ranks: The processes that share the batch.
            counted_B: In training, bool, false for padding.
        """
        with autocast(images_BCYX.device, self.precision), torch.set_grad_enabled(self._learns()):
            if self.linear is not None:
                tokens = self.encoder.encode(patchify(images_BCYX, self.encoder.patch_size))[:, 1:].float()
            else:
                maps = token_maps(self.encoder, images_BCYX, layers_of(self.encoder.depth))
        if self.linear is not None:
            logits_BNC = self.linear(tokens, ranks, counted_B)
            return [logits_BNC.transpose(1, 2).unflatten(2, self.encoder.grid)]
        assert self.pyramid is not None and self.upernet is not None
        with autocast(images_BCYX.device, self.precision):
            maps = [map_.float() for map_ in self.pyramid(maps)]
        found = [self.upernet(maps)]
        return found if self.auxiliary is None else [*found, self.auxiliary(maps[AUXILIARY_LEVEL])]

    def _learns(self) -> bool:
        return torch.is_grad_enabled() and not self.frozen
