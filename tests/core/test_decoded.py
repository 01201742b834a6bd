"""Decoding once; what two processes do at once is in test_data_path.py."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from amt_ray.core.datasets.imagefolder import folder_source
from amt_ray.core.decoded import decoded, default_cache_dir


@pytest.fixture
def folder(tmp_path, generator):
    root = tmp_path / "images"
    root.mkdir()
    for i, mode in enumerate(["RGB", "L", "RGBA", "RGB", "1"]):
        pixels = torch.randint(0, 256, (10 + i, 14, 3), generator=generator).byte().numpy()
        Image.fromarray(pixels).convert(mode).save(root / f"{i}.png")
    return root


@pytest.mark.parametrize("size", [(10, 14), (6, 5), (31, 20)])
def test_decoded__every_image_is_pils_whatever_its_mode_and_size(folder, tmp_path, size):
    array = decoded(folder_source(folder), size, tmp_path / "cache")
    assert array.shape == (5, 3, *size) and array.dtype == np.uint8
    for i in range(5):
        image = Image.open(folder / f"{i}.png").convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC)
        assert np.array_equal(array[i], np.asarray(image).transpose(2, 0, 1))


def test_decoded__a_second_call_opens_no_image(folder, tmp_path):
    source = folder_source(folder)
    first, seen = decoded(source, (8, 8), tmp_path / "cache"), []

    def refuse(i):
        raise AssertionError(f"image {i} was opened again")

    blind = dataclasses.replace(source, open=refuse)
    second = decoded(blind, (8, 8), tmp_path / "cache", on_progress=lambda done, of: seen.append(done))
    assert np.array_equal(first, second) and seen == []
    with pytest.raises(AssertionError, match="opened again"):
        decoded(blind, (8, 9), tmp_path / "cache")


def test_decoded__writing_into_the_array_does_not_change_the_file(folder, tmp_path):
    array = decoded(folder_source(folder), (8, 8), tmp_path / "cache")
    before = array.copy()
    array[:] = 7
    assert np.array_equal(decoded(folder_source(folder), (8, 8), tmp_path / "cache"), before)


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "damaged"])
def test_decoded__a_corrupt_image_is_named_and_mending_it_is_enough(folder, tmp_path, kind):
    path = folder / "3.png"
    whole = path.read_bytes()
    middle = len(whole) // 2
    damaged = whole[:middle] + bytes(255 - b for b in whole[middle : middle + 20]) + whole[middle + 20 :]
    path.write_bytes({"empty": b"", "text": b"no image", "cut": whole[:middle], "damaged": damaged}[kind])
    with pytest.raises(ValueError, match=r"every image must be readable, got .*3\.png \(") as error:
        decoded(folder_source(folder), (8, 8), tmp_path / "cache")
    assert "\n" not in str(error.value) and not list((tmp_path / "cache").glob("*.npy"))
    path.write_bytes(whole)
    assert decoded(folder_source(folder), (8, 8), tmp_path / "cache").shape == (5, 3, 8, 8)


def test_decoded__what_a_killed_process_left_is_not_taken_for_whole(folder, tmp_path):
    source, cache = folder_source(folder), tmp_path / "cache"
    expected = decoded(source, (8, 8), cache).copy()
    (whole,) = cache.glob("*.npy")
    whole.with_suffix(".partial").write_bytes(whole.read_bytes()[:100])
    whole.unlink()
    assert np.array_equal(decoded(source, (8, 8), cache), expected)
    assert not list(cache.glob("*.partial"))


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "rewritten"])
def test_decoded__any_change_of_the_folder_gives_a_new_array(folder, tmp_path, change):
    before = decoded(folder_source(folder), (8, 8), tmp_path / "cache")
    if change == "added":
        Image.new("RGB", (5, 5)).save(folder / "9.png")
    elif change == "removed":
        (folder / "0.png").unlink()
    elif change == "renamed":
        (folder / "0.png").rename(folder / "8.png")
    else:
        Image.new("RGB", (5, 5), "red").save(folder / "0.png")
    assert not np.array_equal(decoded(folder_source(folder), (8, 8), tmp_path / "cache"), before)


def test_decoded__tells_of_its_progress_up_to_the_end(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("amt_ray.core.decoded.CHUNK", 2)
    told = []
    decoded(folder_source(folder), (8, 8), tmp_path / "cache", on_progress=lambda *args: told.append(args))
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_cache_dir__is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("AMT_RAY_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("AMT_RAY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "amt_ray"
