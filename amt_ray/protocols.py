"""Evaluation protocols by name: a preset's (``linear-fast-1``), or a file's for its first preset (``knn``)."""

import functools
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from amt_ray import plugins
from amt_ray.core.evals import Evaluation
from amt_ray.options import of_types, parameters

RANGES = {  # of settings that mean the same in every protocol that has them
    "flip": (0, 1), "erasing": (0, 1), "label_smoothing": (0, 1), "drop_path": (0, 0.99), "weight_decay": (0, 1000),
    "base_lr": (0, 1e30), "min_lr": (0, 1e30), "mixup": (0, 1000), "cutmix": (0, 1000), "clip_grad": (1e-12, 1e9),
    "epochs": (1, 100_000), "batch_size": (1, 1_000_000), "encode_batch": (1, 1_000_000), "accumulate": (1, 1_000_000),
    "channels": (1, 65_536), "views": (0, 10_000), "held_out": (0, 0.99),
}  # fmt: skip


@functools.cache
def presets() -> dict[str, Any]:
    """Every named protocol that comes with the package."""
    return {name: kept for file in plugins.names("evals") for name, kept in plugins.load("evals", file).presets.items()}


def protocol(name: str, options: Mapping[str, Any] | None = None) -> Evaluation:
    """The settings of a name, with some of them changed.

    Args:
        name: A preset's name, a file's name in ``core/evals``, or the dotted name of a module elsewhere.
        options: Settings over the preset's; lists, or one value, stand for tuples.

    Raises:
        ValueError: If there is no such protocol or setting, or a setting is out of its range.
    """
    if name in plugins.names("evals") or ("." in name and name not in presets()):
        preset = next(iter(plugins.load("evals", name).presets.values()))
    elif name in presets():
        preset = presets()[name]
    else:
        known = ", ".join([*plugins.names("evals"), *presets()])
        raise ValueError(f"an evaluation protocol must be one of {known}, got {name}.")
    settings = [field.name for field in fields(preset)]
    for key in options or {}:
        if key not in settings:
            raise ValueError(f"eval.options of {name} must be of: {', '.join(settings)}, got {key}.")
    values = {key: _like(getattr(preset, key), value) for key, value in (options or {}).items()}
    kind: Any = type(preset)
    types = parameters(kind)
    try:
        typed = of_types(f"eval.options.{name}", {key: types.get(key, Any) for key in values}, values)
    except ValueError as error:
        raise ValueError(f"eval.options of {name} must have the types of {preset} ({error})") from error
    for key in typed.keys() & RANGES.keys():
        low, high = RANGES[key]
        if typed[key] is not None and not low <= typed[key] <= high:
            raise ValueError(f"eval.options of {name}: {key} must be in [{low:g}, {high:g}], got {typed[key]}.")
    changed: Evaluation = replace(preset, **typed)
    if not hasattr(changed, "metrics"):
        raise ValueError(
            f"an evaluation protocol must list what it writes (its method metrics), got {name} without it."
        )
    return changed


def _like(known: Any, value: Any) -> Any:
    if isinstance(known, tuple) and isinstance(value, int | float):
        return (value,)
    return tuple(value) if isinstance(value, list) else value
