"""COCO (Lin et al. 2014, https://arxiv.org/abs/1405.0312): objects with boxes and masks; images have no class."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from amt_ray.core.coco import read_instances
from amt_ray.core.datasets import IMAGENET_MEAN, IMAGENET_STD, Source, missing, stat_fingerprint
from amt_ray.core.pixels import ValueRange, open_rgb

FOLDERS = {"train": "train2017", "test": "val2017"}
COMMAND = "Get train2017.zip, val2017.zip and annotations_trainval2017.zip from https://cocodataset.org/#download"


class Coco:
    """The train images, and the val images as the test split; any data in COCO's layout and format.

    Boxes are the annotators' own, which are tight around masks to about a pixel. Boxes, masks and sizes are of the
    image as it is displayed: an EXIF orientation, which COCO's own images do not have, is applied before.

    Args:
        root: The folder with ``train2017``, ``val2017`` and ``annotations/instances_{train,val}2017.json``.

    Raises:
        ValueError: If files are missing.
    """

    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(self, root: str | None = None) -> None:
        self.root = Path(root or "data").expanduser()

    def split(self, name: str) -> Source:
        """The train or test split."""
        folder = self.root / FOLDERS[name]
        annotations = self.root / "annotations" / f"instances_{FOLDERS[name]}.json"
        for path in (folder, annotations):
            if not path.exists():
                raise missing("COCO", self.root, path, f"{COMMAND} and unpack them in {self.root}.")
        instances = read_instances(annotations)
        files = [str(image["file_name"]) for image in instances.images]
        looked_at = [annotations, *(folder / file for file in files)]
        return Source(
            count=len(files),
            open=lambda i, value_range=None: self._open(folder / files[i], instances.images[i], value_range),
            name=lambda i: str(folder / files[i]),
            labels=None,
            classes=(),
            fingerprint=stat_fingerprint("coco", self.root, [os.path.relpath(p, self.root) for p in looked_at]),
            objects=instances.objects,
            object_classes=instances.names,
            annotated=instances.annotated,
            maskless=instances.maskless,
            folder=folder.name,
            notes=instances.notes,
        )

    def _open(self, path: Path, about: Mapping[str, Any], value_range: ValueRange | None) -> Image.Image:
        image, told = open_rgb(path, value_range), (about["width"], about["height"])
        if image.size != told:  # the boxes would lie elsewhere
            raise ValueError(f"the annotations must tell its size, {image.size}, got {told}")
        return image
