"""Every data set, found by its file; those that need files are given tiny ones in the real layout."""

import os
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from amt_ray import plugins
from amt_ray.core.datasets import UNKNOWN
from amt_ray.core.datasets.imagefolder import EXTENSIONS
from tests.core import dataset_files

NEED_FILES = [name for name in plugins.names("datasets") if hasattr(dataset_files, name)]


@pytest.fixture(autouse=True)
def _offline_and_without_checksums(monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no network in a test")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    for module in ("cifar", "mnist", "stl10"):
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: Path(path).exists()
        )


@pytest.fixture
def folder(tmp_path):
    dataset_files.imagefolder(tmp_path)
    return tmp_path


@pytest.fixture(params=plugins.names("datasets"))
def dataset(request, tmp_path):
    if request.param in NEED_FILES:
        getattr(dataset_files, request.param)(tmp_path)
        return plugins.load("datasets", request.param)(str(tmp_path))
    return plugins.load("datasets", request.param)(None)


def splits_of(dataset):
    return {name: dataset.split(name) for name in {"train", "test", getattr(dataset, "pretrain_split", "train")}}


def test_dataset__a_split_keeps_the_contract(dataset):
    assert len(dataset.mean) == len(dataset.std) == 3 and all(0 < v < 1 for v in dataset.mean + dataset.std)
    for source in splits_of(dataset).values():
        assert source.count > 0
        names = [source.name(i) for i in range(source.count)]
        assert all(isinstance(name, str) for name in names) and len(set(names)) == source.count
        for i in {0, source.count // 2, source.count - 1}:
            first, second = source.open(i), source.open(i)
            assert isinstance(first, Image.Image) and first.mode == "RGB" and min(first.size) > 0
            assert np.array_equal(np.asarray(first), np.asarray(second))
        assert not np.array_equal(np.asarray(source.open(0)), np.asarray(source.open(1)))


def test_dataset__labels_are_indices_of_classes_the_same_for_all_splits(dataset):
    splits = splits_of(dataset)
    for name, source in splits.items():
        if name not in ("train", "test"):
            assert source.labels is None
        if source.labels is None:
            assert source.classes == () and (name not in ("train", "test") or source.objects or source.labelmap)
            continue
        assert source.labels.dtype == np.int64 and source.labels.shape == (source.count,)
        assert source.labels.min() >= 0 and source.labels.max() < len(source.classes) == len(set(source.classes))
        assert source.classes == splits["train"].classes and all(isinstance(c, str) for c in source.classes)


def test_dataset__objects_lie_in_the_image_and_boxes_are_tight_around_masks(dataset):
    for source in splits_of(dataset).values():
        if source.objects is None:
            assert source.object_classes == ()
            continue
        for i in range(min(source.count, 50)):
            found, image = source.objects(i), source.open(i)
            assert found.size == image.size[::-1] and found.boxes.dtype == np.float32
            k = len(found.labels)
            assert found.boxes.shape == (k, 4) and found.labels.dtype == np.int64 and found.labels.shape == (k,)
            assert all(0 <= label < len(source.object_classes) for label in found.labels)
            for left, top, right, bottom in found.boxes:
                assert 0 <= left < right <= image.size[0] and 0 <= top < bottom <= image.size[1]
            if found.masks is not None:
                assert found.masks.shape == (k, *found.size) and found.masks.dtype == bool
                for mask, box in zip(found.masks, found.boxes):
                    y, x = np.nonzero(mask)
                    assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_dataset__label_maps_hold_indices_of_classes_the_same_for_all_splits_or_unknown(dataset):
    splits = splits_of(dataset)
    for source in splits.values():
        if source.labelmap is None:
            assert source.labelmap_classes == ()
            continue
        assert source.labelmap_classes == splits["train"].labelmap_classes
        for i in range(min(source.count, 20)):
            found = source.labelmap(i)
            assert found.dtype == np.uint8 and found.shape == source.open(i).size[::-1]
            assert found[found != UNKNOWN].max(initial=0) < len(source.labelmap_classes)


def test_dataset__a_fingerprint_is_stable_and_of_its_split(dataset):
    splits = splits_of(dataset)
    assert len({source.fingerprint for source in splits.values()}) == len(splits)
    assert all(dataset.split(name).fingerprint == source.fingerprint for name, source in splits.items())


@pytest.mark.parametrize("name", NEED_FILES)
def test_dataset__a_fingerprint_changes_with_the_files(name, tmp_path):
    build, load = getattr(dataset_files, name), plugins.load("datasets", name)
    build(tmp_path)
    before = splits_of(load(str(tmp_path)))
    before = {split: (source.fingerprint, np.asarray(source.open(0))) for split, source in before.items()}
    build(tmp_path, seed=1)
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime + 1))  # builds within one tick of the clock
    for split, source in splits_of(load(str(tmp_path))).items():
        assert not np.array_equal(np.asarray(source.open(0)), before[split][1])
        assert source.fingerprint != before[split][0]


@pytest.mark.parametrize("name", NEED_FILES)
def test_dataset__a_fingerprint_changes_with_any_file_that_tells_what_images_show(name, tmp_path):
    """Not with lists of names: a change of classes is told by their names."""
    build, load = getattr(dataset_files, name), plugins.load("datasets", name)
    build(tmp_path)
    names = {"wnids.txt", "words.txt", "class_names.txt", "classes.txt", "notes.txt"}
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        before = {source.fingerprint for source in splits_of(load(str(tmp_path))).values()}
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime + 1))
        after = {source.fingerprint for source in splits_of(load(str(tmp_path))).values()}
        assert (after == before) == (path.name in names), path


def test_dataset__an_unknown_split_is_a_key_error(dataset):
    with pytest.raises(KeyError):
        dataset.split("dream")


COMMANDS = {
    "cifar10": "python -c \"import torchvision; torchvision.datasets.CIFAR10('ROOT', download=True)\"",
    "cifar100": "python -c \"import torchvision; torchvision.datasets.CIFAR100('ROOT', download=True)\"",
    "fashion_mnist": "python -c \"import torchvision; torchvision.datasets.FashionMNIST('ROOT', download=True)\"",
    "stl10": "python -c \"import torchvision; torchvision.datasets.STL10('ROOT', download=True)\"",
    "tiny_imagenet": "curl -O http://cs231n.stanford.edu/tiny-imagenet-200.zip && unzip tiny-imagenet-200.zip -d ROOT",
    "imagenet": "python -c \"from torchvision.datasets import ImageNet; ImageNet('ROOT', 'train')\"",
}


@pytest.mark.parametrize("name", NEED_FILES)
def test_dataset__missing_data_is_one_line_with_the_place_and_the_command(name, tmp_path):
    root = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="^data.root must .* got .*nowhere") as error:
        plugins.load("datasets", name)(root).split("train")
    message = str(error.value)
    assert "\n" not in message
    if name in COMMANDS:
        assert message.partition(" (looked for ")[2].startswith(root)
        assert message.endswith(COMMANDS[name].replace("ROOT", root))


def test_digits__splits_are_disjoint_parts_of_scikit_learns_with_their_mean_and_deviation():
    from sklearn.datasets import load_digits

    digits, data = plugins.load("datasets", "digits")(), load_digits()
    parts = {name: digits.split(name) for name in ("train", "test")}
    assert {name: part.count for name, part in parts.items()} == {"train": 1438, "test": 359}
    places = {"train": [i for i in range(1797) if i % 5 != 4], "test": list(range(4, 1797, 5))}
    for name, part in parts.items():
        assert part.classes == tuple("0123456789") and np.array_equal(part.labels, data.target[places[name]])
        for i in (0, 100, part.count - 1):
            grey = np.asarray(part.open(i).convert("L")) * (16 / 255)
            assert np.abs(grey - data.images[places[name][i]]).max() < 0.04
    shades = data.images[places["train"]] / 16
    assert digits.mean == pytest.approx([shades.mean()] * 3, abs=1e-3)
    assert digits.std == pytest.approx([shades.std()] * 3, abs=1e-3)


def test_imagefolder__the_first_folder_names_the_class_and_other_files_are_no_images(folder):
    source = plugins.load("datasets", "imagefolder")(str(folder)).split("train")
    assert source.classes == ("a", "b") and source.labels.tolist() == [0, 0, 1]
    assert [source.name(i).rpartition("/")[2] for i in range(3)] == ["1.png", "2.PNG", "0.png"]


def test_imagefolder__without_a_train_folder_all_is_train_and_nothing_is_test(folder):
    bare = plugins.load("datasets", "imagefolder")(str(folder / "train"))
    assert bare.split("train").classes == ("a", "b")
    with pytest.raises(KeyError):
        bare.split("test")


@pytest.mark.parametrize("name", ["val", "validation"])
def test_imagefolder__a_validation_folder_is_the_test_split(folder, name):
    (folder / "test").rename(folder / name)
    assert plugins.load("datasets", "imagefolder")(str(folder)).split("test").count == 2


def test_imagefolder__a_folder_without_images_says_what_it_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"must hold images .*, found none below ") as error:
        plugins.load("datasets", "imagefolder")(str(tmp_path)).split("train")
    assert all(e in str(error.value) for e in EXTENSIONS)
