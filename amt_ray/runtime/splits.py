"""The images of a run: what is pretrained on, and what the probes learn from and are measured on."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from amt_ray.config import ConfigError, Experiment
from amt_ray.core.aspect import cut, other_shapes
from amt_ray.core.datasets import Source
from amt_ray.core.decoded import Decoded, OnProgress, decoded
from amt_ray.core.evals import Task
from amt_ray.core.images import ImageArray
from amt_ray.core.probing import check_classes
from amt_ray.listing import Listing, Part, listed
from amt_ray.sections import Data

T = TypeVar("T")
FRESH_S = 600.0


class Opened(NamedTuple):
    """A decoded split.

    Attributes:
        source: The split before decoding.
        images: Its images.
        broken: Indices of those that cannot be read.
        squashed: How they are squashed, in words, where nobody asked for that.
    """

    source: Source
    images: ImageArray
    broken: Tensor
    squashed: str = ""

    def whole(self, index: Tensor) -> Tensor:
        """The indices without those of broken images."""
        return index[~torch.isin(index, self.broken)]


@dataclass(frozen=True)
class Splits:
    """The images of a run.

    Attributes:
        pretrain: The split that is pretrained on: ``train``, unless the data has images that only pretraining uses.
        index: Indices into it to train on, increasing.
        held_out: Indices into it that are not trained on.
        task: Labelled images for the probes, or None where no probe is asked for.
        listing: What the data set holds; None for made-up images.
        notes: What is done with the pixels of a split that nobody asked for, a line each.
    """

    pretrain: Opened
    index: Tensor
    held_out: Tensor
    task: Task | None
    listing: Listing | None = None
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> ImageArray:
        """The images that are pretrained on."""
        return self.pretrain.images

    @property
    def shown(self) -> Tensor:
        """Images to look at: held out if any are."""
        return self.held_out if len(self.held_out) else self.index

    @property
    def counts(self) -> Mapping[str, int]:
        """Images by use, as `Listing.counts` without those that cannot be read."""
        assert self.listing is not None
        found = {"train": len(self.index), "val": len(self.held_out)}
        if self.task is not None:
            found |= {"probe": len(self.task.train_index), "val": len(self.task.val_index)}
            found["test"] = 0 if self.task.test is None else len(self.task.test)
        return {use: found[use] for use in self.listing.counts}

    def lines(self, measures_test: bool = True) -> list[str]:
        """What there is, in a few lines."""
        assert self.listing is not None
        broken, said = self.pretrain.broken.tolist(), ""
        if broken:
            said = f"{len(broken)} broken ones left out (first: {self.pretrain.source.name(broken[0])})"
        return [*self.listing.lines(self.counts, said, measures_test), *self.notes]

    @property
    def summary(self) -> str:
        """What there is, in a line."""
        return self.lines()[0].partition(", ")[2]


class _Handed(Generic[T]):
    """What one part of this process has just found out, for the part that needs it next; taken once, while fresh."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[float, T]] = {}

    def put(self, experiment: Experiment, found: T) -> None:
        self.kept[_key(experiment)] = (time.monotonic(), found)

    def take(self, experiment: Experiment) -> T | None:
        when, found = self.kept.pop(_key(experiment), (0.0, None))
        return found if time.monotonic() - when < FRESH_S else None


def _key(experiment: Experiment) -> str:
    return f"{experiment.data.model_dump_json()}|{bool(experiment.eval.protocols)}"


_LISTED: _Handed[Listing] = _Handed()
_DESCRIBED: _Handed[dict[str, Part]] = _Handed()


def described(experiment: Experiment) -> dict[str, Part]:
    """The images of each use (``train``, ``probe``, ``val``, ``test``) that a run of this experiment takes.

    They are those that `load_splits` has just loaded in this process, or else will load next; files are listed once.

    Raises:
        ValueError: If the data are not there.
    """
    if (known := _DESCRIBED.take(experiment)) is not None:
        return known
    if experiment.data.on_broken == "skip":  # only decoding tells which images are left out
        load_splits(experiment)
        return described(experiment)
    listing = listed(experiment)
    _LISTED.put(experiment, listing)
    return listing.parts()


def load_splits(experiment: Experiment, on_progress: OnProgress | None = None) -> Splits:
    """Decode (once a node) and open the data set; a bad data set fails here with one line.

    Raises:
        ConfigError: If the images are not there, cannot be read, or lack the labels that the evaluation needs.
    """
    try:
        return _load(experiment, on_progress)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _load(experiment: Experiment, on_progress: OnProgress | None) -> Splits:
    handed = _LISTED.take(experiment)
    listing = handed or listed(experiment)
    opener = _Opener(listing, experiment, on_progress)
    pretrain = opener("pretrain" if listing.own else "train", listing.pretrain)
    index, held_out = map(pretrain.whole, listing.divided())
    if not len(index):
        raise ValueError(f"data.val_fraction must leave images to train on, got {experiment.data.val_fraction}.")
    task = None
    if listing.train is not None and listing.probes:
        labelled = opener("train", listing.train) if listing.own else pretrain
        task = _task(opener, labelled)
    splits = Splits(pretrain, index, held_out, task, listing, tuple(opener.notes))
    if handed is None:
        _DESCRIBED.put(experiment, listing.parts(splits.counts))
    return splits


def _task(opener: "_Opener", labelled: Opened) -> Task:
    listing, experiment = opener.listing, opener.experiment
    train, fraction = labelled.images, experiment.data.val_fraction
    if train.labels_n is None and any(chosen.needs == "labels" for chosen in experiment.eval.chosen):
        raise ValueError(
            "eval.protocols need images in class folders, got images without labels; set eval.protocols=[]."
        )
    others = {
        name: opener(name, source, whole=name == "test")
        for name, source in (("val", listing.val), ("test", listing.test))
        if source is not None
    }
    check_classes({"train": train.classes, **{name: other.images.classes for name, other in others.items()}})
    train_index, val_index = map(labelled.whole, listing.divided(listing.train))
    val, test = others.get("val"), others.get("test")
    if val is not None:
        val_index = val.whole(torch.arange(len(val.images)))
    if not len(train_index) or not len(val_index):
        raise ValueError(f"data.val_fraction must leave images on both sides, got {fraction} of {len(train)}.")
    return Task(
        train,
        train_index,
        val_index,
        test and test.images,
        experiment.image_size,
        experiment.seed,
        train_source=labelled.source,
        test_source=test and test.source,
        squashed=next((one.squashed for one in (labelled, *others.values()) if one.squashed), ""),
        val=val and val.images,
        val_source=val and val.source,
    )


class _Opener:
    """Decodes splits of a listing, and keeps what is to be said of their pixels."""

    def __init__(self, listing: Listing, experiment: Experiment, on_progress: OnProgress | None) -> None:
        self.listing, self.experiment, self.on_progress = listing, experiment, on_progress
        self.notes: list[str] = []

    def __call__(self, split: str, source: Source, whole: bool = False) -> Opened:
        data, dataset = self.experiment.data, self.listing.dataset
        cache = Path(data.cache_dir).expanduser() if data.cache_dir else None
        on_broken = "fail" if whole else data.on_broken  # a figure of the test split is of all of it
        crop = data.on_aspect == "crop"
        found = decoded(source, data.stored, cache, self.on_progress, on_broken, crop, data.value_range)
        images = ImageArray(found.pixels, source.labels, dataset.mean, dataset.std, source.classes)
        shapes, squashed = _shapes(split, source, found, self.experiment)
        self.notes += filter(None, (shapes, _brightness(split, found, data)))
        return Opened(cut(source, data.stored) if crop else source, images, torch.from_numpy(found.broken), squashed)


def _shapes(split: str, source: Source, found: Decoded, experiment: Experiment) -> tuple[str, str]:
    """A line about what is done with images of another aspect than the input's, and how they are squashed unasked.

    Raises:
        ValueError: If such images are to be refused.
    """
    other, size = other_shapes(found.sizes, experiment.image_size), " x ".join(map(str, experiment.image_size))
    if not other.number:
        return "", ""
    who = f"{other.number} of {other.images} {split} images"
    match experiment.data.on_aspect:
        case "fail":
            raise ValueError(
                f"images must have the aspect of data.image_size, {size}, where data.on_aspect is fail, got {who} that "
                f"do not, first: {source.name(other.first)}."
            )
        case "crop":
            lost = f"{1 - 1 / other.median:.0%} at the median and {1 - 1 / other.greatest:.0%} at the most"
            return f"{who} are cut to their centre, to the aspect of {size}, and lose {lost} (data.on_aspect=crop).", ""
        case "squash":
            return "", ""
    squashed = f"{who} squashed to {size}, by {other.median:.2f} at the median and {other.greatest:.2f} at the most"
    return f"{squashed}; data.on_aspect=crop cuts them instead, data.on_aspect=squash asks for this.", squashed


def _brightness(split: str, found: Decoded, data: Data) -> str:
    """A line about images that use a small part of what their type, or the given range, holds."""
    if found.dim is None:
        return ""
    known = "data.value_range" if data.value_range else "what their type holds"
    return (
        f"The greatest value of the {split} images is {found.dim / 255:.1%} of {known}: they are seen that dark. "
        "data.value_range=[low, high] scales images of more than 8 bits by the values that they use."
    )
