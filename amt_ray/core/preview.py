"""A picture of what the method does to images: image, scores, plan and reconstruction, row by row."""

import io
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from amt_ray.core.attention import Scoring, score_maps
from amt_ray.core.finite import finite
from amt_ray.core.geometry import crop_scores, whole_images
from amt_ray.core.images import ImageArray
from amt_ray.core.masking import MaskingStrategy
from amt_ray.core.methods import Method
from amt_ray.core.noise import Purpose, uniform
from amt_ray.core.plan import MASKED, THROWN, PatchPlan
from amt_ray.core.tokens import patchify, unpatchify

TILE_PX, GAP_PX, LABEL_PX, FONT_PX, LEADING_PX = 112, 8, 184, 13, 5
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
        scores: [B, G, W], what the plan was drawn from.
        layers: [B, K, G, W], the scores of every layer, or None where they were not asked for.
        plan: The plan of each image.
        scored: Whether the plan was drawn from the scores.
        reconstruction: [B, 3, Y, X], visible patches as they are, masked ones predicted, thrown ones grey; None where
            the method predicts no pixels.
    """

    images: Tensor
    scores: Tensor
    layers: Tensor | None
    plan: PatchPlan
    scored: bool
    reconstruction: Tensor | None


@torch.no_grad()
def preview(
    model: Method, images: ImageArray, index_B: Tensor, plans: PlanOf, seed: int, every_layer: bool = False
) -> Preview:
    """Score, plan and reconstruct whole images with the model as it is (its mode is restored).

    Args:
        model: A method.
        images: The data set.
        index_B: Which of its images.
        plans: How plans are made.
        seed: Of the plans.
        every_layer: Whether each layer's scores are wanted as well.

    Raises:
        NotFiniteError: If a score or a predicted pixel is not finite.
    """
    was_training = model.training
    model.eval()
    device = model.cls_token.device
    rows, columns = model.grid
    batch = images.whole(index_B, (rows * model.patch_size, columns * model.patch_size), device)
    scores_BGW = finite("attention scores", plans.scoring(model, batch)).reshape(-1, rows, columns)
    units = (rows // plans.unit, columns // plans.unit)
    noise_BU = uniform(seed, 0, index_B.to(device), Purpose.PREVIEW, units[0] * units[1])
    scores_BU = crop_scores(scores_BGW, whole_images(len(batch), device), units).flatten(1)
    plan = plans.strategy(scores_BU, noise_BN=noise_BU).expand(model.grid, plans.unit)
    pred_BMP = model.reconstruction(model(batch, plan).pred, batch, plan)
    if pred_BMP is not None:
        finite("predicted pixels", pred_BMP)
    layers = score_maps(model, batch, range(model.depth), plans.scoring.heads) if every_layer else None
    model.train(was_training)
    return Preview(
        images.denormalise(batch),
        scores_BGW,
        None if layers is None else layers.unflatten(2, model.grid),
        plan,
        plans.strategy.needs_scores,
        _filled(images, batch, plan, pred_BMP, model),
    )


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


class Strip(NamedTuple):
    """One step of the method, drawn for every image.

    Attributes:
        label: What is shown.
        note: How to read it.
        tiles: [B, 3, Y, X] in [0, 1].
    """

    label: str
    note: str
    tiles: Tensor


def strips(shown: Preview) -> list[Strip]:
    """The preview step by step: image, scores (of every layer where known), plan, reconstruction."""
    images, plan = shown.images.cpu(), shown.plan
    found = [Strip("image", "", images)]
    if shown.layers is not None:
        for layer, scores in enumerate(shown.layers.cpu().unbind(1)):
            found.append(Strip(f"layer {layer}", "black low, yellow high" if not layer else "", _heat(scores, images)))
    if not shown.scored:
        note = "the plan does not use them"
    else:
        note = "what the plan is drawn from" if shown.layers is not None else "black low, yellow high"
    found.append(Strip("attention scores", note, _heat(shown.scores.cpu(), images)))
    counts = f"masked {plan.masked.shape[1]} (orange)\nthrown {plan.thrown.shape[1]} (dark)"
    found.append(Strip("plan", f"visible {plan.visible.shape[1]}\n{counts}", _coloured(shown)))
    if shown.reconstruction is not None:
        found.append(
            Strip("reconstruction", "masked are predicted,\nthrown are grey", shown.reconstruction.float().cpu())
        )
    return found


def _coloured(shown: Preview) -> Tensor:
    images = shown.images.cpu()
    kinds = _enlarged(shown.plan.kinds().cpu(), (shown.scores.shape[1], shown.scores.shape[2]), images)
    for kind, colour, strength in ((MASKED, MASKED_COLOUR, 0.75), (THROWN, THROWN_COLOUR, 0.92)):
        tint = torch.tensor(colour).view(1, 3, 1, 1)
        images = torch.where(kinds == kind, images * (1 - strength) + tint * strength, images)
    return images


def pixels(tile: Tensor, side: int = TILE_PX) -> Image.Image:
    """A tile [3, Y, X] as a picture whose longer side is about ``side`` pixels, its pixels enlarged whole."""
    scale = max(1, round(side / max(tile.shape[1:])))
    values = (tile.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    picture = Image.fromarray(values.numpy())
    if max(tile.shape[1:]) > side:
        picture.thumbnail((side, side))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def montage(shown: Preview) -> bytes:
    """The preview as a PNG: one column an image, one labelled row a step."""
    rows = [(strip, [pixels(tile) for tile in strip.tiles]) for strip in strips(shown)]
    font = ImageFont.load_default(size=FONT_PX)
    labels = [f"{strip.label}\n{strip.note}".strip() for strip, _ in rows]
    across = max(picture.width for _, row in rows for picture in row)
    heights = [
        max((text.count("\n") + 1) * (FONT_PX + LEADING_PX), *(picture.height for picture in row))
        for text, (_, row) in zip(labels, rows, strict=True)
    ]
    size = (LABEL_PX + len(shown.images) * (across + GAP_PX), sum(heights) + GAP_PX * (len(rows) + 1))
    canvas = Image.new("RGB", size, "white")
    draw, top = ImageDraw.Draw(canvas), GAP_PX
    for text, height, (_, row) in zip(labels, heights, rows, strict=True):
        draw.multiline_text((GAP_PX, top), text, fill="black", font=font, spacing=LEADING_PX)
        for c, picture in enumerate(row):
            canvas.paste(picture, (LABEL_PX + c * (across + GAP_PX), top))
        top += height + GAP_PX
    stream = io.BytesIO()
    canvas.save(stream, "PNG")
    return stream.getvalue()


def _heat(scores_BGW: Tensor, like: Tensor) -> Tensor:
    """Black, red, yellow for an image's lowest, middle and highest score: brightness rises all the way."""
    low, high = scores_BGW.amin((1, 2), keepdim=True), scores_BGW.amax((1, 2), keepdim=True)
    grid = (scores_BGW.shape[1], scores_BGW.shape[2])
    shares = _enlarged(((scores_BGW - low) / (high - low).clamp_min(1e-6)).flatten(1), grid, like)
    return torch.cat([(2 * shares).clamp(0, 1), (2 * shares - 1).clamp(0, 1), torch.zeros_like(shares)], dim=1)
