"""The transformer block: timm's, with the attention that is fastest where it runs, and activation checkpointing."""

import torch
from timm.layers import use_fused_attn
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MOST_TOKENS = 256  # beyond, an attention matrix costs more memory than the fused kernel's backward pass costs time


class TransformerBlock(Block):
    """timm's pre-norm block, its parameters' names and its arithmetic.

    Attention is torch's fused kernel, except where that is slow: on the CPU in bfloat16, whose backward pass takes two
    to eight times as long as plain matrix products with a softmax (`benchmarks/README.md`).

    Attributes:
        recompute: Whether activations inside the block are computed again in the backward pass instead of kept.
    """

    recompute = False

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """The block's output tokens [B, L, D]; arguments as timm's."""
        if self.recompute and torch.is_grad_enabled():
            out: Tensor = checkpoint(self._forward, x, attn_mask, is_causal, use_reentrant=False)  # type: ignore[assignment]
            return out
        return self._forward(x, attn_mask, is_causal)

    def _forward(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        self.attn.fused_attn = use_fused_attn() and not _products_are_faster(x)
        out: Tensor = super().forward(x, attn_mask, is_causal)
        return out


def _products_are_faster(tokens_BLD: Tensor) -> bool:
    return (
        tokens_BLD.device.type == "cpu"
        and torch.is_grad_enabled()
        and (torch.is_autocast_enabled("cpu") or tokens_BLD.dtype == torch.bfloat16)
        and tokens_BLD.shape[1] <= MOST_TOKENS
    )


def recompute_activations(model: nn.Module) -> None:
    """Keep only the inputs of the blocks for the backward pass: memory linear in depth for a third more operations."""
    for module in model.modules():
        if isinstance(module, TransformerBlock):
            module.recompute = True
