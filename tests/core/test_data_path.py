"""Sampling, decoding, data sets and scores."""

import multiprocessing
import os

import numpy as np
import pytest
import torch
from PIL import Image

from amt_ray import plugins
from amt_ray.core.decoded import decoded
from amt_ray.core.images import ImageArray
from amt_ray.core.sampling import epoch_steps, hold_out, rank_share, steps_per_epoch


@pytest.mark.parametrize("images", [1, 7, 100, 101])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("batch", "accumulate"), [(12, 1), (12, 2), (128, 1)])
def test_sampling__every_image_counts_once_an_epoch(images, ranks, batch, accumulate):
    order = torch.randperm(images)
    per_rank = [list(epoch_steps(order, batch, rank, ranks, accumulate)) for rank in range(ranks)]
    assert {len(steps) for steps in per_rank} == {steps_per_epoch(images, batch)}
    assert len({len(micro.index_B) for steps in per_rank for step in steps for micro in step}) == 1
    counted = []
    for step in zip(*per_rank, strict=True):
        micros = [micro for share in step for micro in share]
        weights = torch.cat([micro.weight_B for micro in micros])
        assert weights.sum() / ranks == pytest.approx(1.0)
        assert len(weights[weights > 0].unique()) == 1 and int((weights > 0).sum()) <= batch
        counted += [i for micro in micros for i in micro.index_B[micro.weight_B > 0].tolist()]
    assert counted == order.tolist()


def test_hold_out__is_exact_disjoint_and_the_same_for_all():
    train, held = hold_out(1437, 0.1)
    assert len(held) == 143 and torch.equal(torch.cat([train, held]).sort().values, torch.arange(1437))
    assert torch.equal(hold_out(1437, 0.1)[1], held)
    shares = torch.cat([rank_share(train, r, 3) for r in range(3)])
    assert torch.equal(shares.sort().values, train)


@pytest.fixture
def folder(tmp_path, generator):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = torch.randint(0, 256, (9, 11, 3), generator=generator).byte().numpy()
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def source_of(folder, name="imagefolder", split="train"):
    return plugins.load("datasets", name)(str(folder)).split(split)


def _decode(folder, cache, queue):
    queue.put(decoded(source_of(folder), (9, 11), cache).pixels.sum())


def test_decoded__is_pils_pixels_made_once(folder, tmp_path, monkeypatch):
    source = source_of(folder)
    array = decoded(source, (9, 11), tmp_path / "cache").pixels
    assert np.array_equal(array[4], np.asarray(Image.open(folder / "train/dog/1.png")).transpose(2, 0, 1))
    monkeypatch.setattr("amt_ray.core.decoded._read", None)
    assert np.array_equal(decoded(source, (9, 11), tmp_path / "cache").pixels, array)


def test_decoded__two_processes_at_once_get_the_same_whole_array(folder, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    workers = [context.Process(target=_decode, args=(folder, tmp_path / "cache", queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    sums = {int(queue.get()) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(sums) == 1


def test_decoded__a_changed_folder_is_decoded_again(folder, tmp_path):
    before = decoded(source_of(folder), (9, 11), tmp_path / "cache").pixels.copy()
    Image.new("RGB", (11, 9), "red").save(folder / "train/cat/0.png")
    assert not np.array_equal(decoded(source_of(folder), (9, 11), tmp_path / "cache").pixels, before)


@pytest.mark.parametrize("name", ["imagefolder", "cifar10"])
def test_dataset__folders_of_images_have_labels_by_folder(folder, name):
    for split in ("train", "test"):
        source = source_of(folder, name, split)
        assert source.count == 6 and source.classes == ("cat", "dog")
        assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_imagefolder__flat_images_have_no_labels_and_a_mixture_is_refused(folder):
    assert source_of(folder / "train/cat").labels is None
    Image.new("RGB", (4, 4)).save(folder / "train/stray.png")
    with pytest.raises(ValueError, match="all lie in class folders or all flat"):
        source_of(folder)
    with pytest.raises(ValueError, match="data.root must be an existing folder, got /nowhere"):
        source_of("/nowhere")


def test_digits__are_the_1797_images_of_scikit_learn():
    digits = plugins.load("datasets", "digits")()
    train, test = digits.split("train"), digits.split("test")
    assert (train.count, test.count, len(train.classes)) == (1438, 359, 10)
    assert train.open(0).size == (8, 8) and len(train.labels) == 1438


def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_image_array__a_set_larger_than_memory_is_read_image_by_image(tmp_path):
    shape = (40_000, 3, 224, 224)  # 6 GB, of which the file system stores nothing
    np.lib.format.open_memmap(tmp_path / "a.npy", mode="w+", dtype=np.uint8, shape=shape)
    before = resident_mib()
    images = ImageArray(np.load(tmp_path / "a.npy", mmap_mode="c"), None, (0.5,) * 3, (0.5,) * 3)
    batch = images.load(torch.randint(0, len(images), (16,)))
    assert batch.shape == (16, 3, 224, 224) and resident_mib() - before < 100
