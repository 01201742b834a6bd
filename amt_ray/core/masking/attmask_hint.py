"""AttMask-Hint: mask the most attended patches but for a few (ECCV 2022, https://arxiv.org/abs/2203.12719)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from amt_ray.core.masking import checked, drawn_noise, never_throws, ranked
from amt_ray.core.plan import Counts, PatchPlan, plan_counts


@dataclass(frozen=True)
class AttMaskHint:
    """Mask the most attended patches, and leave some of the very most attended visible as hints.

    The hints are drawn uniformly from the int(N top_ratio) most attended patches. In the source the mask shrinks by
    them; here the next patches down the ranking make up for them, so that the number of masked patches stays int(N r_m)
    and compares with the other strategies'.

    Args:
        mask_ratio: r_m; masked = int(N r_m).
        throw_ratio: Must be 0.
        top_ratio: Share of the patches, the most attended, from which hints are drawn.
        hint_share: Share of those that are revealed.

    Raises:
        ValueError: If something were to be thrown, or an option is out of its range.
    """

    mask_ratio: float = 0.75
    throw_ratio: float = 0.0
    top_ratio: float = 0.1
    hint_share: float = 0.5
    needs_scores: ClassVar[bool] = True
    throws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        never_throws("attmask_hint", self.throw_ratio)
        if not (0 <= self.top_ratio <= 1 and 0 <= self.hint_share <= 1):
            raise ValueError(
                f"top_ratio and hint_share must be in [0, 1], got {self.top_ratio:.4g} and {self.hint_share:.4g}."
            )

    def hints(self, num_patches: int) -> tuple[int, int]:
        """Patches among which hints are drawn, and how many are."""
        top = int(num_patches * self.top_ratio)
        return top, round(top * self.hint_share)

    def counts(self, num_patches: int) -> Counts:
        """Exact counts of ``num_patches``; ValueError where none would be visible or masked, or hints do not fit."""
        counts, (_, hints) = plan_counts(num_patches, self.mask_ratio), self.hints(num_patches)
        if counts.visible < hints:
            raise ValueError(
                f"the visible patches must hold the hints, got {counts.visible} of {num_patches} for {hints} hints."
            )
        return counts

    def __call__(
        self, scores_BN: Tensor, generator: torch.Generator | None = None, noise_BN: Tensor | None = None
    ) -> PatchPlan:
        """The plan of B images from their scores."""
        noise_BN = drawn_noise(scores_BN, generator, noise_BN)
        counts, (top, hints) = self.counts(scores_BN.shape[1]), self.hints(scores_BN.shape[1])
        order_BN = ranked(checked(scores_BN), noise_BN)
        first, rest = order_BN[:, :top], order_BN[:, top:]
        first = first.gather(1, noise_BN.gather(1, first).argsort(dim=1))
        return PatchPlan.from_order(torch.cat([first[:, hints:], rest, first[:, :hints]], dim=1), counts)
