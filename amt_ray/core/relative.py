"""Relative position bias: a learned number a head for each offset between two patches."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RelativePositions(nn.Module):
    """One table shared by all blocks (BEiT, https://arxiv.org/abs/2106.08254; SimMIM's pretraining shares it too).

    Three further entries a head stand for [CLS] to patch, patch to [CLS] and [CLS] to itself.

    Args:
        grid: Rows and columns of the patch grid.
        num_heads: H.
    """

    def __init__(self, grid: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        rows, columns = grid
        offsets = (2 * rows - 1) * (2 * columns - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets + 3, num_heads))
        place = torch.arange(rows * columns)
        row, column = place // columns, place % columns
        down = row.unsqueeze(1) - row + rows - 1
        right = column.unsqueeze(1) - column + columns - 1
        index_LL = torch.full((1 + rows * columns, 1 + rows * columns), offsets + 2)
        index_LL[0, 1:] = offsets
        index_LL[1:, 0] = offsets + 1
        index_LL[1:, 1:] = down * (2 * columns - 1) + right
        self.register_buffer("index_LL", index_LL, persistent=False)

    def forward(self, index_BK: Tensor | None = None) -> Tensor:
        """The bias [B, H, 1 + K, 1 + K] of [CLS] and the patches at ``index_BK``; [1, H, L, L] of all where None."""
        index_LL: Tensor = self.index_LL  # type: ignore[assignment]
        if index_BK is None:
            return self.relative_position_bias_table[index_LL].permute(2, 0, 1).unsqueeze(0)
        tokens_BL = torch.cat([torch.zeros_like(index_BK[:, :1]), index_BK + 1], dim=1)
        offsets_BLL = index_LL[tokens_BL.unsqueeze(2), tokens_BL.unsqueeze(1)]
        return self.relative_position_bias_table[offsets_BLL].permute(0, 3, 1, 2)


def resized_table(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """The bias table of another patch grid: bicubic over the offsets, the entries of [CLS] kept.

    Args:
        table: [(2 rows - 1)(2 columns - 1) + 3, H] of the old grid.
        old_grid: Rows and columns that the table is of.
        new_grid: Rows and columns wanted.

    Raises:
        ValueError: If the table is not of ``old_grid``.
    """
    if old_grid == new_grid:
        return table
    old, new = ((2 * rows - 1, 2 * columns - 1) for rows, columns in (old_grid, new_grid))
    if len(table) != old[0] * old[1] + 3:
        raise ValueError(
            f"a table of relative positions must have {old[0] * old[1] + 3} entries for {old_grid[0]} x {old_grid[1]} "
            f"patches, got {len(table)}."
        )
    offsets = table[:-3].T.reshape(1, -1, *old).float()
    resized = F.interpolate(offsets, size=new, mode="bicubic", align_corners=False)
    return torch.cat([resized.flatten(2)[0].T.to(table.dtype), table[-3:]])
