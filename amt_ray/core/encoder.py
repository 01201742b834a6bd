"""The vision transformer's encoder: timm's blocks, running on any subset of an image's tokens."""

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor, nn

from amt_ray.core.blocks import TransformerBlock
from amt_ray.core.relative import RelativePositions
from amt_ray.core.tokens import gather_tokens, pair, patch_grid, patchify, sincos_positions

LAYER_NORM_EPS = 1e-6


def transformer(
    width: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float,
    layer_scale: float | None = None,
    drop_path: float = 0.0,
) -> nn.ModuleList:
    """``depth`` pre-norm timm blocks with biased query, key and value, as in ViT and MAE.

    Args:
        width: D.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of a block's MLP over D.
        layer_scale: Initial layer scale, or None for none.
        drop_path: Rate of stochastic depth in the last block, rising linearly from 0 in the first.

    Raises:
        ValueError: If the heads do not divide the width.
    """
    if width % num_heads:
        raise ValueError(f"num_heads must divide the embedding width, got {num_heads} heads for {width}.")
    norm = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
    rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
    return nn.ModuleList(
        TransformerBlock(
            width, num_heads, mlp_ratio, qkv_bias=True, init_values=layer_scale, drop_path=rate, norm_layer=norm
        )  # type: ignore[arg-type]
        for rate in rates
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
        positions: Absolute position embedding: ``sincos`` (fixed), ``learned``, or ``none``.
        relative_positions: Whether a relative position bias, shared by all blocks, is added to the attention.
        layer_scale: Initial layer scale, or None for none.
        drop_path: Rate of stochastic depth in the last block.

    Raises:
        ValueError: If the sizes do not fit together.
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
        positions: Literal["sincos", "learned", "none"] = "sincos",
        relative_positions: bool = False,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if positions not in ("sincos", "learned", "none"):
            raise ValueError(f"positions must be one of sincos, learned, none, got {positions!r}.")
        self.sizes: dict[str, Any] = {
            "img_size": pair(img_size), "patch_size": patch_size, "in_chans": in_chans, "embed_dim": embed_dim,
            "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio, "positions": positions,
            "relative_positions": relative_positions, "layer_scale": layer_scale,
        }  # fmt: skip
        self.grid = patch_grid(img_size, patch_size)
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)  # type: ignore[arg-type]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed: nn.Parameter | None = None
        if positions == "sincos":
            self.pos_embed = nn.Parameter(sincos_positions(embed_dim, self.grid), requires_grad=False)
        elif positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_patches, embed_dim))
        self.rel_pos_bias = RelativePositions(self.grid, num_heads) if relative_positions else None
        self.blocks = transformer(embed_dim, depth, num_heads, mlp_ratio, layer_scale, drop_path)
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
        if self.pos_embed is not None and self.pos_embed.requires_grad:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def embed(
        self,
        patches_BNP: Tensor,
        keep_BV: Tensor | None = None,
        blank_BM: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """[CLS], patch and mask tokens with positions.

        Args:
            patches_BNP: All patches, in `patchify`'s order of values.
            keep_BV: Indices into N of the patches to embed; None for all of them.
            blank_BM: Indices of the patches in whose places mask tokens stand; None for none.
            mask_token: [1, 1, D], given with ``blank_BM``.

        Returns:
            tokens [B, 1 + V + M, D]. Patches that are not kept are never projected.
        """
        if keep_BV is not None:
            patches_BNP = gather_tokens(patches_BNP, keep_BV)
        projection = self.patch_embed.proj  # a convolution whose stride is its kernel: a linear map of each patch
        weight_DP = projection.weight.permute(0, 2, 3, 1).flatten(1)
        tokens_BKD = F.linear(patches_BNP, weight_DP, projection.bias)
        if blank_BM is not None:
            assert keep_BV is not None and mask_token is not None
            blanks = mask_token.to(tokens_BKD.dtype).expand(len(tokens_BKD), blank_BM.shape[1], -1)
            tokens_BKD = torch.cat([tokens_BKD, blanks], dim=1)
            keep_BV = torch.cat([keep_BV, blank_BM], dim=1)
        cls_11D: Tensor = self.cls_token
        if self.pos_embed is not None:
            positions = self.pos_embed[:, 1:]
            tokens_BKD = tokens_BKD + (positions if keep_BV is None else gather_tokens(positions, keep_BV))
            cls_11D = cls_11D + self.pos_embed[:, :1]
        return torch.cat([cls_11D.expand(tokens_BKD.shape[0], -1, -1).to(tokens_BKD.dtype), tokens_BKD], dim=1)

    def attention_bias(self, index_BK: Tensor | None = None) -> Tensor | None:
        """The bias [1 or B, H, 1 + K, 1 + K] of the attention between [CLS] and these patches (all where None)."""
        return None if self.rel_pos_bias is None else self.rel_pos_bias(index_BK)

    def encode(
        self,
        patches_BNP: Tensor,
        keep_BV: Tensor | None = None,
        blank_BM: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """Normalised output tokens [B, 1 + V + M, D]; arguments as in `embed`."""
        tokens = self.embed(patches_BNP, keep_BV, blank_BM, mask_token)
        both = keep_BV if blank_BM is None or keep_BV is None else torch.cat([keep_BV, blank_BM], dim=1)
        bias = self.attention_bias(both)
        for block in self.blocks:
            tokens = block(tokens) if bias is None else block(tokens, attn_mask=bias.to(tokens.dtype))
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
