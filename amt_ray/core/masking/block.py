"""Block-wise masking (BEiT, Bao et al., ICLR 2022, https://arxiv.org/abs/2106.08254, algorithm 1)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from amt_ray.core.masking import drawn_noise
from amt_ray.core.noise import Purpose, uniform
from amt_ray.core.plan import Counts, PatchPlan, plan_counts


@dataclass(frozen=True)
class Block:
    """Rectangles of random size, shape and place, one after another until the masking ratio is reached.

    A block has at least ``min_block`` patches and at most what is still to be masked. The patches of the last block
    that would be too many stay unmasked, chosen at random, so that the counts are exact. What is thrown, if anything,
    continues the row of blocks: the control for AMT with whole regions.

    Args:
        mask_ratio: r_m; masked = int(N r_m).
        throw_ratio: r_t; thrown = int(N (r_m + r_t)) - masked.
        grid: Rows and columns; None for a square.
        min_block: Least patches of a block, where so many are still wanted.
        min_aspect: Least height / width of a block; the greatest is its inverse.

    Raises:
        ValueError: If an option is out of its range.
    """

    mask_ratio: float = 0.40
    throw_ratio: float = 0.0
    grid: tuple[int, int] | None = None
    min_block: int = 16
    min_aspect: float = 0.3
    needs_scores: ClassVar[bool] = False
    throws: ClassVar[bool] = True
    rounds: ClassVar[int] = 32

    def __post_init__(self) -> None:
        if self.min_block < 1 or not 0 < self.min_aspect <= 1:
            raise ValueError(
                f"min_block must be at least 1 and min_aspect in (0, 1], got {self.min_block}, {self.min_aspect:.4g}."
            )

    def counts(self, num_patches: int) -> Counts:
        """Exact counts of ``num_patches``; ValueError where they are impossible or the grid is another."""
        self._grid(num_patches)
        return plan_counts(num_patches, self.mask_ratio, self.throw_ratio)

    def __call__(
        self, scores_BN: Tensor, generator: torch.Generator | None = None, noise_BN: Tensor | None = None
    ) -> PatchPlan:
        """Draw a plan for B images of N patches; only the scores' shape and device are used."""
        noise_BN = drawn_noise(scores_BN, generator, noise_BN)
        N = scores_BN.shape[1]
        counts = self.counts(N)
        round_BN = self._first_round(noise_BN, counts.masked + counts.thrown)
        return PatchPlan.from_order((round_BN + noise_BN.float()).argsort(dim=1), counts)

    def _grid(self, num_patches: int) -> tuple[int, int]:
        side = math.isqrt(num_patches)
        grid = self.grid or (side, side)
        if grid[0] * grid[1] != num_patches:
            raise ValueError(f"block masking must know the grid of a non-square image, got {grid} for {num_patches}.")
        return grid

    def _first_round(self, noise_BN: Tensor, wanted: int) -> Tensor:
        """The round [B, N] in which a block first covers each patch; ``rounds`` where none does.

        More numbers an image are needed than it has patches, so its noise serves as the key of a hash.
        """
        B, N = noise_BN.shape
        rows, columns = self._grid(N)
        bits = (noise_BN[:, :2].double() * 2**24).long()
        draws = uniform(0, 0, bits[:, 0] * 2**24 + bits[:, -1], Purpose.BLOCKS, 4 * self.rounds)
        y = torch.arange(rows, device=noise_BN.device).view(1, rows, 1)
        x = torch.arange(columns, device=noise_BN.device).view(1, 1, columns)
        first = torch.full((B, rows, columns), self.rounds, device=noise_BN.device)
        for i, u_B4 in enumerate(draws.view(B, self.rounds, 4).unbind(1)):
            left_B = wanted - (first < self.rounds).sum((1, 2))
            least_B = left_B.clamp_max(self.min_block).float()
            area_B = least_B + u_B4[:, 0] * (left_B - least_B)
            aspect_B = (math.log(self.min_aspect) * (2 * u_B4[:, 1] - 1)).exp()
            height = (area_B * aspect_B).sqrt().round().clamp(1, rows).long().view(B, 1, 1)
            width = (area_B / aspect_B).sqrt().round().clamp(1, columns).long().view(B, 1, 1)
            top = (u_B4[:, 2].view(B, 1, 1) * (rows - height + 1)).long()
            left = (u_B4[:, 3].view(B, 1, 1) * (columns - width + 1)).long()
            inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
            wanting = (left_B > 0).view(B, 1, 1)
            first = torch.where(inside & wanting & (first == self.rounds), i, first)
        return first.flatten(1)
