"""MAE as other code has it, for `step.py`: Hugging Face, lightly, and timm's blocks put together in the plain way.

Each is made from the sizes of `amt_ray.core.methods.mae.MAE`, draws its own random masks and gives a batch's loss.
"""

import warnings
from collections.abc import Callable

import timm.models.vision_transformer as vit
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Sizes = dict[str, int]


class PlainMAE(nn.Module):
    """MAE as its paper tells it: project all patches, shuffle, keep some, encode, put all back, decode all."""

    def __init__(self, sizes: Sizes, mask_ratio: float) -> None:
        super().__init__()
        side, patch, width, inner = (
            sizes[k] for k in ("img_size", "patch_size", "embed_dim", "decoder_embed_dim")
        )  # fmt: skip
        self.patch, self.mask_ratio = patch, mask_ratio
        count = (side // patch) ** 2
        self.patch_embed = vit.PatchEmbed(side, patch, 3, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + count, width) * 0.02, requires_grad=False)
        self.blocks = nn.Sequential(
            *(vit.Block(width, sizes["num_heads"], qkv_bias=True) for _ in range(sizes["depth"]))
        )
        self.norm = nn.LayerNorm(width)
        self.decoder_embed = nn.Linear(width, inner)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, inner))
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, 1 + count, inner) * 0.02, requires_grad=False)
        self.decoder_blocks = nn.Sequential(
            *(vit.Block(inner, sizes["decoder_num_heads"], qkv_bias=True) for _ in range(sizes["decoder_depth"]))
        )
        self.decoder_norm = nn.LayerNorm(inner)
        self.decoder_pred = nn.Linear(inner, patch * patch * 3)

    def forward(self, images: Tensor) -> Tensor:
        """The mean squared error over the masked patches."""
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        batch, count, width = x.shape
        keep = int(count * (1 - self.mask_ratio))
        shuffle = torch.rand(batch, count, device=x.device).argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        x = x.gather(1, shuffle[:, :keep, None].expand(-1, -1, width))
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1)
        x = self.decoder_embed(self.norm(self.blocks(torch.cat([cls, x], dim=1))))
        blanks = self.mask_token.expand(batch, count - keep, -1).to(x.dtype)
        patches = torch.cat([x[:, 1:], blanks], dim=1).gather(1, restore[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        pred = self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]
        rows = images.shape[2] // self.patch
        cut = images.reshape(batch, 3, rows, self.patch, rows, self.patch)
        target = cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, count, -1)
        mask = (restore >= keep).to(images.dtype)
        return ((pred.float() - target).square().mean(dim=-1) * mask).sum() / mask.sum()


def plain(sizes: Sizes, mask_ratio: float) -> nn.Module:
    """timm's blocks, put together in the plain way."""
    return PlainMAE(sizes, mask_ratio)


class HuggingFace(nn.Module):
    """transformers' ViTMAEForPreTraining."""

    def __init__(self, sizes: Sizes, mask_ratio: float) -> None:
        super().__init__()
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        config = ViTMAEConfig(
            hidden_size=sizes["embed_dim"], num_hidden_layers=sizes["depth"], num_attention_heads=sizes["num_heads"],
            intermediate_size=4 * sizes["embed_dim"], image_size=sizes["img_size"], patch_size=sizes["patch_size"],
            decoder_hidden_size=sizes["decoder_embed_dim"], decoder_num_hidden_layers=sizes["decoder_depth"],
            decoder_num_attention_heads=sizes["decoder_num_heads"], mask_ratio=mask_ratio,
            decoder_intermediate_size=4 * sizes["decoder_embed_dim"], attn_implementation="sdpa",
        )  # fmt: skip
        self.model = ViTMAEForPreTraining(config)

    def forward(self, images: Tensor) -> Tensor:
        """Its own loss."""
        loss: Tensor = self.model(images).loss
        return loss


class Lightly(nn.Module):
    """lightly's MAE, put together as its example does."""

    def __init__(self, sizes: Sizes, mask_ratio: float) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from lightly.models import utils
            from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

            self.utils, self.mask_ratio, self.patch = utils, mask_ratio, sizes["patch_size"]
            backbone = vit.VisionTransformer(
                sizes["img_size"], sizes["patch_size"], embed_dim=sizes["embed_dim"], depth=sizes["depth"],
                num_heads=sizes["num_heads"], num_classes=0,
            )  # fmt: skip
            self.backbone = MaskedVisionTransformerTIMM(vit=backbone)
            self.decoder = MAEDecoderTIMM(
                num_patches=backbone.patch_embed.num_patches, patch_size=sizes["patch_size"],
                embed_dim=sizes["embed_dim"], decoder_embed_dim=sizes["decoder_embed_dim"],
                decoder_depth=sizes["decoder_depth"], decoder_num_heads=sizes["decoder_num_heads"],
            )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """The mean squared error over the masked patches."""
        utils, batch, length = self.utils, len(images), self.backbone.sequence_length
        keep, masked = utils.random_token_mask((batch, length), self.mask_ratio, device=images.device)
        encoded = self.decoder.embed(self.backbone.encode(images=images, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, (batch, length))
        tokens = utils.set_at_index(tokens, keep, encoded.type_as(tokens))
        pred = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), masked))
        target = utils.get_at_index(utils.patchify(images, self.patch), masked - 1)
        return F.mse_loss(pred.float(), target)


PEERS: dict[str, Callable[[Sizes, float], nn.Module]] = {
    "huggingface": HuggingFace,
    "lightly": Lightly,
    "timm_blocks": plain,
}
