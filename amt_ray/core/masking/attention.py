"""Attention-driven masking without throwing: the ablation of AMT that only masks (https://arxiv.org/abs/2211.15362)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from amt_ray.core.masking import checked, drawn_noise, never_throws
from amt_ray.core.masking.amt import attention_order
from amt_ray.core.plan import Counts, PatchPlan, plan_counts


@dataclass(frozen=True)
class Attention:
    """Mask patches drawn with probability proportional to their attention; all others are visible.

    Args:
        mask_ratio: r_m; masked = int(N r_m).
        throw_ratio: Must be 0.
        temperature: Of the draw, as in AMT.

    Raises:
        ValueError: If something were to be thrown, or the temperature is out of its range.
    """

    mask_ratio: float = 0.75
    throw_ratio: float = 0.0
    temperature: float = 1.0
    needs_scores: ClassVar[bool] = True
    throws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        never_throws("attention", self.throw_ratio)
        if not 0.01 <= self.temperature <= 100:
            raise ValueError(f"temperature must be in [0.01, 100], got {self.temperature}.")

    def counts(self, num_patches: int) -> Counts:
        """Exact counts of ``num_patches``; ValueError where none would be visible or masked."""
        return plan_counts(num_patches, self.mask_ratio)

    def __call__(
        self, scores_BN: Tensor, generator: torch.Generator | None = None, noise_BN: Tensor | None = None
    ) -> PatchPlan:
        """Draw a plan for B images from their scores."""
        noise_BN = drawn_noise(scores_BN, generator, noise_BN)
        order_BN = attention_order(checked(scores_BN), noise_BN, self.temperature)
        return PatchPlan.from_order(order_BN, self.counts(scores_BN.shape[1]))
