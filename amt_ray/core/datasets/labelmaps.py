"""Images with a class for every pixel, laid out as ADE20K (Zhou et al. 2017, https://arxiv.org/abs/1608.05442)."""

import functools
import os
from pathlib import Path

import numpy as np

from amt_ray.core.datasets import IMAGENET_MEAN, IMAGENET_STD, UNKNOWN, Source, missing, stat_fingerprint
from amt_ray.core.folders import images_below, split_folders
from amt_ray.core.pixels import open_rgb, open_upright, upright_size

FOLDERS = {"train": "training", "test": "validation"}
COMMAND = "ADE20K: get ADEChallengeData2016.zip from http://sceneparsing.csail.mit.edu and unpack it."


class LabelMaps:
    """``root/images/{training,validation}/*`` and ``root/annotations/{training,validation}/*.png`` of the same names.

    A label map is of the image as it is displayed, with its EXIF orientation applied, and has its size.
    The folders may be named as any split of an image folder is (``train``, ``val``, ``test``). Class names stand in
    ``root/classes.txt``, one a line, or in ADE20K's ``objectInfo150.txt``.

    Args:
        root: The folder.
        zero_is_other: Whether a pixel of 0 has no known class and ``k`` is the class ``k - 1``, as in ADE20K;
            otherwise ``k`` is the class ``k``. 255 is never known.

    Raises:
        ValueError: If files are missing or hold other classes.
    """

    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(self, root: str | None = None, zero_is_other: bool = True) -> None:
        self.root, self.zero_is_other = Path(root or "data").expanduser(), zero_is_other

    @functools.cached_property
    def _folders(self) -> dict[str, tuple[Path, Path]]:
        """Of each split its images and its label maps; one that is labelled beside training is the test split."""
        images, maps = (split_folders(self.root / kind) for kind in ("images", "annotations"))
        both = [split for split in images if split in maps]
        found = {s: (self.root / "images" / images[s], self.root / "annotations" / maps[s]) for s in both}
        if "test" not in found and "val" in found:
            found["test"] = found.pop("val")
        return found

    def split(self, name: str) -> Source:
        """The train (training) or test (validation) split; val and test are two where both are labelled."""
        if name not in self._folders and name in FOLDERS:
            lacking = (self.root / kind / FOLDERS[name] for kind in ("images", "annotations"))
            path = next((path for path in lacking if not path.is_dir()), self.root)
            raise missing("images and label maps", self.root, path, COMMAND)
        folder, maps = self._folders[name]
        below, classes = images_below(folder), class_names(self.root)
        if not (files := below.files):
            raise ValueError(f"data.root must hold images, found none below {folder}.")
        skipped = str(below.skipped)
        notes = [f"skipped below {folder}: {skipped}"] if skipped else []
        if name == "train":
            used = {images.name for images, _ in self._folders.values()}
            notes += [
                f"images/{other} is not used: it has no folder in annotations"
                for other in split_folders(self.root / "images").values()
                if other not in used
            ]
        paths = [(maps / file).with_suffix(".png") for file in files]
        if lacking_maps := [path for path in paths if not path.is_file()]:
            raise ValueError(
                f"every image must have a label map, got {len(lacking_maps)} of {len(files)} without, "
                f"first: {lacking_maps[0]}."
            )
        looked_at = [*(folder / file for file in files), *paths]
        return Source(
            count=len(files),
            open=lambda i, value_range=None: open_rgb(folder / files[i], value_range),
            name=lambda i: str(folder / files[i]),
            labels=None,
            classes=(),
            fingerprint=stat_fingerprint("labelmaps", self.root, [os.path.relpath(p, self.root) for p in looked_at]),
            labelmap=lambda i: self._read(paths[i], folder / files[i], len(classes)),
            labelmap_classes=classes,
            folder=folder.name,
            notes=tuple(notes),
        )

    def _read(self, path: Path, image: Path, classes: int) -> np.ndarray:
        found = np.asarray(open_upright(path))
        if found.ndim != 2:
            raise ValueError(f"a label map must have one channel, got {found.shape[-1]} in {path}.")
        if found.shape != (size := upright_size(image)):
            sizes = f"{found.shape[0]} x {found.shape[1]} in {path} for {size[0]} x {size[1]} in {image}"
            raise ValueError(f"a label map must have the rows and columns of its image as displayed, got {sizes}.")
        numbers = found.astype(np.int64) - self.zero_is_other
        unknown = (found == UNKNOWN) | (numbers < 0)
        if (largest := int(numbers[~unknown].max(initial=0))) >= classes:
            raise ValueError(f"a label map must hold classes below {classes}, got {largest} in {path}.")
        return np.where(unknown, UNKNOWN, numbers).astype(np.uint8)


def class_names(root: Path) -> tuple[str, ...]:
    """The names in ``classes.txt``, or those of ADE20K's own table.

    Raises:
        ValueError: If there is neither, or more names than a label map can hold.
    """
    if (plain := root / "classes.txt").is_file():
        names = [line.strip() for line in plain.read_text().splitlines() if line.strip()]
    elif (table := root / "objectInfo150.txt").is_file():
        names = [line.split("\t")[-1].strip() for line in table.read_text().splitlines()[1:] if line.strip()]
    else:
        raise missing("the classes' names", root, plain, "Write classes.txt with one name a line.")
    if not 0 < len(names) <= UNKNOWN:
        raise ValueError(f"a label map must have 1 to {UNKNOWN} classes, got {len(names)} in {root}.")
    return tuple(names)
