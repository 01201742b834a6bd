"""What a data set holds, split by split, and which of its images are for what; nothing is decoded."""

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from amt_ray import plugins
from amt_ray.config import Experiment
from amt_ray.core.datasets import Dataset, Source
from amt_ray.core.folders import first_of, split_folders
from amt_ray.core.sampling import hold_out
from amt_ray.sections import Data


class Part(NamedTuple):
    """Images with one use in a run.

    Attributes:
        fingerprint: Changes whenever the images, their number or what they show changes.
        images: How many.
    """

    fingerprint: str
    images: int


@dataclass(frozen=True)
class Listing:
    """The splits of a data set, before decoding.

    Attributes:
        data: How they are asked for.
        dataset: The data set.
        pretrain: The split that is pretrained on: ``train``, unless the data has images that only pretraining uses.
        train: What the probes learn from; None where no probe is asked for and it is not pretrained on.
        val: The data's own val split, measured as ``eval/`` in the place of images held out of ``train``.
        test: The test split; None where no probe is asked for.
        probes: Whether a probe is asked for.
    """

    data: Data
    dataset: Dataset
    pretrain: Source
    train: Source | None
    val: Source | None
    test: Source | None
    probes: bool

    @property
    def own(self) -> bool:
        """Whether pretraining has images of its own, without labels."""
        return self.pretrain is not self.train

    def divided(self, source: Source | None = None) -> tuple[Tensor, Tensor]:
        """Indices into a split (default: the one pretrained on) to learn from, and of those held out of it."""
        source = source or self.pretrain
        held = self.val is None and source is self.train
        return hold_out(source.count, self.data.val_fraction if held else 0.0, self.data.train_images)

    @functools.cached_property
    def counts(self) -> Mapping[str, int]:
        """Images by use (``train``, ``probe``, ``val``, ``test``), as far as there are any."""
        index, held_out = self.divided()
        found = {"train": len(index), "val": len(held_out)}
        if self.probes and self.own:
            probe, held_out = self.divided(self.train)
            found |= {"probe": len(probe), "val": len(held_out)}
        if self.probes and self.val is not None:
            found["val"] = self.val.count
        if self.test is not None:
            found["test"] = self.test.count
        return {use: count for use, count in found.items() if count}

    def parts(self, counts: Mapping[str, int] | None = None) -> dict[str, Part]:
        """What each use has; ``counts`` where fewer images are taken than are listed, broken ones left out."""
        listed = self.counts
        taken = listed if counts is None else counts
        prints = self._fingerprints()
        found = {}
        for use, count in listed.items():
            broken = f"|broken={count - taken[use]}" if taken[use] != count else ""
            found[use] = Part(prints[use] + broken, taken[use])
        return found

    def _fingerprints(self) -> dict[str, str]:
        options = f"|options={json.dumps(self.data.options, sort_keys=True)}" if self.data.options else ""
        options += "|on_aspect=crop" if self.data.on_aspect == "crop" else ""  # other pixels of the same files
        options += f"|value_range={list(self.data.value_range)}" if self.data.value_range else ""
        most = "" if self.data.train_images is None else f"|train_images={self.data.train_images}"
        held = "" if self.val is not None else f"|val_fraction={self.data.val_fraction}"
        learnt = {"train": self.pretrain.fingerprint + options}
        found = {"train": learnt["train"] + ("" if self.own else held) + most}
        if self.train is not None:
            labelled = self.train.fingerprint + options + held
            found |= {"probe": f"{labelled}{most}|probe", "val": f"{labelled}|val"}
        if self.val is not None:
            found["val"] = self.val.fingerprint + options
        if self.test is not None:
            found["test"] = self.test.fingerprint + options
        return found

    def lines(
        self, counts: Mapping[str, int] | None = None, broken: str = "", measures_test: bool = True
    ) -> Iterator[str]:
        """What was understood: counts and classes, which folder is which split, and what was skipped."""
        taken = self.counts if counts is None else counts
        val = "held out" if self.val is None else "val"
        uses = {"train": "to train on", "probe": "labelled", "val": val, "test": "test"}
        said = [f"{taken[use]:,} {what}" for use, what in uses.items() if use in taken]
        if self.train is not None and (classes := self.train.classes):
            said.append(f"{len(classes)} classes ({first_of(classes)})")
        yield f"Images: {self.data.name}, {', '.join(said + ([broken] if broken else []))}"
        yield f"Splits: {'; '.join(self._roles(measures_test))}"
        for source in filter(None, (self.pretrain, self.train if self.own else None, self.val, self.test)):
            yield from source.notes

    def _roles(self, measures_test: bool) -> Iterator[str]:
        trained = self.pretrain.folder or getattr(self.dataset, "pretrain_split", "train")
        where = f"all of {self.data.root}" if not self.pretrain.folder and self._is_whole else trained
        yield f"{where} is trained on"
        if self.train is not None and self.val is None and self.data.val_fraction:
            measured = ", measured as eval/" if self.probes else ""
            yield f"{self.data.val_fraction:.3g} of {self.train.folder or 'train'} is held out{measured}"
        if self.val is not None:
            yield f"{self.val.folder or 'val'} is measured as eval/, and data.val_fraction does not apply"
        if self.test is not None:
            yield f"{self.test.folder or 'test'} is {'measured as test/' if measures_test else 'left alone'}"
        elif self.probes:
            yield "there is no test split"

    @property
    def _is_whole(self) -> bool:
        """Whether a folder without folders of splits is taken."""
        return self.data.root is not None and self.data.name == "imagefolder"


def listed(experiment: Experiment) -> Listing:
    """Look through the data set; nothing is decoded.

    Raises:
        ValueError: If the images are not there, or not as the data set needs them.
    """
    data, probes = experiment.data, bool(experiment.eval.protocols)
    dataset = plugins.load("datasets", data.name)(data.root, **data.options)
    own = getattr(dataset, "pretrain_split", None)
    pretrain = dataset.split(own or "train")
    train = pretrain if not own else dataset.split("train") if probes else None
    return Listing(
        data, dataset, pretrain, train, _split(dataset, "val"), _split(dataset, "test") if probes else None, probes
    )


def _split(dataset: Any, name: str) -> Source | None:
    with contextlib.suppress(KeyError):
        found: Source = dataset.split(name)
        return found
    return None


def is_here(data: Data) -> bool:
    """Whether the data set can be listed without downloading it."""
    if getattr(plugins.load("datasets", data.name), "published", None) is None:
        return True
    return "train" in split_folders(Path(data.root or "data").expanduser())
