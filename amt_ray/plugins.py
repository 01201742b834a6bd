"""Plug-ins by name: the file's name is the plug-in's name.

`load("masking", "amt")` is the class in ``amt_ray/core/masking/amt.py`` whose lower-cased name is the file's without
underscores. A dotted name is a module outside the package, looked up in the same way.
"""

import functools
import importlib
import pkgutil
from types import ModuleType
from typing import Any

PACKAGES = {
    "masking": "amt_ray.core.masking",
    "methods": "amt_ray.core.methods",
    "datasets": "amt_ray.core.datasets",
    "evals": "amt_ray.core.evals",
}

NEEDED = {
    "masking": ("__dataclass_fields__", "needs_scores", "throws", "counts", "__call__"),
    "methods": ("unit_patches", "forward"),
    "datasets": ("mean", "std", "split"),
    "evals": ("__dataclass_fields__", "needs", "measures", "presets", "check", "__call__"),
}


@functools.cache
def names(kind: str) -> tuple[str, ...]:
    """All plug-ins of a kind that come with the package."""
    return tuple(
        sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(PACKAGES[kind]).__path__))
    )


def load(kind: str, name: str) -> Any:
    """The class of a plug-in.

    Args:
        kind: ``masking``, ``methods``, ``datasets`` or ``evals``.
        name: A file's name in that folder, or the dotted name of a module elsewhere.

    Raises:
        ValueError: If there is none, or its module has no class of its name.
    """
    if "." in name:
        try:
            module = importlib.import_module(name)
        except Exception as error:  # the module's own code runs here, whatever it raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"a dotted {kind} name must be an importable module, got {name} ({reason}).") from error
        return _checked(kind, name, _class_of(module))
    if name not in names(kind):
        raise ValueError(f"{kind} must be one of {', '.join(names(kind))}, or a dotted module name, got {name}.")
    return _class_of(importlib.import_module(f"{PACKAGES[kind]}.{name}"))


def _checked(kind: str, name: str, found: Any) -> Any:
    """The class, if it is of the kind that is asked for.

    Raises:
        ValueError: If it lacks something that all of its kind have.
    """
    lacks = [part for part in NEEDED[kind] if not hasattr(found, part)]
    if lacks:
        raise ValueError(f"a plug-in of {kind} must have {', '.join(NEEDED[kind])}, got {name} without {lacks[0]}.")
    return found


def _class_of(module: ModuleType) -> Any:
    stem = module.__name__.rpartition(".")[2].replace("_", "")
    for name, value in vars(module).items():
        if name.lower() == stem and isinstance(value, type):
            return value
    raise ValueError(
        f"a plug-in's module must define a class named as the file, got none like {stem} in {module.__name__}."
    )
