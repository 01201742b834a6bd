"""Images with a class for every pixel, laid out as ADE20K (Zhou et al. 2017, https://arxiv.org/abs/1608.05442)."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from amt_ray.core.datasets import IMAGENET_MEAN, IMAGENET_STD, UNKNOWN, Source, missing, stat_fingerprint
from amt_ray.core.datasets.imagefolder import image_files, open_rgb

FOLDERS = {"train": "training", "test": "validation"}
COMMAND = "ADE20K: get ADEChallengeData2016.zip from http://sceneparsing.csail.mit.edu and unpack it."


class LabelMaps:
    """``root/images/{training,validation}/*`` and ``root/annotations/{training,validation}/*.png`` of the same names.

    Class names stand in ``root/classes.txt``, one a line, or in ADE20K's ``objectInfo150.txt``.

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

    def split(self, name: str) -> Source:
        """The train (training) or test (validation) split."""
        folder, maps = (self.root / kind / FOLDERS[name] for kind in ("images", "annotations"))
        for path in (folder, maps):
            if not path.is_dir():
                raise missing("images and label maps", self.root, path, COMMAND)
        files, classes = image_files(folder), class_names(self.root)
        paths = [(maps / file).with_suffix(".png") for file in files]
        if lacking := [path for path in paths if not path.is_file()]:
            raise ValueError(
                f"every image must have a label map, got {len(lacking)} of {len(files)} without, first: {lacking[0]}."
            )
        looked_at = [*(folder / file for file in files), *paths]
        return Source(
            count=len(files),
            open=lambda i: open_rgb(folder / files[i]),
            name=lambda i: str(folder / files[i]),
            labels=None,
            classes=(),
            fingerprint=stat_fingerprint("labelmaps", self.root, [os.path.relpath(p, self.root) for p in looked_at]),
            labelmap=lambda i: self._read(paths[i], len(classes)),
            labelmap_classes=classes,
        )

    def _read(self, path: Path, classes: int) -> np.ndarray:
        with Image.open(path) as image:
            found = np.asarray(image)
        if found.ndim != 2:
            raise ValueError(f"a label map must have one channel, got {found.shape[-1]} in {path}.")
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
