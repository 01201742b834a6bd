"""A picture of what the method does to images: image, scores, plan and reconstruction, row by row."""

import io
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from amt_ray.core.attention import cls_attention
from amt_ray.core.encoder import Encoder
from amt_ray.core.images import ImageArray
from amt_ray.core.masking import MaskingStrategy
from amt_ray.core.methods.mae import MAE
from amt_ray.core.noise import Purpose, uniform
from amt_ray.core.plan import MASKED, THROWN, PatchPlan
from amt_ray.core.tokens import gather_tokens, patchify, unpatchify

TILE_PX, GAP_PX, LABEL_PX = 112, 8, 176
MASKED_COLOUR, THROWN_COLOUR = (0.90, 0.62, 0.00), (0.16, 0.19, 0.26)  # orange, near black: apart without colour too


class Preview(NamedTuple):
    """What is drawn, all in [0, 1] and of the images' size.

    Attributes:
        images: [B, 3, Y, X].
        scores: [B, G, W].
        plan: The plan of each image.
        reconstruction: [B, 3, Y, X], visible patches as they are, masked ones predicted, thrown ones grey.
    """

    images: Tensor
    scores: Tensor
    plan: PatchPlan
    reconstruction: Tensor


@torch.no_grad()
def preview(
    model: Encoder, images: ImageArray, index_B: Tensor, strategy: MaskingStrategy, layers: tuple[int, ...], seed: int
) -> Preview:
    """Score, plan and reconstruct whole images with the model as it is (its mode is restored)."""
    was_training = model.training
    model.eval()
    device = model.cls_token.device
    rows, columns = model.grid
    batch = images.whole(index_B, (rows * model.patch_size, columns * model.patch_size), device)
    scores_BN = cls_attention(model, batch, layers)
    plan = strategy(scores_BN, noise_BN=uniform(seed, 0, index_B.to(device), Purpose.PREVIEW, model.num_patches))
    pred_BMP = model(batch, plan).pred.float()
    patches_BNP = patchify(batch, model.patch_size)
    if isinstance(model, MAE) and model.norm_pix_loss:  # such a model predicts patches up to their own mean and scale
        target = gather_tokens(patches_BNP, plan.masked)
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        pred_BMP = pred_BMP * (variance + 1e-6).sqrt() + mean
    model.train(was_training)
    index_BMP = plan.masked.unsqueeze(-1).expand_as(pred_BMP)
    filled = images.denormalise(unpatchify(patches_BNP.scatter(1, index_BMP, pred_BMP), model.patch_size, model.grid))
    thrown = _enlarged(plan.kinds() == THROWN, model.grid, filled)
    grid_scores = scores_BN.reshape(-1, rows, columns)
    return Preview(images.denormalise(batch), grid_scores, plan, torch.where(thrown, 0.5, filled))


def _enlarged(cells_BN: Tensor, grid: tuple[int, int], like: Tensor) -> Tensor:
    """Cells of the patch grid, repeated to the pixels of an image; keeps its dtype, [B, 1, Y, X]."""
    rows, columns = grid
    cells = cells_BN.reshape(-1, 1, rows, columns)
    by_row = cells.repeat_interleave(like.shape[2] // rows, dim=2)
    return by_row.repeat_interleave(like.shape[3] // columns, dim=3)


def montage(shown: Preview) -> bytes:
    """The preview as a PNG: one column an image, one labelled row a step."""
    images, scores, plan = shown.images.cpu(), shown.scores.cpu(), shown.plan
    grid = (scores.shape[1], scores.shape[2])
    kinds = _enlarged(plan.kinds().cpu(), grid, images)
    coloured = images.clone()
    for kind, colour, strength in ((MASKED, MASKED_COLOUR, 0.75), (THROWN, THROWN_COLOUR, 0.92)):
        tint = torch.tensor(colour).view(1, 3, 1, 1)
        coloured = torch.where(kinds == kind, images * (1 - strength) + tint * strength, coloured)
    low, high = scores.amin((1, 2), keepdim=True), scores.amax((1, 2), keepdim=True)
    heat = _heat(_enlarged(((scores - low) / (high - low).clamp_min(1e-6)).flatten(1), grid, images))
    counts = (
        f"visible {plan.visible.shape[1]}\nmasked {plan.masked.shape[1]} (orange)\nthrown {plan.thrown.shape[1]} (dark)"
    )
    rows = [
        ("image", images),
        ("attention scores\nblack low, yellow high", heat),
        (f"plan\n{counts}", coloured),
        ("reconstruction\nmasked are predicted,\nthrown are grey", shown.reconstruction.cpu()),
    ]
    width = LABEL_PX + len(images) * (TILE_PX + GAP_PX)
    canvas = Image.new("RGB", (width, len(rows) * (TILE_PX + GAP_PX) + GAP_PX), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=13)
    for r, (label, tiles) in enumerate(rows):
        top = GAP_PX + r * (TILE_PX + GAP_PX)
        draw.multiline_text((GAP_PX, top + 4), label, fill="black", font=font, spacing=5)
        for c, tile in enumerate(F.interpolate(tiles.float(), size=(TILE_PX, TILE_PX), mode="nearest")):
            pixels = (tile.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            canvas.paste(Image.fromarray(pixels), (LABEL_PX + c * (TILE_PX + GAP_PX), top))
    stream = io.BytesIO()
    canvas.save(stream, "PNG")
    return stream.getvalue()


def _heat(shares: Tensor) -> Tensor:
    """Black, red, yellow for 0, 1/2, 1: brightness rises all the way."""
    return torch.cat([(2 * shares).clamp(0, 1), (2 * shares - 1).clamp(0, 1), torch.zeros_like(shares)], dim=1)
