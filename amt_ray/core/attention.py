"""Scores from attention: how much [CLS] attends to each patch, in chosen layers, heads joined as wanted."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.models.vision_transformer import Block
from torch import Tensor

from amt_ray.core.encoder import Encoder
from amt_ray.core.plan import InfeasibleError
from amt_ray.core.tokens import patchify

ROLLOUT = "rollout"
QUERY_CHUNK = 64  # rows of an attention matrix that rollout holds at once

Layers = int | Sequence[int] | Literal["rollout"]
Heads = Literal["mean", "max"] | Sequence[int]


def resolve_layers(layers: int | Sequence[int] | str, depth: int) -> tuple[int, ...]:
    """Layer indices counted from the start, in increasing order, each once.

    Args:
        layers: One index or several; negative ones count from the end, -1 being the last.
        depth: Number of blocks.

    Raises:
        InfeasibleError: If there is none, or one that the encoder does not have.
    """
    wanted: list[Any] = [layers] if isinstance(layers, int) else list(layers)
    if not wanted or any(isinstance(layer, str) or not -depth <= layer < depth for layer in wanted):
        shown = layers if isinstance(layers, int) else list(layers)
        raise InfeasibleError(f"attention.layers must be in [{-depth}, {depth - 1}] for {depth} blocks, got {shown}.")
    return tuple(sorted({layer % depth for layer in wanted}))


def resolve_heads(heads: Heads, num_heads: int) -> Heads:
    """``mean``, ``max``, or the wanted heads counted from the start.

    Raises:
        ValueError: If it is neither, or a head does not exist.
    """
    if heads in ("mean", "max"):
        return heads
    if isinstance(heads, str) or not heads or any(not -num_heads <= head < num_heads for head in heads):
        shown = heads if isinstance(heads, str) else list(heads)
        raise ValueError(f"attention.heads must be mean, max, or indices below {num_heads}, got {shown}.")
    return tuple(sorted({head % num_heads for head in heads}))


def attention_rows(queries_BHK: Tensor, keys_BHL: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention probabilities [B, H, K, L], float32, of K queries over L keys, each [B, H, ., head width]."""
    logits: Tensor = (queries_BHK @ keys_BHL.mT).float() * keys_BHL.shape[-1] ** -0.5
    return (logits if bias is None else logits + bias).softmax(dim=-1)


def cls_row(block: Block, tokens_BLD: Tensor, bias_BHLL: Tensor | None = None) -> Tensor:
    """Attention probabilities [B, H, L - 1] of [CLS] over the other tokens in one block, given the block's input.

    Only the query of [CLS] is formed, so memory is linear in the number of tokens.
    """
    normed = block.norm1(tokens_BLD)
    bias = None if bias_BHLL is None else bias_BHLL[:, :, :1]
    return attention_rows(_projected(block, normed[:, :1], 0), _projected(block, normed, 1), bias).squeeze(2)[..., 1:]


def stretch(maps: Tensor) -> Tensor:
    """Each map [..., N] stretched to [0, 1]; a constant map becomes zeros."""
    low, high = maps.aminmax(dim=-1, keepdim=True)
    return (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)


def join_heads(rows_BHN: Tensor, heads: Heads = "mean") -> Tensor:
    """scores_BN in [0, 1]: each head's map stretched to [0, 1], then their mean (of all heads or some) or maximum."""
    if heads == "max":
        return stretch(rows_BHN).amax(dim=1)
    chosen = rows_BHN if isinstance(heads, str) else rows_BHN[:, list(heads)]
    return stretch(chosen).mean(dim=1)


@torch.no_grad()
def score_maps(
    model: Encoder, images_BCYX: Tensor, layers: int | Sequence[int] = (-1,), heads: Heads = "mean"
) -> Tensor:
    """The score maps of several layers in one pass.

    Args:
        model: The encoder; run in eval mode and left in the mode in which it came.
        images_BCYX: Whole images, normalised, of the encoder's size; nothing is masked.
        layers: Layers in the order wanted; negative indices count from the end.
        heads: ``mean``, ``max``, or the indices of the heads to average.

    Returns:
        maps [B, K, N] in [0, 1], one a layer. Layers above the highest scored one are not run.

    Raises:
        ValueError: If a layer or head does not exist.
    """
    wanted = [layers] if isinstance(layers, int) else list(layers)
    indices = resolve_layers(wanted, model.depth)
    heads = resolve_heads(heads, model.blocks[0].attn.num_heads)  # type: ignore[union-attr, arg-type]
    found: dict[int, Tensor] = {}
    with _evaluating(model):
        bias = model.attention_bias()
        tokens = model.embed(patchify(images_BCYX, model.patch_size))
        for position, block in enumerate(model.blocks[: indices[-1] + 1]):
            if position in indices:
                found[position] = join_heads(cls_row(block, tokens, bias), heads)
            if position < indices[-1]:
                tokens = _through(block, tokens, bias)
    return torch.stack([found[layer % model.depth] for layer in wanted], dim=1)


@torch.no_grad()
def rollout(model: Encoder, images_BCYX: Tensor, heads: Heads = "mean") -> Tensor:
    """Attention rollout (Abnar and Zuidema 2020, https://arxiv.org/abs/2005.00928): the [CLS] row of the product over
    layers of (A + I) / 2.

    The row is carried down through the layers, so no N x N matrix is formed; a layer's attention is made a few query
    rows at a time. Memory is linear in N: the inputs of all layers are kept.

    Args:
        model: The encoder; run in eval mode and left in the mode in which it came.
        images_BCYX: Whole images, normalised.
        heads: How the heads' probabilities are joined (and rows then scaled to sum to 1): ``mean``, ``max``, or the
            indices of the heads to average.

    Returns:
        scores_BN in [0, 1].
    """
    heads = resolve_heads(heads, model.blocks[0].attn.num_heads)  # type: ignore[union-attr, arg-type]
    with _evaluating(model):
        bias = model.attention_bias()
        inputs = [model.embed(patchify(images_BCYX, model.patch_size))]
        for block in model.blocks[:-1]:
            inputs.append(_through(block, inputs[-1], bias))
        row_BL = torch.zeros(inputs[0].shape[:2], device=images_BCYX.device)
        row_BL[:, 0] = 1
        for layer in reversed(range(model.depth)):
            row_BL = (row_BL + _row_times_attention(row_BL, model.blocks[layer], inputs[layer], bias, heads)) / 2
    return stretch(row_BL[:, 1:])


def cls_attention(model: Encoder, images_BCYX: Tensor, layers: Layers = (-1,), heads: Heads = "mean") -> Tensor:
    """Score each patch by how much [CLS] attends to it (AMT, https://arxiv.org/abs/2211.15362, section on masking).

    Args:
        model: The encoder; run in eval mode and left in the mode in which it came.
        images_BCYX: Whole images, normalised, of the encoder's size; nothing is masked.
        layers: One layer or several, whose maps are averaged; negative indices count from the end; or ``rollout``.
        heads: ``mean``, ``max``, or the indices of the heads to average.

    Returns:
        scores_BN in [0, 1]. Layers above the highest scored one are not run.

    Raises:
        ValueError: If a layer or head does not exist.
    """
    if layers == ROLLOUT:
        return rollout(model, images_BCYX, heads)
    assert not isinstance(layers, str)
    wanted = resolve_layers(layers, model.depth)
    return score_maps(model, images_BCYX, wanted, heads).mean(dim=1)


@dataclass(frozen=True)
class Scoring:
    """What is scored: `cls_attention`'s settings, as an object.

    Args:
        layers: One layer, several, or ``rollout``.
        heads: ``mean``, ``max``, or indices.
        dtype: Precision of the pass; float32 or bfloat16 (autocast).
    """

    layers: Layers = -1
    heads: Heads = "mean"
    dtype: torch.dtype = torch.float32

    def __call__(self, model: Encoder, images_BCYX: Tensor) -> Tensor:
        """scores_BN of whole images."""
        with self.autocast(images_BCYX.device):
            return cls_attention(model, images_BCYX, self.layers, self.heads)

    def autocast(self, device: torch.device) -> torch.autocast:
        """The precision of the pass."""
        return torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    @property
    def name(self) -> str:
        """Equal for equal settings."""
        return f"{self.layers} {self.heads} {self.dtype}"


def score_by(scorings: Sequence[Scoring], model: Encoder, images_BCYX: Tensor) -> Tensor:
    """scores_KBN of whole images by several scorings: exactly what each would give alone.

    Those that differ in their layers only share one pass.
    """
    found: dict[str, Tensor] = {}
    for heads, dtype in {(str(s.heads), s.dtype): (s.heads, s.dtype) for s in scorings}.values():
        alike = [s for s in scorings if (s.heads, s.dtype) == (heads, dtype)]
        found |= {s.name: s(model, images_BCYX) for s in alike if s.layers == ROLLOUT}
        wanted = {s.name: resolve_layers(s.layers, model.depth) for s in alike if s.layers != ROLLOUT}
        if not wanted:
            continue
        together = sorted({layer for layers in wanted.values() for layer in layers})
        with alike[0].autocast(images_BCYX.device):
            maps_BLN = score_maps(model, images_BCYX, together, heads)
        for name, layers in wanted.items():
            found[name] = maps_BLN[:, [together.index(layer) for layer in layers]].mean(dim=1)
    return torch.stack([found[scoring.name] for scoring in scorings])


@contextlib.contextmanager
def _evaluating(model: Encoder) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _through(block: Block, tokens_BLD: Tensor, bias_BHLL: Tensor | None) -> Tensor:
    through: Tensor = (
        block(tokens_BLD) if bias_BHLL is None else block(tokens_BLD, attn_mask=bias_BHLL.to(tokens_BLD.dtype))
    )
    return through


def _projected(block: Block, normed_BLD: Tensor, part: int) -> Tensor:
    """Queries (part 0) or keys (part 1) [B, H, L, head width]."""
    attn = block.attn
    weight, bias = attn.qkv.weight.chunk(3)[part], attn.qkv.bias.chunk(3)[part]
    flat = torch.nn.functional.linear(normed_BLD, weight, bias)
    return flat.reshape(*flat.shape[:2], attn.num_heads, -1).transpose(1, 2)


def _row_times_attention(
    row_BL: Tensor, block: Block, tokens_BLD: Tensor, bias_BHLL: Tensor | None, heads: Heads
) -> Tensor:
    normed = block.norm1(tokens_BLD)
    queries, keys = _projected(block, normed, 0), _projected(block, normed, 1)
    total = torch.zeros_like(row_BL)
    for start in range(0, row_BL.shape[1], QUERY_CHUNK):
        chunk = slice(start, start + QUERY_CHUNK)
        rows = attention_rows(queries[:, :, chunk], keys, None if bias_BHLL is None else bias_BHLL[:, :, chunk])
        if heads == "max":
            joined = rows.amax(dim=1)
            joined = joined / joined.sum(dim=-1, keepdim=True)
        else:
            joined = (rows if isinstance(heads, str) else rows[:, list(heads)]).mean(dim=1)
        total += (row_BL[:, chunk].unsqueeze(1) @ joined).squeeze(1)
    return total
