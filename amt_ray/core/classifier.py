"""An encoder with a classification head, trained as a whole with layer-wise learning rates."""

import copy
from typing import Any

import torch
from timm.layers import DropPath
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from amt_ray.core.encoder import LAYER_NORM_EPS, Encoder
from amt_ray.core.tokens import patchify

INIT_STD = 2e-5  # of the head, as in MAE's fine-tuning: it starts from nearly nothing
UNDECAYED = ("encoder.cls_token", "encoder.pos_embed", "encoder.rel_pos_bias.relative_position_bias_table")


class Classifier(nn.Module):
    """A copy of an encoder, and a linear head on its pooled output.

    Args:
        encoder: Is copied.
        classes: Number of classes.
        pool: ``cls``: the normalised [CLS] token; ``mean``: the mean of the patch tokens, under a norm of its own
            instead of the encoder's (MAE's and SimMIM's global pool).
        drop_path: Rate of stochastic depth in the last block, rising linearly from 0 in the first.
        seed: Seed of the head.
    """

    def __init__(self, encoder: Encoder, classes: int, pool: str, drop_path: float, seed: int) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        self.encoder.requires_grad_(True)  # fixed positions are trained too, as in MAE's fine-tuning
        self.pool = pool
        self.fc_norm: nn.Module = nn.Identity()
        if pool == "mean":
            self.encoder.norm = nn.Identity()  # type: ignore[assignment]
            self.fc_norm = nn.LayerNorm(encoder.embed_dim, eps=LAYER_NORM_EPS)
        for depth, block in enumerate(self.encoder.blocks):
            rate = drop_path * depth / max(encoder.depth - 1, 1)
            block.drop_path1 = DropPath(rate) if rate else nn.Identity()
            block.drop_path2 = DropPath(rate) if rate else nn.Identity()
        self.head = nn.Linear(encoder.embed_dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=INIT_STD, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.head.bias)
        self.to(encoder.cls_token.device)

    def forward(self, images_BCYX: Tensor) -> Tensor:
        """Logits [B, classes] of normalised images."""
        tokens = self.encoder.encode(patchify(images_BCYX, self.encoder.patch_size))
        pooled = tokens[:, 0] if self.pool == "cls" else tokens[:, 1:].mean(dim=1)
        logits: Tensor = self.head(self.fc_norm(pooled))
        return logits

    def freeze_unused(self, image_CYX: Tensor) -> None:
        """Take out of training what the logits do not depend on: a decoder, say, that came with the encoder."""
        parameters = list(self.parameters())
        reached = torch.autograd.grad(self(image_CYX.unsqueeze(0)).sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, reached, strict=True):
            parameter.requires_grad_(gradient is not None)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's description of the layers: the stem, each block, and all the rest on top."""
        return {"stem": r"^encoder\.(?:cls_token|pos_embed|patch_embed)", "blocks": r"^encoder\.blocks\.(\d+)"}

    def parameter_groups(self, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
        """Groups for the optimizer: learning rates fall by ``layer_decay`` a layer from the head down.

        The weights of biases, norms, [CLS] and positions are not decayed.
        """
        groups: list[dict[str, Any]] = param_groups_layer_decay(
            self, weight_decay, no_weight_decay_list=UNDECAYED, layer_decay=layer_decay
        )
        return groups
