"""How folders of images are understood: https://docs.pytorch.org/vision/stable/generated/torchvision.datasets.ImageFolder.html

Folders that are not classes become classes there too: https://github.com/pytorch/vision/issues/1529 (hidden folders).
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from amt_ray import plugins
from amt_ray.config import ConfigError
from amt_ray.core.evals.knn import KNN
from amt_ray.core.folders import EXTENSIONS, images_below
from amt_ray.core.ports import Solo
from amt_ray.core.probing import measured
from amt_ray.estimate import estimate, training_images
from amt_ray.runtime.preflight import check_inputs
from amt_ray.runtime.splits import load_splits
from tests.core.dataset_files import save
from tests.core.probes import tiny_encoder
from tests.tiny import tiny

CLASSES = ("cat", "dog")


def put(root, folder, count=4, classes=CLASSES, ending="png"):
    """Images of a split, ``count`` in each class; without classes they lie flat."""
    for c, name in enumerate(classes or ("",)):
        for k in range(count):
            save(root / folder / name / f"{name}{k}.{ending}", (sum(map(ord, folder)), c, k), (8, 8))


def folder(root, name="imagefolder"):
    return plugins.load("datasets", name)(str(root))


def experiment(root, **more):
    return tiny(data__name="imagefolder", data__root=str(root), data__val_fraction=0.25, **more)


@pytest.mark.parametrize("name", ["imagefolder", "cifar10"])
@pytest.mark.parametrize("train", ["train", "Training", "TRAIN"])
@pytest.mark.parametrize("test", ["Testing", "Val", "valid", "Validation", "TEST"])
def test_splits__are_known_by_their_usual_names_in_any_case(tmp_path, name, train, test):
    put(tmp_path, train)
    put(tmp_path, test, 2)
    data = folder(tmp_path, name)
    for split, count in (("train", 8), ("test", 4)):
        assert data.split(split).classes == CLASSES and data.split(split).count == count
    with pytest.raises(KeyError):
        data.split("val")


def test_splits__of_val_and_test_val_chooses_and_test_is_tested_on(tmp_path):
    put(tmp_path, "Train", 10)
    put(tmp_path, "Val", 3)
    put(tmp_path, "Test", 2)
    splits = load_splits(experiment(tmp_path, eval__options={"knn": {"k": 3}}))
    assert len(splits.index) == len(splits.task.train_index) == 20 and not len(splits.held_out)
    of_val, of_test = measured(splits.task, True)
    assert (of_val.prefix, of_val.images is splits.task.val, len(of_val.index_n)) == ("eval", True, 6)
    assert (of_test.prefix, of_test.images is splits.task.test, len(of_test.index_n)) == ("test", True, 4)
    assert splits.task.source_of(of_val.images).name(0).startswith(str(tmp_path / "Val"))
    assert training_images(experiment(tmp_path)) == 20
    assert "Val is measured as eval/" in splits.lines()[1] and "Test is measured as test/" in splits.lines()[1]


def test_splits__the_val_images_are_those_that_a_probe_measures(tmp_path):
    """Val has the train images themselves: their own nearest neighbours, all right; held-out ones would not be."""
    put(tmp_path, "train", 10)
    for split in ("val", "test"):
        for source in sorted((tmp_path / "train").rglob("*.png")):
            other = tmp_path / split / source.parent.name / source.name
            other.parent.mkdir(parents=True, exist_ok=True)
            other.write_bytes(source.read_bytes())
    task = load_splits(experiment(tmp_path, data__image_size=8, model__patch_size=4)).task
    assert KNN(k=(1,))(tiny_encoder(), task, Solo()) == {"eval/knn_top1": 1.0}


@pytest.mark.parametrize("flat", [True, False])
def test_splits__a_flat_or_empty_test_hides_no_labelled_val(tmp_path, flat):
    put(tmp_path, "train", 10)
    put(tmp_path, "val", 3)
    (tmp_path / "test").mkdir()
    if flat:
        put(tmp_path, "test", 5, ())
    splits = load_splits(experiment(tmp_path))
    assert len(splits.task.test) == 6 and splits.task.val is None and len(splits.held_out) == 5
    said = "\n".join(splits.lines())
    assert "val is measured as test/" in said and "0.25 of train is held out, measured as eval/" in said
    assert ("test is not used: its images lie flat" if flat else "test is not used: it has no images") in said


@pytest.mark.parametrize(("layout", "message"), [
    (("train", "Training"), "one folder for train, got Training and train"),
    (("train", "val", "validation"), "one folder for val, got val and validation"),
    (("val", "test"), "must have a folder train or training .* got only val, test"),
    (("cat", "dog", "Test"), "must have a folder train or training .* got only Test"),
])  # fmt: skip
def test_splits__that_can_be_read_in_two_ways_are_refused(tmp_path, layout, message):
    for name in layout:
        put(tmp_path, name, 1)
    with pytest.raises(ConfigError, match=message):
        load_splits(experiment(tmp_path))


@pytest.mark.parametrize(("split", "classes", "message"), [
    ("val", ("cat", "dog", "hen"), r"train and test must have the same classes, got 2 and 3 \(hen only in test\)"),
    ("test", ("cat",), r"train and test must have the same classes, got 2 and 1 \(dog only in train\)"),
    ("test", ("Cat", "dog"), r"got 2 and 2 \(cat only in train, Cat only in test\)"),
])  # fmt: skip
def test_splits__a_class_of_one_split_alone_is_named(tmp_path, split, classes, message):
    put(tmp_path, "train")
    put(tmp_path, split, 2, classes)
    with pytest.raises(ConfigError, match=message):
        load_splits(experiment(tmp_path))


def test_splits__val_beside_test_must_have_trains_classes_too(tmp_path):
    put(tmp_path, "train")
    put(tmp_path, "val", 2, ("cat", "hen"))
    put(tmp_path, "test", 2)
    with pytest.raises(ConfigError, match=r"train and val must have the same classes, .*hen only in val"):
        load_splits(experiment(tmp_path))


def test_imagenet__a_flat_test_is_left_alone_and_a_labelled_one_makes_val_its_own(tmp_path):
    for split in ("train", "val"):
        put(tmp_path, split, 2)
    put(tmp_path, "test", 2, ())
    assert folder(tmp_path, "imagenet").split("test").name(0).startswith(str(tmp_path / "val"))
    put(tmp_path, "test", 1)
    for file in (tmp_path / "test").glob("*.png"):
        file.unlink()
    data = folder(tmp_path, "imagenet")
    assert data.split("val").count == 4 and data.split("test").count == 2


def test_label_maps__of_three_splits_are_three_and_folders_go_by_any_usual_name(tmp_path):
    for split, count in (("Train", 4), ("val", 2), ("testing", 3)):
        put(tmp_path / "images", split, count, ())
        for file in (tmp_path / "images" / split).iterdir():
            path = tmp_path / "annotations" / split / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.ones((8, 8), np.uint8)).save(path)
    (tmp_path / "classes.txt").write_text("wall\n")
    data = folder(tmp_path, "labelmaps")
    assert [data.split(split).count for split in ("train", "val", "test")] == [4, 2, 3]
    (tmp_path / "annotations" / "testing").rename(tmp_path / "annotations" / "other")
    data = folder(tmp_path, "labelmaps")
    assert data.split("test").count == 2 and "images/testing is not used" in data.split("train").notes[0]


def test_hidden__folders_and_files_are_no_classes_and_no_images(tmp_path):
    put(tmp_path, "train", 3, ("cat", ".ipynb_checkpoints", "__MACOSX", ".thumbnails"))
    put(tmp_path, "train", 1, ("dog",))
    (tmp_path / "train" / "dog" / "._dog0.png").write_bytes(b"\0\5\26\7")
    (tmp_path / "__MACOSX" / "train").mkdir(parents=True)
    source = folder(tmp_path).split("train")
    assert source.classes == CLASSES and source.count == 4
    assert "skipped below" in source.notes[0] and "4 hidden (" in source.notes[0] and "._dog0.png" in source.notes[0]


@pytest.mark.parametrize("target", ["..", "../..", ".", "../../.."])
def test_links__that_lead_back_are_not_walked(tmp_path, target):
    root = tmp_path / "photos"
    put(root, "train", 20)
    (root / "train" / "cat" / "loop").symlink_to(target)
    (root / "train" / "cat" / "itself").symlink_to("itself")
    source = folder(root).split("train")
    assert source.count == 40 and np.bincount(source.labels).tolist() == [20, 20]
    assert "1 link that leads back (cat/loop)" in source.notes[0]


def test_links__to_images_and_folders_elsewhere_are_followed_and_a_file_counts_once_a_class(tmp_path):
    put(tmp_path, "store", 3)
    root = tmp_path / "photos"
    for name in CLASSES:
        (root / "train").mkdir(parents=True, exist_ok=True)
        (root / "train" / name).symlink_to(tmp_path / "store" / name)
    assert folder(root).split("train").count == 6
    put(root, "train2/", 1, ("cat",))
    own = root / "train2" / "cat"
    (own / "again.png").symlink_to(own / "cat0.png")
    (own / "more").symlink_to(tmp_path / "store" / "cat")
    (own / "more_again").symlink_to(tmp_path / "store" / "cat")
    (own / "one_more.png").symlink_to(tmp_path / "store" / "cat" / "cat1.png")
    (own / "gone.png").symlink_to(tmp_path / "nowhere.png")
    below = images_below(root / "train2")
    assert below.files == [f"cat/{name}" for name in ("cat0.png", "gone.png", *(f"more/cat{k}.png" for k in range(3)))]
    assert below.skipped.again == 3


def test_listing__is_that_of_every_file_found_by_name_without_links(tmp_path):
    put(tmp_path, "train", 3, ("cat", "dog/deep/er", "hen"))
    (tmp_path / "train" / "hen" / "notes.txt").write_text("no image")
    found = []
    for here, _, files in os.walk(tmp_path / "train"):
        found += [os.path.relpath(os.path.join(here, f), tmp_path / "train") for f in files if f.endswith(".png")]
    assert images_below(tmp_path / "train").files == sorted(found)


@pytest.mark.parametrize("ending", ["pgm", "gif", "PGM", "jpe", "pbm", "tif", "webp", "jp2"])
def test_endings__that_pil_reads_and_people_have_are_images(tmp_path, ending):
    for k in range(2):
        path = tmp_path / "train" / "cat" / f"{k}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = {"pbm": "1", "pgm": "L"}.get(ending.lower(), "RGB")
        Image.new(mode, (8, 8), 255 if mode != "RGB" else (200, 10, 10)).save(path)
    source = folder(tmp_path).split("train")
    assert source.count == 2 and np.asarray(source.open(0)).max() > 150
    Image.init()
    assert {e for e in EXTENSIONS if e != ".avif"} <= {*Image.registered_extensions()}


def test_understood__is_said_at_the_start_and_by_validate(tmp_path):
    root = tmp_path / "photos"
    put(root, "Training", 8, ("bird", "cat", "dog", "hen"))
    put(root, "valid", 2, ("bird", "cat", "dog", "hen"))
    put(root, "extra", 2)
    (root / "Training" / "cat" / "cat.xml").write_text("a box")
    (root / "Training" / "cow").mkdir()
    asked = experiment(root, ray__storage_path=str(tmp_path / "runs"))
    console = Console(record=True, width=400)
    check_inputs(asked, console)
    said = console.export_text()
    expected = [
        "Images: imagefolder, 24 to train on, 8 held out, 8 test, 4 classes (bird, cat, dog, ...)",
        "Splits: Training is trained on; 0.25 of Training is held out, measured as eval/; valid is measured as test/",
        "1 file that is no image (.xml), 1 folder without images (cow)",
        "not used: folders extra, beside Training, valid",
    ]
    for line in expected:
        assert line in said
    told = str(estimate(asked, lambda work: 1.0, "made up"))
    assert all(line in told for line in expected)


def test_validate__prints_what_it_understands_of_the_folder(tmp_path):
    put(tmp_path / "photos", "Train", 3)
    near = {"knn": {"k": [1]}}
    (tmp_path / "one.yaml").write_text(experiment(tmp_path / "photos", eval__options=near).to_yaml())
    command = [sys.executable, "-m", "amt_ray.cli", "validate", str(tmp_path / "one.yaml"), "--tflops", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "# Splits: Train is trained on; 0.25 of Train is held out, measured as eval/; there is no test split" in (
        done.stdout
    )


def test_unlabelled__folders_of_splits_are_still_pretrained_on(tmp_path):
    put(tmp_path, "Train", 12, ())
    put(tmp_path, "Val", 4, ())
    splits = load_splits(experiment(tmp_path, eval__protocols=[]))
    assert len(splits.index) == 9 and splits.task is None and torch.equal(splits.shown, splits.held_out)
