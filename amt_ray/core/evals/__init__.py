"""Evaluation protocols, one a file.

A protocol is a frozen object that is its own settings. Its contract:

- ``presets``: the named, versioned settings, name -> object. A result carries ``protocol``: the preset's name, and
  what differs from it (`protocol_name`), so that results of different protocols are never mixed unawares.
- ``needs``: what images must be known to show: ``labels``, ``objects`` or ``label maps``; ``protocol.check(encoder,
  task)`` raises ValueError for a task that it cannot take (the encoder may be on the meta device).
- ``published``, where there are any: the presets that are named after published protocols, all of which keep the shape
  of what an image shows; `check_shape` refuses squashed images for them.
- ``measures``: what the names of its metrics begin with, after the split's.
- ``metrics(known)``: the exact names that it writes, its main measure first, given what is known of encoder and data.
- ``protocol(encoder, task, ranks, test=..., progress=..., checkpoints=...) -> {metric: value}``: called by every rank,
  all get the result. Metrics are ``eval/...`` (images held out of train, which may choose between runs) and, only where
  ``test`` is true, ``test/...``. The encoder comes back bit-unchanged and in its mode.
"""

from collections.abc import Callable, Iterable, Mapping
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
        val_index: Indices into ``train`` held out, or into ``val`` where there is one; what chooses between settings is
            measured on these.
        test: Images of the test split, or None where there is none.
        size: Rows and columns in pixels at which the encoder sees images.
        seed: Seed of everything random in the protocol.
        train_source: The same images before decoding, with their objects and label maps; None where no protocol
            needs them.
        test_source: The same of ``test``.
        squashed: How images were squashed to ``size``, in words; empty where none were, or where that was asked for.
        val: Images of the data's own val split, or None where images are held out of ``train``.
        val_source: The same before decoding.
    """

    train: ImageArray
    train_index: Tensor
    val_index: Tensor
    test: ImageArray | None
    size: tuple[int, int]
    seed: int = 0
    train_source: Source | None = None
    test_source: Source | None = None
    squashed: str = ""
    val: ImageArray | None = None
    val_source: Source | None = None

    @property
    def splits(self) -> list[tuple[str, ImageArray, Source | None]]:
        """The splits that there are: name, images, and the same before decoding."""
        found = [("train", self.train, self.train_source)]
        found += [] if self.val is None else [("val", self.val, self.val_source)]
        return found + ([] if self.test is None else [("test", self.test, self.test_source)])

    def source_of(self, images: ImageArray) -> Source:
        """What images of the task are before decoding, where a protocol needs to know."""
        source = next(source for _, own, source in self.splits if own is images)
        assert source is not None
        return source


@dataclass(frozen=True)
class Known:
    """What decides which metrics a protocol writes; None is not known yet, and then every possible name is listed.

    Attributes:
        depth: Blocks of the encoder.
        classes: Classes of the images.
        masks: Whether objects have masks.
        splits: What is measured: ``eval``, ``test`` or both.
    """

    depth: int
    classes: int | None = None
    masks: bool | None = None
    splits: tuple[str, ...] = ("eval", "test")

    def of_splits(self, names: Iterable[str]) -> tuple[str, ...]:
        """The names with each split before them: ``knn_top1`` is ``eval/knn_top1`` and ``test/knn_top1``."""
        kept = tuple(names)
        return tuple(f"{split}/{name}" for split in self.splits for name in kept)

    def accuracies(self, name: str) -> tuple[str, ...]:
        """``name_top1`` and, with more than five classes, ``name_top5``."""
        return (f"{name}_top1", f"{name}_top5") if self.classes is None or self.classes > 5 else (f"{name}_top1",)


def nothing(share: float) -> None:
    """Progress that nobody follows."""


class Evaluation(Protocol):
    """What a file in this folder offers."""

    needs: ClassVar[str]
    measures: ClassVar[tuple[str, ...]]
    presets: ClassVar[Mapping[str, Any]]

    @property
    def protocol(self) -> str: ...

    def metrics(self, known: Known) -> tuple[str, ...]: ...

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


def check_shape(protocol: Any, task: Task) -> None:
    """Refuse squashed images for a protocol that is named after a published one.

    Raises:
        ValueError: If so.
    """
    if task.squashed and (name := protocol.protocol.partition("+")[0]) in protocol.published:
        raise ValueError(
            f"images must keep their shape for {name}, as published, got {task.squashed}; set data.on_aspect=crop "
            "(data.on_aspect=squash measures squashed images all the same)."
        )


def _told(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
