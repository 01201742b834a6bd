"""The images of a run: what is pretrained on, and what the probes learn from and are measured on."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amt_ray import plugins
from amt_ray.config import ConfigError, Experiment
from amt_ray.core.datasets import Source
from amt_ray.core.decoded import OnProgress, decoded
from amt_ray.core.evals import Task
from amt_ray.core.images import ImageArray
from amt_ray.core.sampling import hold_out
from amt_ray.core.tokens import pair


class Opened(NamedTuple):
    """A decoded split.

    Attributes:
        source: The split before decoding.
        images: Its images.
        broken: Indices of those that cannot be read.
    """

    source: Source
    images: ImageArray
    broken: Tensor

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
    """

    pretrain: Opened
    index: Tensor
    held_out: Tensor
    task: Task | None

    @property
    def images(self) -> ImageArray:
        """The images that are pretrained on."""
        return self.pretrain.images

    @property
    def shown(self) -> Tensor:
        """Images to look at: held out if any are."""
        return self.held_out if len(self.held_out) else self.index

    @property
    def summary(self) -> str:
        """What there is, in a line."""
        said = [f"{len(self.index)} to train on"]
        if self.task is not None:
            own = self.task.train is self.images
            said += [] if own else [f"{len(self.task.train_index)} labelled"]
            said += [f"{len(self.task.val_index)} held out"]
            said += [f"{len(self.task.test)} test"] if self.task.test is not None else []
            said += [f"{len(self.task.train.classes)} classes"]
        if broken := self.pretrain.broken.tolist():
            said += [f"{len(broken)} broken ones left out (first: {self.pretrain.source.name(broken[0])})"]
        return ", ".join(said)


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
    data = experiment.data
    dataset = plugins.load("datasets", data.name)(data.root, **data.options)
    own = getattr(dataset, "pretrain_split", None)
    pretrain = _open(dataset, own or "train", experiment, on_progress)
    if own:
        index, held_out = hold_out(len(pretrain.images), 0.0, data.train_images)
    else:
        index, held_out = hold_out(len(pretrain.images), data.val_fraction, data.train_images)
    index, held_out = pretrain.whole(index), pretrain.whole(held_out)
    if not len(index):
        raise ValueError(f"data.val_fraction must leave images to train on, got {data.val_fraction}.")
    if not experiment.eval.protocols:
        return Splits(pretrain, index, held_out, None)
    labelled = _open(dataset, "train", experiment, on_progress) if own else pretrain
    return Splits(pretrain, index, held_out, _task(dataset, labelled, experiment, on_progress))


def _task(dataset: Any, labelled: Opened, experiment: Experiment, on_progress: OnProgress | None) -> Task:
    train, fraction, most = labelled.images, experiment.data.val_fraction, experiment.data.train_images
    if train.labels_n is None and any(chosen.needs == "labels" for chosen in experiment.eval.chosen):
        raise ValueError(
            "eval.protocols need images in class folders, got images without labels; set eval.protocols=[]."
        )
    test: Opened | None = None
    with contextlib.suppress(KeyError):
        test = _open(dataset, "test", experiment, on_progress, whole=True)
    if test is not None and test.images.classes != train.classes:
        counts = f"{len(train.classes)} and {len(test.images.classes)}"
        raise ValueError(f"train and test must have the same classes, got {counts}.")
    train_index, val_index = map(labelled.whole, hold_out(len(train), fraction, most))
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
    )


def _open(
    dataset: Any, split: str, experiment: Experiment, on_progress: OnProgress | None, whole: bool = False
) -> Opened:
    data = experiment.data
    source = dataset.split(split)
    cache = Path(data.cache_dir).expanduser() if data.cache_dir else None
    on_broken = "fail" if whole else data.on_broken  # a figure of the test split is of all of it
    found = decoded(source, pair(data.store_px or data.image_size), cache, on_progress, on_broken)
    images = ImageArray(found.pixels, source.labels, dataset.mean, dataset.std, source.classes)
    return Opened(source, images, torch.from_numpy(found.broken))
