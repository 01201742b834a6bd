"""A picture of what the method does to images: image, scores, plan and reconstruction, row by row."""

import io
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from amt_ray.core.attention import Scoring
from amt_ray.core.geometry import crop_scores, whole_images
from amt_ray.core.images import ImageArray
from amt_ray.core.masking import MaskingStrategy
from amt_ray.core.methods import Method
from amt_ray.core.noise import Purpose, uniform
from amt_ray.core.plan import MASKED, THROWN, PatchPlan
from amt_ray.core.tokens import patchify, unpatchify

TILE_PX, GAP_PX, LABEL_PX = 112, 8, 176
MASKED_COLOUR, THROWN_COLOUR = (0.90, 0.62, 0.00), (0.16, 0.19, 0.26)  # orange, near black: apart without colour too


class PlanOf(NamedTuple):
    """How plans are made: the strategy, what it scores, and the side of its units in patches."""

    strategy: MaskingStrategy
    scoring: Scoring
    unit: int = 1


class Preview(NamedTuple):
    """What is drawn, all in [0, 1] and of the images' size.

    Attributes:
        images: [B, 3, Y, X].
        scores: [B, G, W].
        plan: The plan of each image.
        reconstruction: [B, 3, Y, X], visible patches as they are, masked ones predicted, thrown ones grey; None where
            the method predicts no pixels.
    """

    images: Tensor
    scores: Tensor
    plan: PatchPlan
    reconstruction: Tensor | None


@torch.no_grad()
def preview(model: Method, images: ImageArray, index_B: Tensor, plans: PlanOf, seed: int) -> Preview:
    """Score, plan and reconstruct whole images with the model as it is (its mode is restored)."""
    was_training = model.training
    model.eval()
    device = model.cls_token.device
    rows, columns = model.grid
    batch = images.whole(index_B, (rows * model.patch_size, columns * model.patch_size), device)
    scores_BGW = plans.scoring(model, batch).reshape(-1, rows, columns)
    units = (rows // plans.unit, columns // plans.unit)
    noise_BU = uniform(seed, 0, index_B.to(device), Purpose.PREVIEW, units[0] * units[1])
    scores_BU = crop_scores(scores_BGW, whole_images(len(batch), device), units).flatten(1)
    plan = plans.strategy(scores_BU, noise_BN=noise_BU).expand(model.grid, plans.unit)
    pred_BMP = model.reconstruction(model(batch, plan).pred, batch, plan)
    model.train(was_training)
    return Preview(images.denormalise(batch), scores_BGW, plan, _filled(images, batch, plan, pred_BMP, model))


def _filled(
    images: ImageArray, batch_BCYX: Tensor, plan: PatchPlan, pred_BMP: Tensor | None, model: Method
) -> Tensor | None:
    if pred_BMP is None:
        return None
    patches_BNP = patchify(batch_BCYX, model.patch_size)
    index_BMP = plan.masked.unsqueeze(-1).expand_as(pred_BMP)
    filled = images.denormalise(unpatchify(patches_BNP.scatter(1, index_BMP, pred_BMP), model.patch_size, model.grid))
    thrown = _enlarged(plan.kinds() == THROWN, model.grid, filled)
    return torch.where(thrown, 0.5, filled)


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
    ]
    if shown.reconstruction is not None:
        rows.append(("reconstruction\nmasked are predicted,\nthrown are grey", shown.reconstruction.cpu()))
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
