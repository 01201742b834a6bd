"""Attention-driven masking and throwing: pretraining, search and comparison on Ray.

From Python: ``load``, ``cost``, ``pretrain``, ``sweep``, ``evaluate``, ``encoder`` (`amt_ray.api`, ``docs/python.md``).
They are imported when first used, so that importing the package costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amt_ray.api import Run, Sweep, cost, encoder, evaluate, load, pretrain, sweep

__version__ = "0.1.0"
__all__ = ["Run", "Sweep", "cost", "encoder", "evaluate", "load", "pretrain", "sweep"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from amt_ray import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
