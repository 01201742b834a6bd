"""A folder of images: one's own data, or any data set laid out as torchvision's ImageFolder."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from amt_ray.core.datasets import IMAGENET_MEAN, IMAGENET_STD, Source, stat_fingerprint

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val", "validation")}


def image_files(folder: Path) -> list[str]:
    """Paths of the images below a folder, relative to it, sorted, links followed."""
    found = []
    for here, _, files in os.walk(folder, followlinks=True):
        found += [os.path.relpath(os.path.join(here, f), folder) for f in files if f.lower().endswith(EXTENSIONS)]
    return sorted(found)


def open_rgb(path: Path) -> Image.Image:
    """An image file in RGB, read whole and closed.

    Raises:
        OSError: If it is broken, or not a plain file (a pipe would be waited on for ever).
    """
    if not path.is_file():
        raise OSError("no such file, or not a plain one")
    with Image.open(path) as image:
        return image.convert("RGB")


def folder_source(folder: Path) -> Source:
    """All images below a folder; the first folder level names the class, unless the images lie flat.

    Raises:
        ValueError: If there is no image, or some images lie in class folders and some beside them.
    """
    files = image_files(folder)
    if not files:
        raise ValueError(f"data.root must hold images ({', '.join(EXTENSIONS)}), found none below {folder}.")
    tops = [top if rest else "" for top, _, rest in (f.partition(os.sep) for f in files)]
    classes = tuple(sorted(set(tops)))
    if "" in classes and len(classes) > 1:
        raise ValueError(f"images must all lie in class folders or all flat, found both below {folder}.")
    labelled = classes != ("",)
    number = {name: i for i, name in enumerate(classes)}
    return Source(
        count=len(files),
        open=lambda i: open_rgb(folder / files[i]),
        name=lambda i: str(folder / files[i]),
        labels=np.array([number[t] for t in tops], dtype=np.int64) if labelled else None,
        classes=classes if labelled else (),
        fingerprint=stat_fingerprint("folder", folder, files),
    )


class ImageFolder:
    """``root/train/<class>/*`` and ``root/test|val/<class>/*``, or ``root/<class>/*``, or images flat in ``root``.

    Without a ``train`` folder, all of ``root`` is the train split and there is no test split. Flat images have no
    labels: they can be pretrained on, not evaluated by a probe.

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

    def split(self, name: str) -> Source:
        """The train or test split; KeyError where there is none."""
        for folder in SPLIT_FOLDERS[name]:
            if (self.root / folder).is_dir():
                return folder_source(self.root / folder)
        if name == "train":
            return folder_source(self.root)
        raise KeyError(name)
