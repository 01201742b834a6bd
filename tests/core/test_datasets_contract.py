"""Every data set, found by its file; those that download are given a folder of images."""

import inspect
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from amt_ray import plugins
from amt_ray.core.datasets.imagefolder import EXTENSIONS


@pytest.fixture
def folder(tmp_path):
    for n, path in enumerate(["train/b/0.png", "train/a/1.png", "train/a/deep/2.PNG", "test/a/3.jpg", "test/b/4.png"]):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5), (n, 0, 0)).save(tmp_path / path)
    (tmp_path / "train/a/notes.txt").write_text("no image")
    return tmp_path


@pytest.fixture(params=plugins.names("datasets"))
def dataset(request, folder):
    return lambda: plugins.load("datasets", request.param)(str(folder))


@pytest.mark.parametrize("split", ["train", "test"])
def test_dataset__a_split_keeps_the_contract(dataset, split):
    source = dataset().split(split)
    assert source.count > 0 and source.labels.dtype == np.int64 and source.labels.shape == (source.count,)
    assert source.labels.min() >= 0 and source.labels.max() < len(source.classes) == len(set(source.classes))
    for i in (0, source.count - 1):
        with source.open(i) as image:
            assert image.convert("RGB").size[0] > 0
        assert isinstance(source.name(i), str)
    assert len({source.name(i) for i in range(source.count)}) == source.count
    assert len(dataset().mean) == len(dataset().std) == 3 and all(0 < v < 1 for v in dataset().mean + dataset().std)


def test_dataset__a_fingerprint_is_stable_and_of_its_split(dataset):
    assert dataset().split("train").fingerprint == dataset().split("train").fingerprint
    assert dataset().split("train").fingerprint != dataset().split("test").fingerprint


def test_dataset__an_unknown_split_is_a_key_error(dataset):
    with pytest.raises(KeyError):
        dataset().split("dream")


@pytest.mark.parametrize("name", plugins.names("datasets"))
def test_dataset__a_missing_root_is_one_line(name, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no network in a test")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", offline)
    if "Not used" in inspect.getdoc(plugins.load("datasets", name)):
        pytest.skip("has no root")
    with pytest.raises(ValueError, match="data.root must .*nowhere") as error:
        plugins.load("datasets", name)(str(tmp_path / "nowhere")).split("train")
    assert "\n" not in str(error.value)


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


def test_cifar10__a_folder_without_a_test_part_has_no_test_split(folder):
    for path in sorted((folder / "test").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (folder / "test").rmdir()
    cifar = plugins.load("datasets", "cifar10")(str(folder))
    assert cifar.split("train").count == 3
    with pytest.raises(KeyError):
        cifar.split("test")
