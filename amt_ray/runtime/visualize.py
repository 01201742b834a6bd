"""What a trained model does to images: a PNG and a page."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from amt_ray.config import ConfigError, Experiment
from amt_ray.core.attention import resolve_layers
from amt_ray.core.box_energy import box_energy
from amt_ray.core.ports import Solo
from amt_ray.core.preview import PlanOf, Preview, montage, pixels, preview, strips
from amt_ray.report.html import write_whole
from amt_ray.report.visual import Row, render_visual
from amt_ray.runtime.local import BOX_IMAGES
from amt_ray.runtime.splits import Splits, load_splits
from amt_ray.runtime.trained import Trained

BOX_COLOUR = (0, 158, 115)


def visualize(trained: Trained, images: Sequence[int] | None, out: Path, count: int = 8) -> tuple[Path, Path]:
    """Draw image, scores of every layer, plan and reconstruction.

    Args:
        trained: The model.
        images: Indices into the pretraining split; None for the first held-out ones.
        out: Folder for ``visual.png`` and ``visual.html``.
        count: How many where ``images`` is None.

    Returns:
        The two files.

    Raises:
        ConfigError: If the model, the data, or an index is not as it must be.
    """
    experiment = trained.needed()
    splits = load_splits(experiment.override({"eval.protocols": []}))
    index = torch.tensor(list(images)) if images else splits.shown[:count]
    if int(index.min()) < 0 or int(index.max()) >= len(splits.images):
        raise ConfigError(f"--images must be of 0 to {len(splits.images) - 1}, got {index.tolist()}.")
    model, whole = trained.method()
    plans = PlanOf(experiment.last_strategy, experiment.scoring, experiment.unit)
    shown = preview(model, splits.images, index, plans, experiment.seed, every_layer=True)
    if not whole:
        shown = shown._replace(reconstruction=None)  # a decoder that was never trained has nothing to say
    out = out.expanduser().absolute()
    out.mkdir(parents=True, exist_ok=True)
    (out / "visual.png").write_bytes(montage(shown))
    text = _page(trained, experiment, splits, index, shown, model)
    return out / "visual.png", write_whole(out / "visual.html", text)


def _page(
    trained: Trained, experiment: Experiment, splits: Splits, index: torch.Tensor, shown: Preview, model: Any
) -> str:
    source, energies = splits.pretrain.source, {}
    if source.objects is not None:
        energies = box_energy(
            model, splits.images, splits.shown[:BOX_IMAGES], source.objects, experiment.scoring, Solo()
        )
    masking = experiment.masking
    names = [Path(source.name(i)).name for i in index.tolist()]
    rows = [Row(strip.label, strip.note, [_png(pixels(tile)) for tile in strip.tiles]) for strip in strips(shown)]
    if source.objects is not None:
        boxed = [_boxed(pixels(tile), source.objects(i)) for tile, i in zip(shown.images.cpu(), index.tolist())]
        rows[0] = Row("image", "boxes of the objects", boxed)
    plan = (
        f"{experiment.model.method} with {masking.strategy} on {experiment.data.name}: "
        f"mask ratio {_ratio(masking.mask_ratio)}, throw ratio {_ratio(masking.throw_ratio)}, "
        f"{'' if shown.scored else 'not '}drawn from the scores of {_layers(experiment)}."
    )
    count = int(energies.pop("box_energy_images", 0))
    return render_visual(f"Visualize {trained.name}", plan, names, rows, energies, count, _layers(experiment))


def _boxed(picture: Image.Image, objects: Any) -> bytes:
    draw = ImageDraw.Draw(picture)
    down, across = picture.height / objects.size[0], picture.width / objects.size[1]
    for left, top, right, bottom in objects.boxes.tolist():
        corners = (left * across, top * down, right * across - 1, bottom * down - 1)
        draw.rectangle(corners, outline="white", width=4)
        draw.rectangle(corners, outline=BOX_COLOUR, width=2)
    return _png(picture)


def _png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def _ratio(ratio: Any) -> str:
    return f"{ratio.start:g} to {ratio.end:g}" if hasattr(ratio, "start") else f"{ratio:g}"


def _layers(experiment: Experiment) -> str:
    layers = experiment.attention.layers
    if layers == "rollout":
        return "rollout"
    chosen = resolve_layers(layers, experiment.model.encoder.depth)
    named = ", ".join(map(str, chosen))
    return f"layer {named}" if len(chosen) == 1 else f"layers {named}, averaged"
