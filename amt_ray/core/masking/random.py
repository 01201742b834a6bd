"""Uniform random masking (MAE, He et al. 2022, https://arxiv.org/abs/2111.06377), with optional random throwing."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from amt_ray.core.masking import drawn_noise
from amt_ray.core.plan import Counts, PatchPlan, plan_counts


@dataclass(frozen=True)
class Random:
    """Mask patches drawn uniformly without replacement; the scores are not looked at.

    Throwing at random too gives the control for AMT: the same cost, without attention.

    Args:
        mask_ratio: r_m; masked = int(N r_m).
        throw_ratio: r_t; visible = N - int(N (r_m + r_t)).
    """

    mask_ratio: float = 0.75
    throw_ratio: float = 0.0
    needs_scores: ClassVar[bool] = False
    throws: ClassVar[bool] = True

    def counts(self, num_patches: int) -> Counts:
        """Exact counts of ``num_patches``; ValueError where none would be visible or masked."""
        return plan_counts(num_patches, self.mask_ratio, self.throw_ratio)

    def __call__(
        self, scores_BN: Tensor, generator: torch.Generator | None = None, noise_BN: Tensor | None = None
    ) -> PatchPlan:
        """Draw a plan for B images of N patches; only the scores' shape and device are used."""
        order_BN = drawn_noise(scores_BN, generator, noise_BN).argsort(dim=1)
        return PatchPlan.from_order(order_BN, self.counts(scores_BN.shape[1]))
