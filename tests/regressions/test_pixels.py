"""What the model sees of a file: shapes, values of more than 8 bits, transparency and orientation.

Reported of others: 16 bits clipped to white (https://github.com/python-pillow/Pillow/issues/2574, #5991), boxes drawn
on turned images that are read unturned (https://github.com/roboflow/rf-detr/issues/189,
https://github.com/pytorch/vision/issues/7977), images squashed to a square.
"""

import dataclasses
import io
import json
import struct

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from rich.console import Console

from amt_ray.config import ConfigError
from amt_ray.core.aspect import cut_objects, other_shapes, window
from amt_ray.core.coco import write_instances
from amt_ray.core.datasets import Objects
from amt_ray.core.datasets.imagefolder import folder_source
from amt_ray.core.decoded import decoded
from amt_ray.core.evals import protocol_name
from amt_ray.core.pixels import open_rgb, to_rgb, upright_size
from amt_ray.core.probing import check_labelmaps
from amt_ray.plugins import load
from amt_ray.protocols import presets
from amt_ray.runtime.evaluate import about_data
from amt_ray.runtime.preflight import check_inputs
from amt_ray.runtime.splits import load_splits
from tests.core import dataset_files
from tests.tiny import tiny

RAMP = np.round(np.arange(64) * 65535 / 63).astype(np.uint16).reshape(8, 8)  # 64 levels over all of 16 bits
TURNED = {  # what a viewer displays of the stored pixels, by EXIF orientation
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def saved(values, path, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    (values if isinstance(values, Image.Image) else Image.fromarray(values)).save(path, **how)
    return path


def oriented(values, path, orientation, **how):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(values, path, exif=exif, **how)


def grey(path, value_range=None):
    image = np.asarray(open_rgb(path, value_range))
    assert image.dtype == np.uint8 and image.shape[2] == 3 and (image == image[..., :1]).all()
    return image[..., 0].astype(int)


def folder_of(root, shapes, value=200):
    """Images of these rows and columns in two classes, in train and test."""
    for split in ("train", "test"):
        for i, (rows, columns) in enumerate(shapes):
            pixels = np.full((rows, columns, 3), value, dtype=np.uint8)
            saved(pixels, root / split / "ab"[i % 2] / f"{i}.png")
    return tiny(data__name="imagefolder", data__root=str(root), data__val_fraction=0.25)


MANY = [(48, 64)] * 3 + [(64, 48)] * 2 + [(20, 40)] + [(16, 16)] * 4


# --- values of more than 8 bits


@pytest.mark.parametrize("name", ["i16.png", "i16.tif", "i16b.tif", "packed.tif", "i16.pgm", "f.tif", "i.tif"])
def test_deep_images__a_ramp_of_64_levels_arrives_as_64_levels(tmp_path, name):
    kind, path = name.partition(".")[0], tmp_path / name
    values = {"i16b": RAMP.astype(">u2"), "f": RAMP.astype(np.float32) / 65535, "i": RAMP.astype(np.int32)}
    saved(values.get(kind, RAMP), path, **({"compression": "tiff_lzw"} if kind == "packed" else {}))
    if name.endswith("tif"):
        assert Image.open(path).mode == {"i16b": "I;16B", "f": "F", "i": "I"}.get(kind, "I;16")
    seen = grey(path, (0, 65535) if kind == "i" else None)
    assert len(np.unique(seen)) == 64 and seen.mean() == 127.5
    assert np.array_equal(seen, np.rint(RAMP / 65535 * 255))


def test_deep_images__twelve_bits_of_a_tiff_are_scaled_by_what_they_hold(tmp_path):
    path = saved(RAMP >> 4, tmp_path / "a.tif")
    with Image.open(path) as image:
        image.tag_v2[258] = (12,)
        image.load()
        twelve = image.copy()
        twelve.tag_v2 = image.tag_v2
    assert np.asarray(to_rgb(twelve, None, "a")).max() == 255
    assert grey(path).max() == 16  # in 16 bits nothing says that they are 12
    assert len(np.unique(grey(path, (0, 4095)))) == 64


def test_deep_images__white_that_is_stored_as_zero_is_white(tmp_path):
    path = saved(RAMP, tmp_path / "a.tif", tiffinfo={262: 0})
    assert Image.open(path).tag_v2[262] == 0
    assert np.array_equal(grey(path), np.rint((65535 - RAMP.astype(int)) / 65535 * 255))


@pytest.mark.parametrize(
    ("values", "kind", "span"),
    [
        (np.array([[0, 70_000]], np.int32), "integers of more than 16 bits", "0 to 70000"),
        (np.array([[0, 9]], np.int32), "integers of more than 16 bits", "0 to 9"),
        (np.array([[0, 1.5]], np.float32), "floats outside", "0 to 1.5"),
        (np.array([[-0.1, 1]], np.float32), "floats outside", "-0.1 to 1"),
    ],
)
def test_deep_images__without_a_range_of_their_own_need_the_key(tmp_path, values, kind, span):
    path = saved(values, tmp_path / "images" / "a.tif")
    saved(np.zeros((1, 2, 3), np.uint8), tmp_path / "images" / "b.png")
    source = folder_source(tmp_path / "images")
    for on_broken in ("fail", "skip"):  # a rule of the data set, not a broken file that may be left out
        with pytest.raises(ValueError, match=f"^data.value_range must .*{kind}.* {span} in .*a.tif") as error:
            decoded(source, (1, 2), tmp_path / "cache", on_broken=on_broken)
        assert "\n" not in str(error.value)
    low, high = float(values.min()), float(values.max())
    assert grey(path, (low, high)).tolist() == [[0, 255]]


def test_value_range__is_one_for_all_images_and_cuts_off_what_lies_beyond(tmp_path):
    for i, top in enumerate([100, 4095, 60_000]):
        saved(np.array([[0, top]], np.uint16), tmp_path / f"{i}.png")
    seen = [grey(tmp_path / f"{i}.png", (0, 4095))[0, 1] for i in range(3)]
    assert seen == [round(100 / 4095 * 255), 255, 255]
    assert [grey(tmp_path / f"{i}.png")[0, 1] for i in range(3)] == [0, 16, 233]


def test_value_range__of_unsigned_32_bits_reaches_their_end(tmp_path):
    path = tmp_path / "a.tif"
    values = np.array([[0, 4_000_000_000]], np.uint32)
    saved(values.view(np.int32), path)  # Pillow writes a sign; the tag of the format, 339, is 2 for it and 1 without
    path.write_bytes(path.read_bytes().replace(struct.pack("<HHIH", 339, 3, 1, 2), struct.pack("<HHIH", 339, 3, 1, 1)))
    assert Image.open(path).tag_v2[339] == (1,)
    assert grey(path, (0, 4e9)).tolist() == [[0, 255]]


def test_value_range__is_refused_for_images_of_8_bits_and_where_it_is_none(tmp_path):
    experiment = folder_of(tmp_path, [(16, 16)] * 8)
    with pytest.raises(ConfigError, match="data.value_range must be left out for images of 8 bits.*RGB in .*0.png"):
        load_splits(experiment.override({"data.value_range": [0, 4095]}))
    with pytest.raises(ConfigError, match="data.value_range must be left out .* in digits/train/0"):
        load_splits(tiny(data__value_range=[0, 16]))
    for wrong in ([5, 5], [9, 1]):
        with pytest.raises(ConfigError, match="data.value_range must be low < high"):
            tiny(data__value_range=wrong)


def test_deep_images__that_use_a_small_part_of_their_type_are_told_of_in_a_line(tmp_path):
    for i in range(8):
        saved(RAMP >> 4, tmp_path / "ab"[i % 2] / f"{i}.png")
    experiment = tiny(data__name="imagefolder", data__root=str(tmp_path), data__image_size=8, data__val_fraction=0.25)
    for _ in ("fresh", "from the cache"):
        (line,) = load_splits(experiment).notes
        assert "greatest value of the train images is 6.3% of what their type holds" in line and "\n" not in line
        assert "data.value_range=[low, high]" in line
    assert load_splits(experiment.override({"data.value_range": [0, 4095]})).notes == ()
    saved(RAMP, tmp_path / "a" / "one.png")
    assert load_splits(experiment).notes == ()


def test_deep_images__that_are_not_finite_are_broken(tmp_path):
    saved(np.array([[0, np.nan]], np.float32), tmp_path / "a.tif")
    saved(np.array([[0, 1]], np.float32), tmp_path / "b.tif")
    found = decoded(folder_source(tmp_path), (1, 2), tmp_path / "cache", on_broken="skip")
    assert found.broken.tolist() == [0] and found.pixels[1, 0].tolist() == [[0, 255]]


# --- transparency


def transparent(mode):
    """Two pixels, the first clear over a hidden dark one, the second opaque and dark."""
    if mode == "P":
        image = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
        image.putpalette([10, 10, 10, 20, 20, 20] + [0] * 762)
        return image, {"transparency": 0}
    if mode in ("RGB", "L", "I;16"):
        values = {"RGB": [[[10] * 3, [20] * 3]], "L": [[10, 20]], "I;16": [[2570, 5140]]}[mode]
        clear = {"RGB": (10, 10, 10), "L": 10, "I;16": 2570}[mode]
        return Image.fromarray(np.array(values, np.uint16 if mode == "I;16" else np.uint8)), {"transparency": clear}
    return Image.fromarray(np.array([[[10, 10, 10, 0], [20, 20, 20, 255]]], np.uint8)).convert(mode), {}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "I;16"])
def test_transparency__shows_white_and_no_hidden_colour(tmp_path, mode):
    image, how = transparent(mode)
    assert grey(saved(image, tmp_path / "a.png", **how)).tolist() == [[255, 20]]


def test_transparency__half_of_it_is_half_white(tmp_path):
    pixels = np.array([[[0, 0, 0, 128]]], np.uint8)
    assert grey(saved(pixels, tmp_path / "a.png")).tolist() == [[127]]


# --- orientation


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "deep.tif", "deep.png", "packed.tif"])
def test_orientation__every_image_is_seen_as_it_is_displayed(tmp_path, orientation, name):
    stored = np.kron(np.arange(6).reshape(2, 3) * 40, np.ones((16, 16))).astype(np.uint8)
    how = {"a.jpg": {"quality": 100}, "a.webp": {"lossless": True}, "packed.tif": {"compression": "tiff_lzw"}}
    values = stored.astype(np.uint16) * 257 if "deep" in name else stored
    path = oriented(values, tmp_path / name, orientation, **how.get(name, {}))
    seen, expected = grey(path), TURNED[orientation](stored)
    assert upright_size(path) == seen.shape == expected.shape
    assert np.abs(seen - expected).max() <= 2


def test_orientation__damaged_exif_data_leave_the_pixels_as_they_are(tmp_path):
    path = saved(np.full((8, 9, 3), 70, np.uint8), tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0\0")
    assert open_rgb(path).size == (9, 8)


def coco_of(root, orientation, displayed_size=(48, 64)):
    """A white object that is displayed at the top left, stored turned, with its box in the displayed frame."""
    displayed = np.zeros((48, 64), np.uint8)
    displayed[4:20, 6:30] = 255
    inverse = {1: 1, 3: 3, 6: 8, 8: 6}[orientation]
    mask = (displayed > 0)[None]
    objects = [Objects((48, 64), np.array([[6, 4, 30, 20]], np.float32), np.array([0]), mask)] * 4
    for split in ("train", "val"):
        for i in range(4):
            stored = np.ascontiguousarray(TURNED[inverse](displayed))
            oriented(stored, root / f"{split}2017" / f"{i}.png", orientation)
        content = write_instances(objects, ["thing"], [f"{i}.png" for i in range(4)])
        for image in content["images"]:
            image["height"], image["width"] = displayed_size
        if displayed_size != (48, 64):  # a mask would tell it first
            for annotation in content["annotations"]:
                annotation["segmentation"] = [[6, 4, 30, 4, 30, 20, 6, 20]]
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return load("datasets", "coco")(str(root)).split("train")


def mean_in_box(pixels, objects):
    left, top, right, bottom = objects.boxes[0].astype(int)
    return pixels[:, top:bottom, left:right].mean()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation__a_box_covers_the_object_as_it_is_displayed(tmp_path, orientation):
    source = coco_of(tmp_path, orientation)
    pixels = decoded(source, (48, 64), tmp_path / "cache").pixels[0]
    assert mean_in_box(pixels, source.objects(0)) == 255 and pixels[:, source.objects(0).masks[0]].mean() == 255
    assert pixels.mean() == pytest.approx(255 * 16 * 24 / (48 * 64))


def test_orientation__annotations_of_the_stored_frame_are_refused_where_their_size_tells(tmp_path):
    source = coco_of(tmp_path, 6, displayed_size=(64, 48))
    with pytest.raises(ValueError, match=r"4 of 4 images .*must tell its size, \(64, 48\), got \(48, 64\)"):
        decoded(source, (48, 64), tmp_path / "cache")


def label_maps(root, orientation, shape):
    displayed = np.zeros((48, 64), np.uint8)
    displayed[:24] = 255
    for split in ("training", "validation"):
        for i in range(3):
            stored = np.ascontiguousarray(TURNED[{1: 1, 3: 3, 6: 8}[orientation]](displayed))
            oriented(stored, root / "images" / split / f"{i}.jpg", orientation, quality=100)
            classes = np.ones(shape, np.uint8)
            classes[: shape[0] // 2] = 2
            saved(classes, root / "annotations" / split / f"{i}.png")
    (root / "classes.txt").write_text("dark\nlight\n")
    return load("datasets", "labelmaps")(str(root)).split("train")


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_label_maps__are_of_the_image_as_it_is_displayed(tmp_path, orientation):
    source = label_maps(tmp_path, orientation, (48, 64))
    check_labelmaps(source)
    pixels = decoded(source, (48, 64), tmp_path / "cache").pixels[0, 0]
    assert pixels[source.labelmap(0) == 1].mean() > 250 and pixels[source.labelmap(0) == 0].mean() < 5


@pytest.mark.parametrize(("orientation", "shape"), [(1, (10, 90)), (1, (64, 48)), (6, (64, 48))])
def test_label_maps__of_another_shape_than_their_image_are_refused_with_both_files(tmp_path, orientation, shape):
    source = label_maps(tmp_path, orientation, shape)
    sizes = f"got {shape[0]} x {shape[1]} in .*annotations/training/0.png for 48 x 64 in .*images/training/0.jpg"
    with pytest.raises(ValueError, match=f"must have the rows and columns of its image as displayed, {sizes}"):
        check_labelmaps(source)


def test_tiny_imagenet__an_image_of_another_size_than_its_boxes_are_drawn_on_is_refused(tmp_path):
    dataset_files.tiny_imagenet(tmp_path)
    source = load("datasets", "tiny_imagenet")(str(tmp_path)).split("train")
    saved(np.zeros((64, 32, 3), np.uint8), tmp_path / source.name(1))
    source = load("datasets", "tiny_imagenet")(str(tmp_path)).split("train")
    with pytest.raises(ValueError, match="1 of 6 images .*must have 64 x 64 pixels, got 64 x 32"):
        decoded(source, (64, 64), tmp_path / "cache")


# --- shapes


def test_shapes__pretraining_says_in_a_line_that_it_squashes_and_how_much(tmp_path):
    experiment = folder_of(tmp_path / "data", MANY).override(
        {"eval.protocols": [], "ray.storage_path": str(tmp_path / "runs")}
    )
    out = io.StringIO()
    check_inputs(experiment, Console(file=out, width=80))
    told = "6 of 10 train images squashed to 16 x 16, by 1.33 at the median and 2.00 at the most; data.on_aspect=crop"
    assert [told in line for line in out.getvalue().splitlines()].count(True) == 1
    for key in ("squash", "crop"):
        lines = load_splits(experiment.override({"data.on_aspect": key})).notes
        assert not any("squashed" in line for line in lines)
    assert load_splits(folder_of(tmp_path / "square", [(20, 20)] * 8)).notes == ()


@pytest.mark.parametrize("name", ["mae-linear-90", "mae-linear-fast-1", "mae-finetune-100", "simmim-finetune-100"])
def test_shapes__protocols_named_after_published_ones_refuse_squashed_images(tmp_path, name):
    experiment = folder_of(tmp_path / "data", MANY).override(
        {"ray.storage_path": str(tmp_path / "runs"), "eval.protocols": [name], "eval.options": {name: {"epochs": 20}}}
    )
    out = Console(file=io.StringIO(), width=200)
    rule = f"images must keep their shape for {name}, as published, got 6 of 10 train images .*set data.on_aspect=crop"
    with pytest.raises(ConfigError, match=rule) as error:
        check_inputs(experiment, out)
    assert "\n" not in str(error.value)
    others = {"eval.protocols": ["knn", "linear-fast-1", "finetune-small-1"], "eval.options": {"knn": {"k": 3}}}
    for asked in ({"data.on_aspect": "crop"}, {"data.on_aspect": "squash"}, others):
        check_inputs(experiment.override(asked), out)


def test_shapes__every_preset_named_after_a_recipe_is_among_those_that_refuse():
    named = {name for name, kept in presets().items() if name.startswith(("mae-", "simmim-"))}
    assert named == {name for name, kept in presets().items() if name in getattr(kept, "published", ())}
    assert all(protocol_name(kept, kept.presets) == name for name, kept in presets().items())


def test_shapes__a_squashed_test_split_is_refused_as_well(tmp_path):
    experiment = folder_of(tmp_path, [(16, 16)] * 8).override({"eval.protocols": ["mae-linear-90"]})
    saved(np.zeros((16, 40, 3), np.uint8), tmp_path / "test" / "a" / "wide.png")
    assert load_splits(experiment).task.squashed.startswith("1 of 9 test images squashed to 16 x 16, by 2.50")


def test_shapes__fail_names_the_first_file(tmp_path):
    experiment = folder_of(tmp_path, [(16, 16), (20, 20), (16, 16), (16, 24)])
    with pytest.raises(ConfigError, match="data.on_aspect is fail, got 1 of 4 train images .*first: .*train/b/3.png"):
        load_splits(experiment.override({"data.on_aspect": "fail"}))
    load_splits(folder_of(tmp_path / "square", [(16, 16)] * 8).override({"data.on_aspect": "fail"}))


@pytest.mark.parametrize(("shape", "size"), [((60, 100), (30, 30)), ((100, 60), (30, 30)), ((40, 84), (20, 30))])
def test_crop__is_the_short_side_resized_and_the_centre_cut(tmp_path, shape, size, generator):
    noise = torch.randint(0, 256, (1, 3, 7, 9), generator=generator).float()
    smooth = torch.nn.functional.interpolate(noise, shape, mode="bicubic").clamp(0, 255).byte()[0].permute(1, 2, 0)
    saved(image := Image.fromarray(smooth.numpy()), tmp_path / "images" / "a.png")
    source, cache = folder_source(tmp_path / "images"), tmp_path / "cache"
    resized = torchvision.transforms.functional.resize(image, min(size), Image.Resampling.BICUBIC)
    expected = np.asarray(torchvision.transforms.functional.center_crop(resized, size)).transpose(2, 0, 1).astype(int)
    assert np.abs(decoded(source, size, cache, crop=True).pixels[0] - expected).max() <= 1
    assert np.abs(decoded(source, size, cache).pixels[0] - expected).mean() > 4


def test_crop__boxes_masks_and_label_maps_are_cut_with_the_pixels(tmp_path):
    coco_of(tmp_path, 1)
    experiment = tiny(
        data__name="coco", data__root=str(tmp_path), data__on_aspect="crop", data__image_size=48, eval__protocols=[]
    )
    splits = load_splits(experiment)
    objects, pixels = splits.pretrain.source.objects(0), splits.images.pixels_nCYX[0].numpy()
    assert objects.size == (48, 48) and objects.boxes.tolist() == [[0, 4, 22, 20]]
    assert mean_in_box(pixels, objects) == 255 and pixels[:, objects.masks[0]].mean() == 255
    assert pixels.mean() == pytest.approx(255 * 16 * 22 / 48**2)
    label_maps(tmp_path / "maps", 3, (48, 64))
    source = load_splits(experiment.override({"data.name": "labelmaps", "data.root": str(tmp_path / "maps")})).pretrain
    assert source.source.labelmap(0).shape == (48, 48)
    light = source.images.pixels_nCYX[0, 0].numpy()[source.source.labelmap(0) == 1]
    assert light.mean() > 250 and light.size == 24 * 48


def test_crop__objects_that_are_cut_away_are_no_objects():
    masks = np.zeros((3, 10, 30), bool)
    masks[0, 2:5, 0:4], masks[1, 2:5, 8:14], masks[2, 2:9, 18:26] = True, True, True
    boxes = np.array([[0, 2, 4, 5], [8, 2, 14, 5], [18, 2, 26, 9]], np.float32)
    found = cut_objects(Objects((10, 30), boxes, np.array([5, 6, 7]), masks, np.array([True, False, True])), (8, 8))
    assert found.size == (10, 10) and found.boxes.tolist() == [[0, 2, 4, 5], [8, 2, 10, 9]]
    assert found.labels.tolist() == [6, 7] and found.crowd.tolist() == [False, True]
    assert found.masks.sum((1, 2)).tolist() == [12, 14]


def test_crop__needs_a_stored_shape_that_is_the_inputs():
    assert tiny(data__on_aspect="crop", data__store_px=20).data.stored == (20, 20)
    with pytest.raises(ConfigError, match="data.store_px must have the aspect of data.image_size"):
        tiny(data__on_aspect="crop", data__store_px=[16, 24])


def test_crop__a_window_is_the_largest_of_its_aspect():
    assert window((60, 100), (8, 8)) == (20, 0, 80, 60) and window((100, 60), (8, 8)) == (0, 20, 60, 80)
    assert window((60, 100), (8, 16)) == (0, 5, 100, 55) and window((7, 7), (8, 8)) == (0, 0, 7, 7)
    assert window((1, 500), (8, 8)) == (249, 0, 250, 1)


def test_shapes__a_pixel_more_on_a_long_side_is_no_other_shape():
    found = other_shapes({(500, 500): (3, 0), (500, 501): (2, 4), (500, 750): (1, 3), (300, 100): (2, 7)}, (224, 224))
    assert found == (3, 8, 3, 3.0, 3.0) and other_shapes({(8, 8): (4, 0)}, (16, 16)).number == 0
    assert other_shapes({(8, 16): (4, 0)}, (16, 32)).number == 0


# --- what was decoded under other rules is not taken


def test_decoded__what_changes_pixels_changes_the_copy(tmp_path, monkeypatch):
    saved(np.tile(RAMP, (1, 2)), tmp_path / "images" / "a.png")
    source, cache = folder_source(tmp_path / "images"), tmp_path / "cache"
    seen = [
        decoded(source, (8, 8), cache, **how).pixels.tobytes()
        for how in ({}, {"crop": True}, {"value_range": (0, 4095)}, {"crop": True, "value_range": (0, 4095)})
    ]
    assert len(set(seen)) == 4 == len(list(cache.glob("*.npy")))
    monkeypatch.setattr("amt_ray.core.decoded.RULES", 99)
    decoded(source, (8, 8), cache)
    assert len(list(cache.glob("*.npy"))) == 5


def test_results__say_how_images_were_read(tmp_path):
    experiment = folder_of(tmp_path, MANY).override({"data.on_aspect": "crop"})
    told = about_data(experiment, load_splits(experiment).task, test=True)
    assert told["on_aspect"] == "crop" and told["value_range"] is None


def test_plug_ins__images_of_another_mode_are_not_clipped(tmp_path):
    saved(RAMP, tmp_path / "images" / "a.png")
    source = dataclasses.replace(folder_source(tmp_path / "images"), open=lambda i: Image.fromarray(RAMP))
    pixels = decoded(source, (8, 8), tmp_path / "cache").pixels[0, 0]
    assert pixels.mean() == 127.5 and len(np.unique(pixels)) == 64
