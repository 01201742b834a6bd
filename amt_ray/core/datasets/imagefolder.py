"""A folder of images: one's own data, or any data set laid out as torchvision's ImageFolder."""

import dataclasses
import functools
import os
from pathlib import Path

import numpy as np

from amt_ray.core.datasets import IMAGENET_MEAN, IMAGENET_STD, Source, stat_fingerprint
from amt_ray.core.folders import EXTENSIONS as EXTENSIONS
from amt_ray.core.folders import SPLIT_NAMES, Below, images_below, not_used, split_folders
from amt_ray.core.pixels import open_rgb


def folder_source(folder: Path, reads: tuple[str, ...] = ()) -> Source:
    """All images below a folder; the first folder level names the class, unless the images lie flat.

    Args:
        folder: The folder.
        reads: Endings of other files below it that are read elsewhere.

    Raises:
        ValueError: If there is no image, or some images lie in class folders and some beside them.
    """
    return _source_of(folder, images_below(folder, reads))


def _source_of(folder: Path, below: Below) -> Source:
    files, skipped = below.files, str(below.skipped)
    if not files:
        raise ValueError(
            f"data.root must hold images ({', '.join(EXTENSIONS)}), found none below {folder}"
            f"{f' (skipped {skipped})' if skipped else ''}."
        )
    tops = [top if rest else "" for top, _, rest in (f.partition(os.sep) for f in files)]
    classes = tuple(sorted(set(tops)))
    if "" in classes and len(classes) > 1:
        raise ValueError(f"images must all lie in class folders or all flat, found both below {folder}.")
    labelled = classes != ("",)
    number = {name: i for i, name in enumerate(classes)}
    return Source(
        count=len(files),
        open=lambda i, value_range=None: open_rgb(folder / files[i], value_range),
        name=lambda i: str(folder / files[i]),
        labels=np.array([number[t] for t in tops], dtype=np.int64) if labelled else None,
        classes=classes if labelled else (),
        fingerprint=stat_fingerprint("folder", folder, files),
        folder=folder.name,
        notes=(f"skipped below {folder}: {skipped}",) if skipped else (),
    )


def split_sources(root: Path) -> dict[str, Source]:
    """The splits that a folder has, by the names of the folders in it.

    ``val`` and ``test`` are taken where both are labelled as ``train`` is; where one is, it is ``test``.

    Raises:
        ValueError: If there are folders of splits but none to train on, or one is not as `folder_source` needs it.
    """
    folders = split_folders(root)
    if not folders:
        return {"train": dataclasses.replace(folder_source(root), folder="")}
    if "train" not in folders:
        known = " or ".join(SPLIT_NAMES["train"])
        raise ValueError(
            f"data.root must have a folder {known} beside those named as other splits, "
            f"got only {', '.join(folders.values())} in {root}."
        )
    train = folder_source(root / folders["train"])
    found, notes = {"train": train}, list(train.notes)
    for split, folder in list(folders.items())[1:]:
        below = images_below(root / folder)
        if reason := _unfit(below, train):
            notes.append(f"{folder} is not used: {reason}")
        else:
            found[split] = _source_of(root / folder, below)
    if "test" not in found and "val" in found:
        found["test"] = found.pop("val")
    if beside := not_used(root, tuple(folders.values())):
        notes.append(f"not used: {beside}, beside {', '.join(folders.values())}")
    return found | {"train": dataclasses.replace(train, notes=tuple(notes))}


def _unfit(below: Below, train: Source) -> str:
    """Why nothing can be measured on these images, if so."""
    if not below.files:
        return "it has no images"
    if train.labels is not None and not any(os.sep in file for file in below.files):
        return "its images lie flat, so nothing tells their classes"
    return ""


class ImageFolder:
    """Folders named as splits with ``<class>/*`` in each, or ``root/<class>/*``, or images flat in ``root``.

    The splits' folders are ``train`` or ``training``, ``val``, ``valid`` or ``validation``, ``test`` or ``testing``, in
    any case. Without any, all of ``root`` is the train split and there is no other. Flat images have no labels: they
    can be pretrained on, not evaluated by a probe.

    Args:
        root: The folder.

    Raises:
        ValueError: If the folder does not exist.
    """

    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(self, root: str | None = None) -> None:
        if root is None or not Path(root).expanduser().is_dir():
            raise ValueError(f"data.root must be an existing folder, got {root}.")
        self.root = Path(root).expanduser()

    @functools.cached_property
    def _splits(self) -> dict[str, Source]:
        return split_sources(self.root)

    def split(self, name: str) -> Source:
        """The train, val or test split; KeyError where there is none."""
        return self._splits[name]
