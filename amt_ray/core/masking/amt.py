"""Attention-driven masking and throwing (Gui et al., AAAI 2023, https://arxiv.org/abs/2211.15362)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from amt_ray.core.masking import checked, drawn_noise
from amt_ray.core.plan import MASKED_FIRST, Counts, PatchPlan, plan_counts


def attention_order(scores_BN: Tensor, noise_BN: Tensor, temperature: float = 1.0) -> Tensor:
    """An order of the patches without replacement, with probability proportional to scores ** (1 / temperature).

    A Plackett-Luce draw by the Gumbel trick (Yellott 1977; Kool et al. 2019, https://arxiv.org/abs/1903.06059): sorting
    log w + Gumbel noise downwards is the same as drawing patch after patch with probability w over what is left.
    Zero weights come last, in uniform order among themselves, at any temperature.

    Args:
        scores_BN: Weights >= 0, any scale an image.
        noise_BN: Uniform in (0, 1).
        temperature: Below 1 the draw is greedier, above 1 more uniform.

    Returns:
        order_BN, int64.
    """
    scores_BN = scores_BN.float()
    tiny = torch.finfo(torch.float32).tiny
    weight_BN = scores_BN / scores_BN.amax(dim=1, keepdim=True).clamp_min(tiny)
    log_weight_BN = weight_BN.clamp_min(tiny).log() / temperature
    behind = -(88 / temperature + 40)  # below the least positive weight by more than Gumbel noise spans
    gumbel_BN = -(-noise_BN.float().log()).log()
    return (torch.where(weight_BN > 0, log_weight_BN, behind) + gumbel_BN).argsort(dim=1, descending=True)


@dataclass(frozen=True)
class AMT:
    """Mask what the encoder attends to, throw the middle away, keep the rest as context.

    Args:
        mask_ratio: r_m; masked = int(N r_m).
        throw_ratio: r_t; thrown = int(N (r_m + r_t)) - masked.
        order: What becomes of the patches in the attention-weighted order, from the first drawn (mostly the most
            attended) on: ``masked``, ``thrown`` and ``visible`` in any order, joined by underscores. The paper's is
            masked_thrown_visible; thrown_masked_visible throws the most attended patches.
        temperature: Of the draw; 1 is the paper's, towards 0 the order is that of the scores, large ones are uniform.

    Raises:
        ValueError: If an option is out of its range.
    """

    mask_ratio: float = 0.45
    throw_ratio: float = 0.40
    order: str = "_".join(MASKED_FIRST)
    temperature: float = 1.0
    needs_scores: ClassVar[bool] = True
    throws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if sorted(self.order.split("_")) != sorted(MASKED_FIRST):
            raise ValueError(f"order must be masked, thrown and visible joined by underscores, got {self.order!r}.")
        if not 0.01 <= self.temperature <= 100:
            raise ValueError(f"temperature must be in [0.01, 100], got {self.temperature}.")

    def counts(self, num_patches: int) -> Counts:
        """Exact counts of ``num_patches``; ValueError where none would be visible or masked."""
        return plan_counts(num_patches, self.mask_ratio, self.throw_ratio)

    def __call__(
        self, scores_BN: Tensor, generator: torch.Generator | None = None, noise_BN: Tensor | None = None
    ) -> PatchPlan:
        """Draw a plan for B images from their scores."""
        noise_BN = drawn_noise(scores_BN, generator, noise_BN)
        order_BN = attention_order(checked(scores_BN), noise_BN, self.temperature)
        return PatchPlan.from_order(order_BN, self.counts(scores_BN.shape[1]), self.order.split("_"))
