"""Attention-driven masking and throwing (Gui et al., AAAI 2023, https://arxiv.org/abs/2211.15362)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from amt_ray.core.masking import drawn_noise
from amt_ray.core.plan import Counts, PatchPlan, plan_counts


def attention_order(scores_BN: Tensor, noise_BN: Tensor) -> Tensor:
    """An order of the patches without replacement, with probability proportional to the scores.

    A Plackett-Luce draw by the Gumbel trick (Yellott 1977; Kool et al. 2019, https://arxiv.org/abs/1903.06059): sorting
    log w + Gumbel noise downwards is the same as drawing patch after patch with probability w over what is left.
    Zero weights come last, in uniform order among themselves.

    Args:
        scores_BN: Weights >= 0, any scale an image.
        noise_BN: Uniform in (0, 1).

    Returns:
        order_BN, int64.
    """
    log_weight_BN = scores_BN.float().clamp_min(torch.finfo(torch.float32).tiny).log()
    gumbel_BN = -(-noise_BN.float().log()).log()
    return (log_weight_BN + gumbel_BN).argsort(dim=1, descending=True)


@dataclass(frozen=True)
class AMT:
    """Mask what the encoder attends to, throw the middle away, keep the rest as context.

    Args:
        mask_ratio: r_m; masked = int(N r_m), the first patches of the attention-weighted order.
        throw_ratio: r_t; thrown = int(N (r_m + r_t)) - masked, the patches that follow.
    """

    mask_ratio: float = 0.45
    throw_ratio: float = 0.40
    needs_scores: ClassVar[bool] = True

    def counts(self, num_patches: int) -> Counts:
        """Exact counts of ``num_patches``; ValueError where none would be visible or masked."""
        return plan_counts(num_patches, self.mask_ratio, self.throw_ratio)

    def __call__(
        self, scores_BN: Tensor, generator: torch.Generator | None = None, noise_BN: Tensor | None = None
    ) -> PatchPlan:
        """Draw a plan for B images from their scores (finite, >= 0)."""
        order_BN = attention_order(scores_BN, drawn_noise(scores_BN, generator, noise_BN))
        return PatchPlan.from_order(order_BN, self.counts(scores_BN.shape[1]))
