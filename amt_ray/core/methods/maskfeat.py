"""MaskFeat (Wei et al., CVPR 2022, https://arxiv.org/abs/2112.09133): predict the masked patches' HOG features."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amt_ray.core.methods import Method, MethodOutput, masked_pixels
from amt_ray.core.plan import PatchPlan
from amt_ray.core.tokens import patchify, unpatchify


def hog(images_BCYX: Tensor, cell_px: int, bins: int = 9) -> Tensor:
    """Histograms of oriented gradients (Dalal and Triggs, CVPR 2005), channel by channel.

    Gradients are central differences, one-sided at the borders; a pixel votes for the bin of its gradient's direction
    (modulo 180 degrees) with its magnitude; a cell's histogram has length 1.

    Args:
        images_BCYX: Images whose sides are multiples of ``cell_px``.
        cell_px: Side of a cell in pixels.
        bins: Directions.

    Returns:
        [B, C * bins, Y / cell_px, X / cell_px], float32; zeros where a cell is flat.
    """
    padded = F.pad(images_BCYX.float(), (1, 1, 1, 1), mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    direction = (torch.atan2(down, across) / math.pi * bins).floor().long() % bins
    votes = torch.zeros(*direction.shape, bins, device=direction.device)
    votes.scatter_(-1, direction.unsqueeze(-1), torch.hypot(across, down).unsqueeze(-1))
    cells = F.avg_pool2d(votes.permute(0, 1, 4, 2, 3).flatten(1, 2), cell_px)
    B, _, rows, columns = cells.shape
    return F.normalize(cells.reshape(B, -1, bins, rows, columns), dim=2).flatten(1, 2)


class MaskFeat(Method):
    """Encoder on visible patches and mask tokens, a linear head, squared error on the masked patches' HOG.

    A patch holds 2 x 2 cells (8-pixel cells at the source's patch of 16; a patch that cannot be halved is one cell).
    Gradients are taken inside the patch, where the source takes them over the whole image: so no border of a thrown
    patch reaches a target.

    Args:
        img_size: Side of the image in pixels, or (rows, columns).
        patch_size: Side of a patch in pixels.
        in_chans: Colour channels.
        embed_dim: Width D.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLPs over D.
        bins: Directions of a histogram.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        bins: int = 9,
    ) -> None:
        super().__init__(img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio)
        self.bins = bins
        self.cells = 1 if patch_size % 2 else 2
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.hog_pred = nn.Linear(embed_dim, self.cells**2 * in_chans * bins)
        self.init_weights()
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def target(self, images_BCYX: Tensor, plan: PatchPlan) -> Tensor:
        """HOG of the masked patches, [B, M, cells * cells * C * bins]."""
        pixels_BMP = masked_pixels(images_BCYX, plan, self.patch_size)
        patches = unpatchify(pixels_BMP.flatten(0, 1).unsqueeze(1), self.patch_size, (1, 1))
        return hog(patches, self.patch_size // self.cells, self.bins).reshape(*pixels_BMP.shape[:2], -1)

    def forward(self, images_BCYX: Tensor, plan: PatchPlan) -> MethodOutput:
        """Predict the masked patches' HOG in the context of the visible ones.

        Args:
            images_BCYX: Normalised images of the model's size.
            plan: Visible, masked and thrown patches of each image.

        Returns:
            loss (mean over images, masked patches and values), pred [B, M, 4 C bins], loss_B.
        """
        tokens = self.encode(patchify(images_BCYX, self.patch_size), plan.visible, plan.masked, self.mask_token)
        pred_BMP = self.hog_pred(tokens[:, -plan.masked.shape[1] :])
        loss_B = (pred_BMP.float() - self.target(images_BCYX, plan)).square().mean(dim=(1, 2))
        return MethodOutput(loss_B.mean(), pred_BMP, loss_B)
