"""COCO's instance annotations (https://cocodataset.org/#format-data) read into `Objects`, and written from them."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle

from amt_ray.core.datasets import Objects

BoxOf = Callable[[Sequence[float], tuple[int, int]], Sequence[float]]
NEEDED = ("images", "annotations", "categories")


@dataclass(frozen=True)
class Instances:
    """The annotations of a file, image by image in the order of their ids.

    Attributes:
        images: COCO's entries: id, file_name, height, width.
        annotations: Those of each image, in the file's order.
        categories: COCO's category ids in increasing order; a label is a place in this list.
        names: The categories' names.
        maskless: Where some annotations have a segmentation and others none, the first without, in words.
        notes: How many boxes reach over the border, and how many have no area, a line each.
    """

    images: tuple[Mapping[str, Any], ...]
    annotations: tuple[tuple[Mapping[str, Any], ...], ...]
    categories: tuple[int, ...]
    names: tuple[str, ...]
    maskless: str | None = None
    notes: tuple[str, ...] = ()

    def objects(self, i: int) -> Objects:
        """The objects of image ``i`` that have an area; boxes as the annotators drew them, cut at the border."""
        size = self._size(i)
        return self._objects(i, [a for a in self.annotations[i] if _has_area(box_of(a["bbox"], size))], box_of)

    def annotated(self, i: int) -> Objects:
        """All objects of image ``i``, boxes as they stand in the file: what COCO's own evaluation measures against."""
        return self._objects(i, self.annotations[i], lambda bbox, size: corners_of(bbox))

    def _size(self, i: int) -> tuple[int, int]:
        return int(self.images[i]["height"]), int(self.images[i]["width"])

    def _objects(self, i: int, found: Sequence[Mapping[str, Any]], box: BoxOf) -> Objects:
        size = self._size(i)
        labels = [self.categories.index(a["category_id"]) for a in found]
        masks = [mask_of(a.get("segmentation"), size) for a in found]
        known = [mask for mask in masks if mask is not None]
        crowd = np.array([bool(a.get("iscrowd", 0)) for a in found], dtype=bool)
        return Objects(
            size,
            np.array([box(a["bbox"], size) for a in found], dtype=np.float32).reshape(-1, 4),
            np.array(labels, dtype=np.int64),
            np.array(known, dtype=bool).reshape(-1, *size) if len(known) == len(masks) else None,
            crowd if crowd.any() else None,
        )


def _has_area(box: Sequence[float]) -> bool:
    left, top, right, bottom = box
    return left < right and top < bottom


def corners_of(bbox: Sequence[float]) -> list[float]:
    """COCO's left, top, width, height as left, top, right, bottom."""
    left, top, width, height = bbox
    return [left, top, left + width, top + height]


def box_of(bbox: Sequence[float], size: tuple[int, int]) -> list[float]:
    """COCO's left, top, width, height as left, top, right, bottom inside the image."""
    left, top, right, bottom = corners_of(bbox)
    return [max(left, 0.0), max(top, 0.0), min(right, size[1]), min(bottom, size[0])]


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
    """An ``instances_*.json`` file.

    Raises:
        ValueError: If the file is not of this kind, or an annotation is not as it must be; the message names both.
    """
    content = _content(path)
    images = tuple(sorted(content["images"], key=lambda image: image["id"]))
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    categories = sorted(content["categories"], key=lambda category: category["id"])
    numbers = {category["id"] for category in categories}
    of_image = defaultdict(list)
    for annotation in content["annotations"]:
        for key, known in (("image_id", sizes), ("category_id", numbers)):
            if annotation.get(key) not in known:
                raise ValueError(f"COCO annotations must be of known {key}s, got {annotation.get(key)} in {path}.")
        try:
            check_annotation(annotation, sizes[annotation["image_id"]])
        except ValueError as error:
            raise ValueError(f"{error} in annotation {annotation.get('id')} of {path}.") from None
        of_image[annotation["image_id"]].append(annotation)
    return Instances(
        images,
        tuple(tuple(of_image[image["id"]]) for image in images),
        tuple(category["id"] for category in categories),
        tuple(category["name"] for category in categories),
        _maskless(content["annotations"], path),
        tuple(_about_boxes(content["annotations"], sizes, path)),
    )


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"COCO instances must be whole JSON, got {' '.join(str(error).split())} in {path}.") from error
    if missing := sorted(set(NEEDED) - (set(content) if isinstance(content, dict) else set())):
        raise ValueError(f"COCO instances must have {', '.join(sorted(NEEDED))}, got no {missing[0]} in {path}.")
    for part, keys in (("images", ("id", "file_name", "height", "width")), ("categories", ("id", "name"))):
        for entry in content[part]:
            if lacking := [key for key in keys if key not in entry]:
                about = f"{json.dumps(entry)[:80]} of {path}"
                raise ValueError(f"COCO {part} must have {', '.join(keys)}, got no {lacking[0]} in {about}.")
    return dict(content)


def check_annotation(annotation: Mapping[str, Any], size: tuple[int, int]) -> None:
    """Refuse an annotation that cannot be learned from or measured against.

    Raises:
        ValueError: If its box is not four finite numbers, or its segmentation is no polygons of three points or more
            and no run lengths of the image's size.
    """
    bbox: Any = annotation.get("bbox")
    if not _are_numbers(bbox) or len(bbox) != 4 or min(bbox[2:]) < 0:
        raise ValueError(f"a bbox must be left, top, width and height, got {bbox}")
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if not _are_numbers(polygon) or len(polygon) < 6 or len(polygon) % 2:
                raise ValueError(f"a polygon must have x and y of 3 points or more, got {str(polygon)[:80]}")
    elif segmentation:
        _check_counts(segmentation, size)


def _check_counts(segmentation: Any, size: tuple[int, int]) -> None:
    if not isinstance(segmentation, dict) or "counts" not in segmentation:
        raise ValueError(f"a segmentation must be polygons or counts, got {str(segmentation)[:80]}")
    if list(segmentation.get("size", ())) != list(size):
        raise ValueError(f"a segmentation must have its image's size, {list(size)}, got {segmentation.get('size')}")
    counts = segmentation["counts"]
    if isinstance(counts, list) and (not _are_numbers(counts) or sum(counts) != size[0] * size[1]):
        raise ValueError(f"counts must add up to {size[0] * size[1]} pixels, got {str(counts)[:80]}")


def _are_numbers(values: Any) -> bool:
    """Whether these are finite numbers; of a million polygons in seconds."""
    return isinstance(values, list | tuple) and {*map(type, values)} <= {int, float} and math.isfinite(sum(values))


def _maskless(annotations: Sequence[Mapping[str, Any]], path: Path) -> str | None:
    without = next((a.get("id") for a in annotations if not a.get("segmentation")), None)
    some = any(a.get("segmentation") for a in annotations)
    return f"annotation {without} of {path}" if without is not None and some else None


def _about_boxes(
    annotations: Sequence[Mapping[str, Any]], sizes: Mapping[Any, tuple[int, int]], path: Path
) -> Iterator[str]:
    flat = over = 0
    for annotation in annotations:
        left, top, width, height = annotation["bbox"]
        rows, columns = sizes[annotation["image_id"]]
        inside = box_of(annotation["bbox"], (rows, columns))
        flat += not _has_area(inside)
        # a hundredth of a pixel is rounding
        over += min(left, top, columns - left - width, rows - top - height) < -0.01 and _has_area(inside)
    if over:
        yield f"{over} boxes of {path} reach over the border: learned from inside of it, measured as they stand"
    if flat:
        yield f"{flat} boxes of {path} have no area in the image: not learned from, measured as not found"


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
