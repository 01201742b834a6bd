import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from amt_ray.core.coco import read_instances, write_instances
from amt_ray.core.datasets import UNKNOWN, Objects
from amt_ray.core.datasets.coco import Coco
from amt_ray.core.datasets.labelmaps import LabelMaps
from amt_ray.core.datasets.shapes import Shapes
from amt_ray.core.decoded import decoded
from tests.core import dataset_files

NAMES = ("circle", "square", "triangle", "star", "cross")


def same(one, other):
    assert one.size == other.size and np.array_equal(one.boxes, other.boxes)
    assert np.array_equal(one.labels, other.labels) and one.boxes.dtype == other.boxes.dtype
    for name in ("masks", "crowd"):
        left, right = getattr(one, name), getattr(other, name)
        assert (left is None) == (right is None) and (left is None or np.array_equal(left, right))


def written(tmp_path, objects, names=NAMES):
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(write_instances(objects, names, [f"{i}.jpg" for i in range(len(objects))])))
    return path


def examples():
    source = Shapes(count_train=12, count_test=1, size_px=24).split("train")
    drawn = [source.objects(i) for i in range(12)]
    boxes = np.array([[0.5, 1.25, 9, 8], [2, 2, 6, 6]], dtype=np.float32)
    bare = Objects((20, 10), boxes, np.array([4, 0]), None, np.array([False, True]))
    empty = Objects((5, 6), np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros((0, 5, 6), bool))
    return [*drawn, bare, empty]


def test_coco__objects_written_and_read_are_the_same(tmp_path):
    objects = examples()
    instances = read_instances(written(tmp_path, objects))
    assert instances.names == NAMES and len(instances.images) == len(objects)
    for i, each in enumerate(objects):
        same(instances.objects(i), each)


def test_coco__pycocotools_reads_the_same_from_what_is_written(tmp_path):
    objects = examples()
    path = written(tmp_path, objects)
    theirs, ours = COCO(str(path)), read_instances(path)
    for i, image in enumerate(ours.images):
        annotations = theirs.loadAnns(theirs.getAnnIds(imgIds=image["id"]))
        assert [a["category_id"] - 1 for a in annotations] == objects[i].labels.tolist()
        if objects[i].masks is not None:
            for annotation, mask in zip(annotations, objects[i].masks, strict=True):
                assert np.array_equal(theirs.annToMask(annotation), mask) and annotation["area"] == mask.sum()


def test_coco__polygons_counts_and_compressed_counts_are_read_as_pycocotools_reads_them(tmp_path):
    dataset_files.coco(tmp_path)
    path = tmp_path / "annotations" / "instances_train2017.json"
    theirs, source = COCO(str(path)), Coco(str(tmp_path)).split("train")
    assert source.object_classes == ("car", "dog") and source.labels is None
    kinds = set()
    for i in range(source.count):
        image = theirs.loadImgs(int(37 + i))[0]
        assert source.name(i).endswith(image["file_name"])
        annotations = theirs.loadAnns(theirs.getAnnIds(imgIds=image["id"]))
        found = source.objects(i)
        assert [("car", "dog")[k] for k in found.labels] == [
            {3: "car", 18: "dog"}[a["category_id"]] for a in annotations
        ]
        for annotation, mask, box in zip(annotations, found.masks, found.boxes, strict=True):
            assert np.array_equal(theirs.annToMask(annotation), mask)
            left, top, width, height = annotation["bbox"]
            assert box.tolist() == [left, top, left + width, top + height]
            kinds.add(type(annotation["segmentation"]).__name__)
    assert kinds == {"list", "dict"}


def test_coco__a_box_is_cut_at_the_border_and_one_without_area_is_no_object(tmp_path):
    boxes = [[-3.0, 2.0, 8.0, 40.0], [4.0, 4.0, 0.0, 3.0]]
    content = {
        "images": [{"id": 7, "file_name": "a.jpg", "height": 20, "width": 30}],
        "annotations": [{"id": k, "image_id": 7, "category_id": 1, "bbox": box} for k, box in enumerate(boxes)],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "one.json").write_text(json.dumps(content))
    found = read_instances(tmp_path / "one.json").objects(0)
    assert found.boxes.tolist() == [[0, 2, 5, 20]] and found.masks is None and found.crowd is None


def test_coco__a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "one.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(ValueError, match="must have annotations, categories, images, got no categories in .*one.json"):
        read_instances(tmp_path / "one.json")


@pytest.mark.parametrize("key", ["image_id", "category_id"])
def test_coco__annotations_of_nothing_known_are_refused(tmp_path, key):
    dataset_files.coco(tmp_path)
    file = tmp_path / "annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"][1][key] = 77
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"must be of known {key}s, got 77 in .*instances_train2017.json"):
        Coco(str(tmp_path)).split("train")


def test_coco__an_image_of_another_size_than_the_annotations_tell_is_named(tmp_path):
    dataset_files.coco(tmp_path)
    path = tmp_path / "train2017" / f"{2:012}.jpg"
    Image.new("RGB", (20, 30)).save(path)
    with pytest.raises(
        ValueError, match=rf"1 of 4 images cannot be read, first: {path} .*size, \(20, 30\), got \(30, 20\)"
    ):
        decoded(Coco(str(tmp_path)).split("train"), (16, 16), tmp_path / "cache")


@pytest.mark.parametrize("zero_is_other", [True, False])
def test_label_maps__zero_is_other_or_the_first_class(tmp_path, zero_is_other):
    dataset_files.labelmaps(tmp_path)
    if not zero_is_other:
        (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
    source = LabelMaps(str(tmp_path), zero_is_other).split("test")
    raw = np.asarray(Image.open(tmp_path / "annotations/validation/1.png")).astype(int)
    expected = np.where(raw == 0, UNKNOWN, raw - 1) if zero_is_other else raw
    assert np.array_equal(source.labelmap(1), expected) and set(np.unique(raw)) == {0, 1, 2, 3}


def test_label_maps__names_come_from_ade20ks_table(tmp_path):
    dataset_files.labelmaps(tmp_path)
    (tmp_path / "classes.txt").unlink()
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName", "1\t0.1\t1\t1\t1\twall", "2\t0.1\t1\t1\t1\tbuilding, edifice"]
    (tmp_path / "objectInfo150.txt").write_text("\n".join([*rows, "3\t0\t1\t1\t0\tsky"]) + "\n")
    source = LabelMaps(str(tmp_path)).split("train")
    assert source.labelmap_classes == ("wall", "building, edifice", "sky")


def test_label_maps__what_does_not_fit_is_refused_with_the_file(tmp_path):
    dataset_files.labelmaps(tmp_path)
    (tmp_path / "classes.txt").write_text("wall\n")
    with pytest.raises(ValueError, match="must hold classes below 1, got 2 in .*0.png"):
        LabelMaps(str(tmp_path)).split("train").labelmap(0)
    Image.new("RGB", (4, 4)).save(tmp_path / "annotations/training/0.png")
    with pytest.raises(ValueError, match="must have one channel, got 3 in .*0.png"):
        LabelMaps(str(tmp_path)).split("train").labelmap(0)
    (tmp_path / "annotations/training/0.png").unlink()
    with pytest.raises(ValueError, match="must have a label map, got 1 of 3 without, first: .*0.png"):
        LabelMaps(str(tmp_path)).split("train")
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(ValueError, match="data.root must hold the classes' names"):
        LabelMaps(str(tmp_path)).split("test")


def test_shapes__the_label_map_is_the_ground_and_the_visible_masks():
    source = Shapes(count_train=20, count_test=1).split("train")
    assert source.labelmap_classes == ("background", *NAMES)
    for i in range(20):
        found, objects = source.labelmap(i), source.objects(i)
        for mask, label in zip(objects.masks, objects.labels):
            assert (found[mask] == label + 1).all()
        assert (found[~objects.masks.any(0)] == 0).all() and found.dtype == np.uint8
