"""Masked autoencoder (He et al., CVPR 2022, https://arxiv.org/abs/2111.06377), on any `PatchPlan`."""

import torch
from torch import Tensor, nn

from amt_ray.core.encoder import LAYER_NORM_EPS, transformer
from amt_ray.core.methods import Method, MethodOutput, denormalise_patches, masked_pixels, normalise_patches
from amt_ray.core.plan import PatchPlan
from amt_ray.core.tokens import gather_tokens, patchify, sincos_positions


class MAE(Method):
    """Encoder on the visible patches, light decoder on visible and masked ones, squared error on the masked.

    The names and shapes of its parameters are those of the public facebookresearch/mae pretraining checkpoints.

    Args:
        img_size: Side of the image in pixels, or (rows, columns).
        patch_size: Side of a patch in pixels.
        in_chans: Colour channels.
        embed_dim: Width of the encoder.
        depth: Blocks of the encoder.
        num_heads: Heads of the encoder.
        decoder_embed_dim: Width of the decoder.
        decoder_depth: Blocks of the decoder.
        decoder_num_heads: Heads of the decoder.
        mlp_ratio: Hidden width of the MLPs over the width.
        norm_pix_loss: Whether targets are normalised patch by patch.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = False,
    ) -> None:
        super().__init__(img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio)
        self.norm_pix_loss = norm_pix_loss
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(decoder_embed_dim, self.grid), requires_grad=False)
        self.decoder_blocks = transformer(decoder_embed_dim, decoder_depth, decoder_num_heads, mlp_ratio)
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size * patch_size * in_chans)
        self.init_weights()
        nn.init.normal_(self.mask_token, std=0.02)

    def decode(self, encoded: Tensor, plan: PatchPlan) -> Tensor:
        """Predict the masked patches.

        Args:
            encoded: [B, 1 + V, D], the encoder's output for [CLS] and the visible patches.
            plan: The plan that chose them.

        Returns:
            pred_BMP in the order of ``plan.masked``. Attention has no order of its own, so the tokens are not
            put back in place: each carries its position.
        """
        positions = self.decoder_pos_embed
        tokens = self.decoder_embed(encoded)
        seen = torch.cat(
            [positions[:, :1].expand(len(tokens), -1, -1), gather_tokens(positions[:, 1:], plan.visible)], 1
        )
        blanks_BMD = self.mask_token + gather_tokens(positions[:, 1:], plan.masked)
        tokens = torch.cat([tokens + seen, blanks_BMD.to(tokens.dtype)], dim=1)
        for block in self.decoder_blocks:
            tokens = block(tokens)
        pred_BMP: Tensor = self.decoder_pred(self.decoder_norm(tokens[:, -plan.masked.shape[1] :]))
        return pred_BMP

    def forward(self, images_BCYX: Tensor, plan: PatchPlan) -> MethodOutput:
        """Reconstruct the masked patches of normalised images from the visible ones.

        Args:
            images_BCYX: Normalised images of the model's size.
            plan: Visible, masked and thrown patches of each image.

        Returns:
            loss (mean over images, masked patches and values), pred [B, M, P], loss_B.
        """
        patches_BNP = patchify(images_BCYX, self.patch_size)
        pred_BMP = self.decode(self.encode(patches_BNP, plan.visible), plan)
        target_BMP = gather_tokens(patches_BNP, plan.masked)
        if self.norm_pix_loss:
            target_BMP = normalise_patches(target_BMP)
        loss_B = (pred_BMP.float() - target_BMP.float()).square().mean(dim=(1, 2))
        return MethodOutput(loss_B.mean(), pred_BMP, loss_B)

    def reconstruction(self, pred_BMP: Tensor, images_BCYX: Tensor, plan: PatchPlan) -> Tensor:
        """The prediction as pixels of the normalised images, [B, M, P]."""
        if not self.norm_pix_loss:
            return pred_BMP.float()
        return denormalise_patches(pred_BMP, masked_pixels(images_BCYX, plan, self.patch_size))
