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
            return _class_of(importlib.import_module(name))
        except ModuleNotFoundError as error:
            raise ValueError(f"a dotted {kind} name must be an importable module, got {name} ({error}).") from error
    if name not in names(kind):
        raise ValueError(f"{kind} must be one of {', '.join(names(kind))}, or a dotted module name, got {name}.")
    return _class_of(importlib.import_module(f"{PACKAGES[kind]}.{name}"))


def _class_of(module: ModuleType) -> Any:
    stem = module.__name__.rpartition(".")[2].replace("_", "")
    for name, value in vars(module).items():
        if name.lower() == stem and isinstance(value, type):
            return value
    raise ValueError(
        f"a plug-in's module must define a class named as the file, got none like {stem} in {module.__name__}."
    )
