"""AttMask-Low: mask the least attended patches (Kakogeorgiou et al., ECCV 2022, https://arxiv.org/abs/2203.12719)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from amt_ray.core.masking import checked, drawn_noise, never_throws, ranked
from amt_ray.core.plan import Counts, PatchPlan, plan_counts


@dataclass(frozen=True)
class AttMaskLow:
    """Mask exactly the least attended patches, the control of AttMask-High; chance only breaks ties.

    Args:
        mask_ratio: r_m; masked = int(N r_m).
        throw_ratio: Must be 0.

    Raises:
        ValueError: If something were to be thrown.
    """

    mask_ratio: float = 0.75
    throw_ratio: float = 0.0
    needs_scores: ClassVar[bool] = True
    throws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        never_throws("attmask_low", self.throw_ratio)

    def counts(self, num_patches: int) -> Counts:
        """Exact counts of ``num_patches``; ValueError where none would be visible or masked."""
        return plan_counts(num_patches, self.mask_ratio)

    def __call__(
        self, scores_BN: Tensor, generator: torch.Generator | None = None, noise_BN: Tensor | None = None
    ) -> PatchPlan:
        """The plan of B images from their scores."""
        order_BN = ranked(checked(scores_BN), drawn_noise(scores_BN, generator, noise_BN)).flip(1)
        return PatchPlan.from_order(order_BN, self.counts(scores_BN.shape[1]))
