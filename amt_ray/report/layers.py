"""The effect of the attention layer, ordered by depth."""

import json
from dataclasses import replace

from amt_ray.report.effects import LAYERS, Effect, Level, effect
from amt_ray.report.ranking import Comparison

DEPTH = "model.encoder.depth"


def layer_effect(comparison: Comparison) -> Effect | None:
    """The effect of ``attention.layers`` with layers by their number from the input; several and rollout come last.

    None where a single layer was scored.
    """
    found = effect(comparison, LAYERS)
    if len(found.levels) < 2:
        return None
    placed = sorted(
        ((_place(level), level) for level in found.levels), key=lambda pair: (pair[0] is None, pair[0] or 0)
    )
    return Effect(LAYERS, tuple(_named(place, level) for place, level in placed))


def _place(level: Level) -> int | None:
    """The layer's number from the input, of a single layer."""
    first = level.rows[0].group.first.params
    try:
        layers = json.loads(level.label)
        layer = layers[0] if isinstance(layers, list) and len(layers) == 1 else layers
        depth = int(first.get(DEPTH, ""))
    except ValueError:
        return None
    if not isinstance(layer, int):
        return None
    return layer % depth


def _named(place: int | None, level: Level) -> Level:
    """The label as logged, with the number that a negative one stands for."""
    if place is None or not level.label.strip("[ ").startswith("-"):
        return level
    return replace(level, label=f"{level.label} = {place}")
