"""SimMIM (Xie et al., CVPR 2022, https://arxiv.org/abs/2111.09886), on any `PatchPlan`."""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from amt_ray.core.methods import Method, MethodOutput, denormalise_patches, masked_pixels, normalise_patches
from amt_ray.core.plan import PatchPlan
from amt_ray.core.tokens import patchify


class SimMIM(Method):
    """Encoder on visible patches and mask tokens, a linear head, absolute error on the masked pixels.

    Thrown patches are left out altogether. The public ViT-B settings are ``positions="none", relative_positions=True,
    layer_scale=0.1, drop_path=0.1``; AMT's authors used absolute positions, which are the default here.

    Args:
        img_size: Side of the image in pixels, or (rows, columns).
        patch_size: Side of a patch in pixels.
        in_chans: Colour channels.
        embed_dim: Width D.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLPs over D.
        positions: Absolute position embedding: ``sincos``, ``learned``, or ``none``.
        relative_positions: Whether a relative position bias, shared by all blocks, is added to the attention.
        layer_scale: Initial layer scale, or None for none.
        drop_path: Rate of stochastic depth in the last block.
        norm_pix_loss: Whether targets are normalised patch by patch.
    """

    unit_patches: ClassVar[int] = 2

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        positions: Literal["sincos", "learned", "none"] = "sincos",
        relative_positions: bool = False,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        norm_pix_loss: bool = False,
    ) -> None:
        super().__init__(
            img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, positions, relative_positions,
            layer_scale, drop_path,
        )  # fmt: skip
        self.norm_pix_loss = norm_pix_loss
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pixel_pred = nn.Linear(embed_dim, patch_size * patch_size * in_chans)
        self.init_weights()
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, images_BCYX: Tensor, plan: PatchPlan) -> MethodOutput:
        """Predict the masked patches of normalised images in the context of the visible ones.

        Args:
            images_BCYX: Normalised images of the model's size.
            plan: Visible, masked and thrown patches of each image.

        Returns:
            loss (mean absolute error over images, masked patches and values), pred [B, M, P], loss_B.
        """
        tokens = self.encode(patchify(images_BCYX, self.patch_size), plan.visible, plan.masked, self.mask_token)
        pred_BMP = self.pixel_pred(tokens[:, -plan.masked.shape[1] :])
        target_BMP = masked_pixels(images_BCYX, plan, self.patch_size)
        if self.norm_pix_loss:
            target_BMP = normalise_patches(target_BMP)
        loss_B = (pred_BMP.float() - target_BMP).abs().mean(dim=(1, 2))
        return MethodOutput(loss_B.mean(), pred_BMP, loss_B)

    def reconstruction(self, pred_BMP: Tensor, images_BCYX: Tensor, plan: PatchPlan) -> Tensor:
        """The prediction as pixels of the normalised images, [B, M, P]."""
        if not self.norm_pix_loss:
            return pred_BMP.float()
        return denormalise_patches(pred_BMP, masked_pixels(images_BCYX, plan, self.patch_size))
