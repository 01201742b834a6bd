"""ImageNet-1K (Russakovsky et al. 2015, arXiv 1409.0575), or a part of it: a folder a class."""

import functools
import os
from pathlib import Path

from amt_ray.core.datasets import IMAGENET_MEAN, IMAGENET_STD, Source, missing
from amt_ray.core.datasets.imagefolder import split_sources
from amt_ray.core.folders import EXTENSIONS, is_hidden, split_folders

FOLDERS = {"train": "train", "test": "val"}
ARCHIVES = "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz"
SORTER = "https://raw.githubusercontent.com/soumith/imagenetloader.torch/master/valprep.sh"


class ImageNet:
    """``root/train/<wnid>/*`` and ``root/val/<wnid>/*``; the test split is ``val``, as the test labels are not public.

    A ``test`` folder with images in class folders makes ``val`` a split of its own, as in `ImageFolder`. Files are
    listed and their sizes and times looked at; none is opened before its pixels are wanted.

    Args:
        root: The folder.
    """

    mean = IMAGENET_MEAN
    std = IMAGENET_STD
    published = 1_281_167

    def __init__(self, root: str | None = None) -> None:
        self.root = Path(root or "data").expanduser()

    @functools.cached_property
    def _splits(self) -> dict[str, Source]:
        return split_sources(self.root)

    def split(self, name: str) -> Source:
        """The train or test split, and the val split where test is labelled too.

        Raises:
            ValueError: If the folder is missing, or its images are not sorted into class folders.
        """
        if name == "val":
            return self._splits[name]
        usual = FOLDERS[name]
        folder = self.root / split_folders(self.root).get(usual, usual)
        if not folder.is_dir():
            command = (
                f"Put {ARCHIVES} from https://image-net.org/download into {self.root}, then: python -c "
                f'"from torchvision.datasets import ImageNet; ImageNet({str(self.root)!r}, {usual!r})"'
            )
            raise missing(f"ImageNet as {usual}/<wnid>/*", self.root, folder, command)
        entries = [entry.name for entry in os.scandir(folder) if not is_hidden(entry.name)]
        if flat := sum(entry.lower().endswith(EXTENSIONS) for entry in entries):
            raise ValueError(
                f"data.root must hold ImageNet as {usual}/<wnid>/*, got {flat} images lying flat in {folder}. "
                f"To sort the 50,000 of val: cd {folder} && curl -O {SORTER} && bash valprep.sh"
            )
        return self._splits[name]
