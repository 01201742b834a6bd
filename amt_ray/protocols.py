"""Evaluation protocols by name: a preset's (``linear-fast-1``), or a file's for its first preset (``knn``)."""

import functools
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from amt_ray import plugins
from amt_ray.core.evals import Evaluation


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
    try:
        given = {key: _like(getattr(preset, key), value) for key, value in (options or {}).items()}
        changed: Evaluation = replace(preset, **given)
    except TypeError as error:
        raise ValueError(f"eval.options of {name} must have the types of {preset}, got {options} ({error}).") from error
    return changed


def _like(known: Any, value: Any) -> Any:
    if isinstance(known, tuple) and isinstance(value, int | float):
        return (value,)
    return tuple(value) if isinstance(value, list) else value
