"""Evaluation protocols, one a file.

A protocol is a frozen object that is its own settings. Its contract:

- ``presets``: the named, versioned settings, name -> object. A result carries ``protocol``: the preset's name, and
  what differs from it (`protocol_name`), so that results of different protocols are never mixed unawares.
- ``needs``: what images must be known to show: ``labels``, ``objects`` or ``label maps``; ``protocol.check(encoder,
  task)`` raises ValueError for a task that it cannot take (the encoder may be on the meta device).
- ``measures``: what the names of its metrics begin with, after the split's.
- ``protocol(encoder, task, ranks, test=..., progress=..., checkpoints=...) -> {metric: value}``: called by every rank,
  all get the result. Metrics are ``eval/...`` (images held out of train, which may choose between runs) and, only where
  ``test`` is true, ``test/...``. The encoder comes back bit-unchanged and in its mode.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

from torch import Tensor

from amt_ray.core.datasets import Source
from amt_ray.core.encoder import Encoder
from amt_ray.core.images import ImageArray
from amt_ray.core.ports import Checkpoints, Ranks


@dataclass(frozen=True)
class Task:
    """Labelled images for a probe.

    Attributes:
        train: Labelled images, both those to learn from and those held out.
        train_index: Indices into ``train`` to learn from, increasing.
        val_index: Indices into ``train`` held out; what chooses between settings is measured on these.
        test: Images of the test split, or None where there is none.
        size: Rows and columns in pixels at which the encoder sees images.
        seed: Seed of everything random in the protocol.
        train_source: The same images before decoding, with their objects and label maps; None where no protocol
            needs them.
        test_source: The same of ``test``.
    """

    train: ImageArray
    train_index: Tensor
    val_index: Tensor
    test: ImageArray | None
    size: tuple[int, int]
    seed: int = 0
    train_source: Source | None = None
    test_source: Source | None = None


def nothing(share: float) -> None:
    """Progress that nobody follows."""


class Evaluation(Protocol):
    """What a file in this folder offers."""

    needs: ClassVar[str]
    measures: ClassVar[tuple[str, ...]]
    presets: ClassVar[Mapping[str, Any]]

    @property
    def protocol(self) -> str: ...

    def check(self, encoder: Encoder, task: Task) -> None: ...

    def __call__(
        self,
        encoder: Encoder,
        task: Task,
        ranks: Ranks,
        *,
        test: bool = False,
        progress: Callable[[float], None] = nothing,
        checkpoints: Checkpoints | None = None,
    ) -> dict[str, float]: ...


def protocol_name(settings: Any, presets: Mapping[str, Any]) -> str:
    """The nearest preset's name, and each setting that differs: ``mae-linear-90`` or ``mae-linear-90+epochs=10``.

    Settings whose field says ``metadata={"names": False}`` change the cost, not the result, and are left out.
    """

    def differences(preset: Any) -> list[str]:
        named = [f.name for f in fields(settings) if f.metadata.get("names", True)]
        return [f"{n}={_told(getattr(settings, n))}" for n in named if getattr(settings, n) != getattr(preset, n)]

    name, preset = min(presets.items(), key=lambda item: len(differences(item[1])))
    return "+".join([name, *differences(preset)])


def _told(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
