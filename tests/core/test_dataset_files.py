"""What the data sets read from their files, against torchvision's reading or the layout's own words."""

import builtins
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from amt_ray import plugins
from tests.core import dataset_files


@pytest.fixture(autouse=True)
def _without_checksums(monkeypatch):
    for module in ("cifar", "mnist", "stl10"):
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: Path(path).exists()
        )


def made(name, root, seed=0):
    getattr(dataset_files, name)(root, seed)
    return plugins.load("datasets", name)(str(root))


def same_images(source, reference):
    assert source.count == len(reference)
    return all(
        np.array_equal(np.asarray(source.open(i)), np.asarray(reference[i][0].convert("RGB")))
        for i in range(source.count)
    )


@pytest.mark.parametrize(
    ("name", "title"), [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100"), ("fashion_mnist", "FashionMNIST")]
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_torchvisions_sets__are_read_as_torchvision_reads_them(name, title, split, tmp_path):
    source = made(name, tmp_path).split(split)
    reference = getattr(torchvision.datasets, title)(tmp_path, train=split == "train")
    assert same_images(source, reference)
    assert source.labels.tolist() == [label for _, label in reference] and source.classes == tuple(reference.classes)


def test_cifar100__a_row_is_three_planes_of_rows_with_the_fine_label(tmp_path):
    source = made("cifar100", tmp_path).split("test")
    rows = dataset_files.pixels_of((0, 1), dataset_files.PER_SPLIT, 3072)
    image = np.asarray(source.open(4))
    assert all(
        image[y, x, c] == rows[4, c * 1024 + y * 32 + x] for y, x, c in [(0, 0, 0), (0, 5, 1), (31, 2, 2), (7, 30, 0)]
    )
    assert source.labels.tolist() == [1, 99, 3, 4, 5, 50] and source.classes[99] == "class 99"


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar__a_folder_without_a_test_part_has_no_test_split(name, tmp_path):
    dataset_files.imagefolder(tmp_path)
    shutil.rmtree(tmp_path / "test")
    cifar = plugins.load("datasets", name)(str(tmp_path))
    assert cifar.split("train").count == 3
    with pytest.raises(KeyError):
        cifar.split("test")


@pytest.mark.parametrize("split", ["train", "test", "unlabeled"])
def test_stl10__pixels_and_labels_are_torchvisions(split, tmp_path):
    source = made("stl10", tmp_path).split(split)
    reference = torchvision.datasets.STL10(tmp_path, split=split)
    assert same_images(source, reference)
    assert not np.array_equal(np.asarray(source.open(0)), np.asarray(reference[0][0]).transpose(1, 0, 2))
    if split == "unlabeled":
        assert source.labels is None and {label for _, label in reference} == {-1}
    else:
        assert source.labels.tolist() == [label for _, label in reference]
        assert source.classes == tuple(reference.classes)


def test_stl10__the_100000_images_are_never_in_memory(tmp_path):
    stl = made("stl10", tmp_path)
    os.truncate(tmp_path / "stl10_binary" / "unlabeled_X.bin", 100_000 * 27_648)  # sparse: takes no disk
    tracemalloc.start()
    source = stl.split(stl.pretrain_split)
    last = source.open(99_999)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert source.count == 100_000 and last.size == (96, 96) and peak < 2**21


@pytest.mark.parametrize(
    ("file", "content", "rule"),
    [
        ("train_X.bin", b"7" * 27_649, "whole images of 27648 bytes, got 27649 bytes"),
        ("train_X.bin", b"", "whole images of 27648 bytes, got 0 bytes"),
        ("train_y.bin", bytes([1, 2, 3]), "4 labels of 1 to 10, got 3 bytes"),
        ("train_y.bin", bytes([1, 2, 3, 0]), "4 labels of 1 to 10"),
        ("train_y.bin", bytes([1, 2, 3, 11]), "4 labels of 1 to 10"),
        ("train_X.bin", None, r"looked for .*train_X.bin\)"),
        ("train_y.bin", None, r"looked for .*train_y.bin\)"),
    ],
)
def test_stl10__files_that_do_not_belong_together_are_named(file, content, rule, tmp_path):
    stl = made("stl10", tmp_path)
    path = tmp_path / "stl10_binary" / file
    path.write_bytes(content) if content is not None else path.unlink()
    with pytest.raises(ValueError, match=rule):
        stl.split("train")
    assert stl.split("test").count == 3


def test_tiny_imagenet__boxes_and_labels_are_those_of_the_text_files(tmp_path):
    tiny = made("tiny_imagenet", tmp_path)
    train, test = tiny.split("train"), tiny.split("test")
    assert train.classes == test.classes == ("n01443537", "n02504458", "n03404251")
    assert train.object_classes == ("goldfish, Carassius auratus", "n02504458", "fur coat")
    for source, wanted in ((train, lambda k, _: [k, 2, 58, 64]), (test, lambda k, _: [0, k, 64, k + 1])):
        for i in range(source.count):
            name = Path(source.name(i)).stem
            k = int(name.rpartition("_")[2])
            wnid = name.partition("_")[0] if source is train else dataset_files.WNIDS[k % 3]
            assert source.classes[source.labels[i]] == wnid
            assert source.objects(i).boxes.tolist() == [wanted(k, wnid)]
            assert source.objects(i).labels.tolist() == [source.labels[i]]


def test_tiny_imagenet__the_unpacked_archive_is_found_in_its_own_folder(tmp_path):
    dataset_files.tiny_imagenet(tmp_path / "tiny-imagenet-200")
    assert plugins.load("datasets", "tiny_imagenet")(str(tmp_path)).split("test").count == 4


def test_tiny_imagenet__files_that_do_not_belong_together_are_named(tmp_path):
    tiny = made("tiny_imagenet", tmp_path)
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn03404251\t0\t0\t5\t5\n")
    with pytest.raises(ValueError, match=r"must have a line .*, got 3 of 4 without, first: .*val_1\.JPEG"):
        tiny.split("test")
    shutil.rmtree(tmp_path / "train" / "n02504458")
    with pytest.raises(ValueError, match="train must hold the 3 class folders of wnids.txt, got 2"):
        tiny.split("train")
    (tmp_path / "val" / "val_annotations.txt").unlink()
    with pytest.raises(ValueError, match="found no .*val_annotations.txt"):
        tiny.split("test")


def test_imagenet__listing_opens_no_file(tmp_path, monkeypatch):
    imagenet = made("imagenet", tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError("a file was opened")

    with monkeypatch.context() as patch:
        for module, name in ((Image, "open"), (builtins, "open"), (os, "open"), (Path, "open")):
            patch.setattr(module, name, refuse)
        splits = [imagenet.split("train"), imagenet.split("test")]
        with pytest.raises(AssertionError, match="was opened"):
            splits[0].open(0)
    assert [source.count for source in splits] == [6, 6] and "/val/" in splits[1].name(0)
    assert splits[0].classes == splits[1].classes == tuple(sorted(dataset_files.WNIDS))


def test_imagenet__flat_validation_images_are_refused_with_the_way_to_sort_them(tmp_path):
    imagenet = made("imagenet", tmp_path)
    shutil.rmtree(tmp_path / "val")
    for k in range(3):
        dataset_files.save(tmp_path / "val" / f"ILSVRC2012_val_{k:08d}.JPEG", k)
    with pytest.raises(
        ValueError, match="as val/<wnid>/.*, got 3 images lying flat in .*val. To sort .*cd .*val"
    ) as error:
        imagenet.split("test")
    assert "\n" not in str(error.value) and str(error.value).endswith("bash valprep.sh")
    assert imagenet.split("train").count == 6
