"""What happens to each patch: visible, masked or thrown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

VISIBLE, MASKED, THROWN = 0, 1, 2
MASKED_FIRST = ("masked", "thrown", "visible")


class InfeasibleError(ValueError):
    """A setting that is sound in itself, but not together with the others: a search leaves such points out."""


class Counts(NamedTuple):
    """How many of an image's N patches are visible, masked and thrown."""

    visible: int
    masked: int
    thrown: int


def plan_counts(num_patches: int, mask_ratio: float, throw_ratio: float = 0.0) -> Counts:
    """Exact patch counts: masked = int(N r_m), visible = N - int(N (r_m + r_t)), thrown = the rest.

    Args:
        num_patches: N.
        mask_ratio: r_m, share of the patches that are reconstruction targets.
        throw_ratio: r_t, share of the patches that no part of the model sees.

    Raises:
        ValueError: If a ratio is outside [0, 1].
        InfeasibleError: If fewer than one patch would be masked or visible.
    """
    if not (0 <= mask_ratio <= 1 and 0 <= throw_ratio <= 1):
        raise ValueError(f"mask_ratio and throw_ratio must be in [0, 1], got {mask_ratio} and {throw_ratio}.")
    masked = int(num_patches * mask_ratio)
    visible = num_patches - int(num_patches * (mask_ratio + throw_ratio))
    if visible < 1:
        raise InfeasibleError(
            f"mask_ratio + throw_ratio must leave at least one visible patch, "
            f"got {mask_ratio:.4g} + {throw_ratio:.4g} of {num_patches}."
        )
    if masked < 1:
        raise InfeasibleError(f"mask_ratio must mask at least one patch, got {mask_ratio:.4g} of {num_patches}.")
    return Counts(visible, masked, num_patches - visible - masked)


@dataclass(frozen=True, slots=True)
class PatchPlan:
    """Three index sets an image that partition range(N).

    Attributes:
        visible: [B, V] int64, indices into N of the patches that the encoder sees.
        masked: [B, M] int64, indices of the patches to be reconstructed.
        thrown: [B, T] int64, indices of the patches that nothing sees; T may be 0.

    Within a set the patches stand in the order in which the strategy drew them.

    Raises:
        ValueError: If the sets are not [B, .] int64 with one B.
    """

    visible: Tensor
    masked: Tensor
    thrown: Tensor

    def __post_init__(self) -> None:
        sets = (self.visible, self.masked, self.thrown)
        if any(s.ndim != 2 or s.dtype != torch.int64 or len(s) != len(self.visible) for s in sets):
            got = ", ".join(f"{tuple(s.shape)} {s.dtype}" for s in sets)
            raise ValueError(f"visible, masked and thrown must be [B, count] int64 with one B, got {got}.")

    @classmethod
    def from_order(cls, order_BN: Tensor, counts: Counts, kinds: Sequence[str] = MASKED_FIRST) -> "PatchPlan":
        """Cut an order of the patches in three.

        Args:
            order_BN: A permutation of range(N) an image.
            counts: How many patches of each kind.
            kinds: ``masked``, ``thrown`` and ``visible`` in the order in which they take patches.
        """
        cut = order_BN.split([getattr(counts, kind) for kind in kinds], dim=1)
        return cls(**dict(zip(kinds, cut, strict=True)))

    def expand(self, grid: tuple[int, int], unit: int) -> "PatchPlan":
        """The plan of the patches, from this plan of square masking units.

        Args:
            grid: Rows and columns of the patch grid, multiples of ``unit``.
            unit: Side of a masking unit in patches.

        Returns:
            A plan over G * W patches in which the patches of a unit share its kind and stand together.
        """
        if unit == 1:
            return self
        columns = grid[1]
        side = torch.arange(unit, device=self.visible.device)
        inside_U = (side.unsqueeze(1) * columns + side).flatten()

        def patches(unit_BK: Tensor) -> Tensor:
            row, column = unit_BK // (columns // unit), unit_BK % (columns // unit)
            corner_BK = (row * columns + column) * unit
            return (corner_BK.unsqueeze(2) + inside_U).flatten(1)

        return PatchPlan(patches(self.visible), patches(self.masked), patches(self.thrown))

    @property
    def num_patches(self) -> int:
        """N, the patches of one image."""
        return self.visible.shape[1] + self.masked.shape[1] + self.thrown.shape[1]

    def kinds(self) -> Tensor:
        """[B, N] int8: VISIBLE, MASKED or THROWN at each patch's place (for drawing and checking)."""
        kinds_BN = torch.full((len(self.visible), self.num_patches), -1, dtype=torch.int8, device=self.visible.device)
        for kind, index_BK in ((VISIBLE, self.visible), (MASKED, self.masked), (THROWN, self.thrown)):
            kinds_BN.scatter_(1, index_BK, kind)
        return kinds_BN

    def check(self) -> "PatchPlan":
        """Itself, after a look at every index (synchronises the device, so not for the training step).

        Raises:
            ValueError: If a row is not a partition of range(N).
        """
        everything = torch.cat([self.visible, self.masked, self.thrown], 1).sort(1).values
        broken_B = (everything != torch.arange(self.num_patches, device=everything.device)).any(1)
        if broken_B.any():
            raise ValueError(
                f"a plan's rows must partition range({self.num_patches}), got {everything[broken_B][0].tolist()}."
            )
        return self
