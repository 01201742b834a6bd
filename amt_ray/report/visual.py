"""The page of `amt-ray visualize`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from amt_ray.report.html import address, template


@dataclass(frozen=True)
class Row:
    """One step of the method for every image.

    Attributes:
        label: What is shown.
        note: How to read it, a line or more.
        pictures: PNG files, one an image.
    """

    label: str
    note: str
    pictures: Sequence[bytes]


def render_visual(
    title: str,
    plan: str,
    names: Sequence[str],
    rows: Sequence[Row],
    energies: Mapping[str, float],
    images: int,
    scored: str,
) -> str:
    """The page as text, self-contained.

    Args:
        title: Of the run.
        plan: How the plan was made, in a line.
        names: Of the images.
        rows: The steps.
        energies: Attention in the objects' boxes, name -> energy; empty where no objects are known.
        images: Images over which the energies are means.
        scored: What is scored: a layer, several averaged, rollout.
    """
    return template("visual.html.j2").render(
        title=title,
        plan=plan,
        names=names,
        headline=_headline(energies),
        rows=[(row, [address(png) for png in row.pictures]) for row in rows],
        energies=[(_name(key) or f"the scores: {scored}", value) for key, value in energies.items()],
        images=images,
    )


def _name(key: str) -> str:
    return f"layer {int(key.rpartition('_')[2])}" if "_layer_" in key else ""


def _headline(energies: Mapping[str, float]) -> str:
    """What the energies say, or what the page is."""
    layers = {key: value for key, value in energies.items() if "_layer_" in key}
    if not layers:
        return "What the encoder attends to, and what is masked, thrown and reconstructed."
    best = max(layers, key=lambda key: layers[key])
    if layers[best] <= 1:
        return "No layer's attention prefers the objects to the rest of the image."
    return f"Attention prefers the objects most in {_name(best)}: {layers[best]:.2f} times chance."
