"""Encoders by name: the sizes of timm's plain ViTs."""

import functools
from typing import Any

import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

SHORT_NAMES = {
    "tiny": "vit_tiny_patch16_224",
    "small": "vit_small_patch16_224",
    "base": "vit_base_patch16_224",
    "large": "vit_large_patch16_224",
    "huge": "vit_huge_patch14_224",
}


@functools.lru_cache
def encoder_sizes(name: str) -> dict[str, Any]:
    """Sizes of a plain ViT of timm: embed_dim, depth, num_heads, mlp_ratio, and patch_size.

    Args:
        name: A timm model, or ``tiny``, ``small``, ``base``, ``large``, ``huge``, which leave the patch size open.

    Raises:
        ValueError: If timm has no such model, or it is not a plain ViT.
    """
    full = SHORT_NAMES.get(name, name)
    if not timm.is_model(full):
        known = ", ".join(SHORT_NAMES)
        raise ValueError(f"model.encoder must be one of {known}, a plain ViT of timm, or sizes, got {name!r}.")
    with torch.device("meta"):
        model = timm.create_model(full)
    if odd := _oddity(model):
        raise ValueError(f"model.encoder must be a plain ViT, got {name!r}, which {odd}.")
    first = model.blocks[0]
    sizes = {
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": first.attn.num_heads,
        "mlp_ratio": first.mlp.fc1.out_features / model.embed_dim,
    }
    return sizes if name in SHORT_NAMES else {**sizes, "patch_size": model.patch_embed.patch_size[0]}


def _oddity(model: nn.Module) -> str | None:
    """What a plain ViT does not do, or None."""
    if not isinstance(model, VisionTransformer):
        return "is another architecture"
    block = model.blocks[0]
    oddities = {
        "has other blocks": type(block) is not Block,
        "has other prefix tokens than [CLS]": model.num_prefix_tokens != 1 or model.cls_token is None,
        "has no position for [CLS]": model.no_embed_class,
        "normalises before its blocks": not isinstance(model.norm_pre, nn.Identity),
    }
    if type(block) is Block:
        oddities |= {
            "has no biases in its queries": block.attn.qkv.bias is None,
            "normalises queries and keys": not isinstance(block.attn.q_norm, nn.Identity),
            "scales its layers": not isinstance(block.ls1, nn.Identity),
            "has another MLP": not (hasattr(block.mlp, "fc1") and isinstance(block.mlp.act, nn.GELU)),
        }
    return next((words for words, is_so in oddities.items() if is_so), None)
