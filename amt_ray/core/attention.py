"""Scores from attention: the [CLS] row of chosen layers of the encoder."""

from collections.abc import Sequence

import torch
from timm.models.vision_transformer import Block
from torch import Tensor

from amt_ray.core.encoder import Encoder
from amt_ray.core.tokens import patchify


def resolve_layers(layers: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """Layer indices counted from the start, in increasing order, each once.

    Args:
        layers: One index or several; negative ones count from the end, -1 being the last.
        depth: Number of blocks.

    Raises:
        ValueError: If there is none, or one that the encoder does not have.
    """
    wanted = [layers] if isinstance(layers, int) else list(layers)
    if not wanted or any(not -depth <= layer < depth for layer in wanted):
        raise ValueError(f"attention.layers must be in [{-depth}, {depth - 1}] for {depth} blocks, got {layers}.")
    return tuple(sorted({layer % depth for layer in wanted}))


def cls_row(block: Block, tokens_BLD: Tensor) -> Tensor:
    """Attention probabilities [B, H, L - 1] of [CLS] over the other tokens in one block, given the block's input.

    Only the query of [CLS] is formed, so memory is linear in the number of tokens.
    """
    attn = block.attn
    B, L, _ = tokens_BLD.shape
    normed = block.norm1(tokens_BLD)
    weight_q, weight_k, _ = attn.qkv.weight.chunk(3)
    bias_q, bias_k, _ = attn.qkv.bias.chunk(3)
    q_BH1 = torch.nn.functional.linear(normed[:, :1], weight_q, bias_q)
    k_BHL = torch.nn.functional.linear(normed, weight_k, bias_k)
    q_BH1 = q_BH1.reshape(B, 1, attn.num_heads, -1).transpose(1, 2)
    k_BHL = k_BHL.reshape(B, L, attn.num_heads, -1).transpose(1, 2)
    logits_BHL: Tensor = (q_BH1 @ k_BHL.transpose(2, 3)).squeeze(2) * attn.scale
    return logits_BHL.float().softmax(dim=-1)[..., 1:]


def normalise_heads(rows_BHN: Tensor) -> Tensor:
    """scores_BN in [0, 1]: each head's map stretched to [0, 1], then their mean; a constant map becomes zeros."""
    low, high = rows_BHN.aminmax(dim=-1, keepdim=True)
    stretched = (rows_BHN - low) / (high - low).clamp_min(torch.finfo(rows_BHN.dtype).tiny)
    return stretched.mean(dim=1)


@torch.no_grad()
def cls_attention(model: Encoder, images_BCYX: Tensor, layers: int | Sequence[int] = (-1,)) -> Tensor:
    """Score each patch by how much [CLS] attends to it (AMT, https://arxiv.org/abs/2211.15362, section on masking).

    Args:
        model: The encoder; run in eval mode and left in the mode in which it came.
        images_BCYX: Whole images, normalised, of the encoder's size; nothing is masked.
        layers: One layer or several, whose maps are averaged; negative indices count from the end.

    Returns:
        scores_BN in [0, 1]. Layers above the highest scored one are not run.

    Raises:
        ValueError: If a layer does not exist.
    """
    wanted = resolve_layers(layers, model.depth)
    was_training = model.training
    model.eval()
    try:
        tokens = model.embed(patchify(images_BCYX, model.patch_size))
        maps = []
        for position, block in enumerate(model.blocks[: wanted[-1] + 1]):
            if position in wanted:
                maps.append(normalise_heads(cls_row(block, tokens)))
            if position < wanted[-1]:
                tokens = block(tokens)
        return torch.stack(maps).mean(dim=0)
    finally:
        model.train(was_training)
