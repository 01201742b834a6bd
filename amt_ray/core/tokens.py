"""Patches and tokens, and the shape legend of the whole of `amt_ray.core`.

Shape suffixes (the last part of a name, one letter an axis):

=====  =======================================================================
 B     images in the batch
 C     colour channels
 Y, X  pixel rows and columns
 N     patches of an image, row by row: patch n is at (n // grid_x, n % grid_x)
 G, W  rows and columns of the patch grid, N = G * W
 P     values of one patch, patch_size * patch_size * C, channel last
 V     visible patches: the encoder's input
 M     masked patches: the reconstruction targets
 T     thrown patches: in neither encoder, decoder nor loss; N = V + M + T
 K     any number of chosen patches or layers
 L     tokens in a sequence: [CLS] and patches
 D     embedding width
 H     attention heads
=====  =======================================================================
"""

import torch
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor


def pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """A size given once or as (rows, columns), as (rows, columns)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def patch_grid(img_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of the patch grid.

    Raises:
        ValueError: If the patch does not divide the image.
    """
    rows, columns = pair(img_size)
    if patch_size < 1 or rows % patch_size or columns % patch_size:
        raise ValueError(f"patch_size must divide the image size, got {patch_size} for {rows} x {columns}.")
    return rows // patch_size, columns // patch_size


def patchify(images_BCYX: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches.

    Args:
        images_BCYX: Images whose sides are multiples of ``patch_size``.
        patch_size: Side of the square patch in pixels.

    Returns:
        patches_BNP; the values of a patch run over its rows, then columns, then channels, which is the order of
        the public MAE checkpoints' pixel head.
    """
    B, C, Y, X = images_BCYX.shape
    rows, columns = patch_grid((Y, X), patch_size)
    cut = images_BCYX.reshape(B, C, rows, patch_size, columns, patch_size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(B, rows * columns, patch_size * patch_size * C)


def unpatchify(patches_BNP: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Put patches back in their places: the inverse of `patchify`, giving images_BCYX."""
    B, _, P = patches_BNP.shape
    rows, columns = grid
    C = P // (patch_size * patch_size)
    cut = patches_BNP.reshape(B, rows, columns, patch_size, patch_size, C)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(B, C, rows * patch_size, columns * patch_size)


def gather_tokens(tokens_BND: Tensor, index_BK: Tensor) -> Tensor:
    """tokens_BKD: for each image the tokens at ``index_BK``; a batch of one is shared by all images."""
    B, K = index_BK.shape
    D = tokens_BND.shape[-1]
    return tokens_BND.expand(B, -1, -1).gather(1, index_BK.unsqueeze(-1).expand(B, K, D))


def sincos_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed sine-cosine position embedding with a zero row for [CLS], laid out as in the public MAE checkpoints.

    Args:
        dim: Embedding width, a multiple of 4.
        grid: Rows and columns of the patch grid.

    Returns:
        [1, 1 + N, dim], float32. A patch's row holds the sines, then cosines of its column, then of its row.

    Raises:
        ValueError: If ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"an embedding width must be a multiple of 4 for sine-cosine positions, got {dim}.")
    # timm lays a row out as (sine, cosine) x (row, column); the checkpoints have (column, row) x (sine, cosine)
    by_wave = build_sincos2d_pos_embed(list(grid), dim).reshape(-1, 2, 2, dim // 4)
    patches_ND = by_wave.flip(2).transpose(1, 2).reshape(-1, dim)
    return torch.cat([torch.zeros(1, dim), patches_ND]).unsqueeze(0)
