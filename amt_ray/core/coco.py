"""COCO's instance annotations (https://cocodataset.org/#format-data) read into `Objects`, and written from them."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle

from amt_ray.core.datasets import Objects


@dataclass(frozen=True)
class Instances:
    """The annotations of a file, image by image in the order of their ids.

    Attributes:
        images: COCO's entries: id, file_name, height, width.
        annotations: Those of each image, in the file's order.
        categories: COCO's category ids in increasing order; a label is a place in this list.
        names: The categories' names.
    """

    images: tuple[Mapping[str, Any], ...]
    annotations: tuple[tuple[Mapping[str, Any], ...], ...]
    categories: tuple[int, ...]
    names: tuple[str, ...]

    def objects(self, i: int) -> Objects:
        """The objects of image ``i``; boxes as the annotators drew them, cut at the image's border."""
        image, found = self.images[i], self.annotations[i]
        size = (int(image["height"]), int(image["width"]))
        labels = [self.categories.index(a["category_id"]) for a in found]
        masks = [mask_of(a.get("segmentation"), size) for a in found]
        known = [mask for mask in masks if mask is not None]
        crowd = np.array([bool(a.get("iscrowd", 0)) for a in found], dtype=bool)
        return Objects(
            size,
            np.array([box_of(a["bbox"], size) for a in found], dtype=np.float32).reshape(-1, 4),
            np.array(labels, dtype=np.int64),
            np.array(known, dtype=bool).reshape(-1, *size) if len(known) == len(masks) else None,
            crowd if crowd.any() else None,
        )


def box_of(bbox: Sequence[float], size: tuple[int, int]) -> list[float]:
    """COCO's left, top, width, height as left, top, right, bottom inside the image."""
    left, top, width, height = bbox
    return [max(left, 0.0), max(top, 0.0), min(left + width, size[1]), min(top + height, size[0])]


def mask_of(segmentation: Any, size: tuple[int, int]) -> np.ndarray | None:
    """The mask [rows, columns] of polygons, of counts, or of compressed counts; None where there are none."""
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        coded = rle.merge(rle.frPyObjects(segmentation, *size))
    elif isinstance(segmentation["counts"], list):
        coded = rle.frPyObjects(segmentation, *size)
    else:
        coded = segmentation
    decoded: np.ndarray = rle.decode(coded).astype(bool)
    return decoded


def read_instances(path: Path) -> Instances:
    """An ``instances_*.json`` file. Objects without an area are left out.

    Raises:
        ValueError: If the file is not of this kind.
    """
    content = json.loads(path.read_text())
    needed = {"images", "annotations", "categories"}
    if missing := needed - set(content):
        raise ValueError(f"COCO instances must have {', '.join(sorted(needed))}, got no {min(missing)} in {path}.")
    images = tuple(sorted(content["images"], key=lambda image: image["id"]))
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    numbers = {category["id"] for category in content["categories"]}
    of_image = defaultdict(list)
    for annotation in content["annotations"]:
        for key, known in (("image_id", sizes), ("category_id", numbers)):
            if annotation[key] not in known:
                raise ValueError(f"COCO annotations must be of known {key}s, got {annotation[key]} in {path}.")
        left, top, right, bottom = box_of(annotation["bbox"], sizes[annotation["image_id"]])
        if left < right and top < bottom:
            of_image[annotation["image_id"]].append(annotation)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    return Instances(
        images,
        tuple(tuple(of_image[image["id"]]) for image in images),
        tuple(category["id"] for category in categories),
        tuple(category["name"] for category in categories),
    )


def write_instances(objects: Sequence[Objects], names: Sequence[str], files: Sequence[str]) -> dict[str, Any]:
    """COCO's dictionary, ready for `json.dump`; image ids count from 1 in the given order, as do category ids.

    Args:
        objects: The objects of each image.
        names: Names of the classes.
        files: File name of each image.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (found, file) in enumerate(zip(objects, files, strict=True), 1):
        images.append({"id": number, "file_name": file, "height": found.size[0], "width": found.size[1]})
        for k in range(len(found.labels)):
            annotations.append({"id": len(annotations) + 1, "image_id": number, **_annotation(found, k)})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _annotation(found: Objects, k: int) -> dict[str, Any]:
    left, top, right, bottom = map(float, found.boxes[k])
    entry = {
        "category_id": int(found.labels[k]) + 1,
        "bbox": [left, top, right - left, bottom - top],
        "area": (right - left) * (bottom - top),
        "iscrowd": int(found.crowd is not None and found.crowd[k]),
    }
    if found.masks is not None:
        coded = rle.encode(np.asfortranarray(found.masks[k].astype(np.uint8)))
        entry["segmentation"] = {"size": list(found.size), "counts": coded["counts"].decode("ascii")}
        entry["area"] = int(found.masks[k].sum())
    return entry
