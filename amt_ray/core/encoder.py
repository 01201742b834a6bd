"""The vision transformer's encoder: timm's blocks, running on any subset of an image's tokens."""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from amt_ray.core.tokens import gather_tokens, patch_grid, patchify, sincos_positions

LAYER_NORM_EPS = 1e-6


def transformer(width: int, depth: int, num_heads: int, mlp_ratio: float) -> nn.ModuleList:
    """``depth`` pre-norm timm blocks with biased query, key and value, as in ViT and MAE.

    Raises:
        ValueError: If the heads do not divide the width.
    """
    if width % num_heads:
        raise ValueError(f"num_heads must divide the embedding width, got {num_heads} heads for {width}.")
    norm = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
    return nn.ModuleList(
        Block(width, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm)  # type: ignore[arg-type]
        for _ in range(depth)
    )


class Encoder(nn.Module):
    """A plain ViT. Its parameters have the names and shapes of timm's ``vit_*`` and of the public MAE checkpoints.

    Args:
        img_size: Side of the image in pixels, or (rows, columns).
        patch_size: Side of a patch in pixels; must divide the image.
        in_chans: Colour channels.
        embed_dim: Width D, a multiple of 4 and of ``num_heads``.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of a block's MLP over D.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.grid = patch_grid(img_size, patch_size)
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)  # type: ignore[arg-type]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(embed_dim, self.grid), requires_grad=False)
        self.blocks = transformer(embed_dim, depth, num_heads, mlp_ratio)
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)

    @property
    def num_patches(self) -> int:
        """N, the patches of one image."""
        return self.grid[0] * self.grid[1]

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def init_weights(self) -> None:
        """Initialise as MAE does: Xavier-uniform linear maps, the patch projection among them; [CLS] normal(0.02)."""
        self.apply(_init_linear)
        weight = self.patch_embed.proj.weight
        nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
        nn.init.normal_(self.cls_token, std=0.02)

    def embed(self, patches_BNP: Tensor, keep_BV: Tensor | None = None) -> Tensor:
        """[CLS] and patch tokens with positions.

        Args:
            patches_BNP: All patches, in `patchify`'s order of values.
            keep_BV: Indices into N of the patches to embed; None for all of them.

        Returns:
            tokens [B, 1 + V, D]. Patches that are not kept are never projected.
        """
        positions_BND = self.pos_embed[:, 1:]
        if keep_BV is not None:
            patches_BNP = gather_tokens(patches_BNP, keep_BV)
            positions_BND = gather_tokens(positions_BND, keep_BV)
        projection = self.patch_embed.proj  # a convolution whose stride is its kernel: a linear map of each patch
        weight_DP = projection.weight.permute(0, 2, 3, 1).flatten(1)
        tokens_BVD = F.linear(patches_BNP, weight_DP, projection.bias) + positions_BND
        cls_B1D = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens_BVD), -1, -1)
        return torch.cat([cls_B1D.to(tokens_BVD.dtype), tokens_BVD], dim=1)

    def encode(self, patches_BNP: Tensor, keep_BV: Tensor | None = None) -> Tensor:
        """Normalised output tokens [B, 1 + V, D] of [CLS] and the kept patches (all where keep_BV is None)."""
        tokens = self.embed(patches_BNP, keep_BV)
        for block in self.blocks:
            tokens = block(tokens)
        normed: Tensor = self.norm(tokens)
        return normed

    def features(self, images_BCYX: Tensor, pool: str = "cls") -> Tensor:
        """features_BD of whole images.

        Args:
            images_BCYX: Normalised images of the encoder's size.
            pool: ``cls`` for the [CLS] token, ``mean`` for the mean of the patch tokens.

        Raises:
            ValueError: If ``pool`` is neither.
        """
        tokens = self.encode(patchify(images_BCYX, self.patch_size))
        if pool == "cls":
            return tokens[:, 0]
        if pool == "mean":
            return tokens[:, 1:].mean(dim=1)
        raise ValueError(f"pool must be one of cls, mean, got {pool!r}.")


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
