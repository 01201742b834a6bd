"""Decoding once; what two processes do at once is in test_data_path.py."""

import dataclasses
import os

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from amt_ray.core.datasets.imagefolder import folder_source
from amt_ray.core.decoded import GREY, decoded, default_cache_dir


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
    found = decoded(folder_source(folder), size, tmp_path / "cache")
    array = found.pixels
    assert found.broken.tolist() == [] and found.broken.dtype == np.int64
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
    assert np.array_equal(first.pixels, second.pixels) and seen == []
    with pytest.raises(AssertionError, match="opened again"):
        decoded(blind, (8, 9), tmp_path / "cache")


def test_decoded__writing_into_the_array_does_not_change_the_file(folder, tmp_path):
    array = decoded(folder_source(folder), (8, 8), tmp_path / "cache").pixels
    before = array.copy()
    array[:] = 7
    assert np.array_equal(decoded(folder_source(folder), (8, 8), tmp_path / "cache").pixels, before)


def damaged(whole, kind):
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes(255 - b for b in whole[middle : middle + 20]) + whole[middle + 20 :]
    return {"empty": b"", "text": b"no image", "cut": whole[:middle], "damaged": flipped}[kind]


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["empty", "text", "cut", "damaged"])
def test_decoded__a_corrupt_image_is_named_and_mending_it_is_enough(folder, tmp_path, kind):
    path = folder / "3.png"
    whole = path.read_bytes()
    path.write_bytes(damaged(whole, kind))
    for _ in ("fresh", "from the cache"):
        with pytest.raises(ValueError, match=r"^1 of 5 images cannot be read, first: .*3\.png \(.+\)\. ") as error:
            decoded(folder_source(folder), (8, 8), tmp_path / "cache")
        assert "\n" not in str(error.value) and str(error.value).endswith("data.on_broken=skip leaves them out.")
    path.write_bytes(whole)
    assert decoded(folder_source(folder), (8, 8), tmp_path / "cache").pixels.shape == (5, 3, 8, 8)


def save_cut(path, format):
    Image.effect_noise((40, 40), 90).convert("RGB").save(path, format=format)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


@pytest.mark.faults
@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF"])
def test_decoded__a_file_cut_short_is_broken_whatever_its_format(folder, tmp_path, format):
    save_cut(folder / f"0cut.{format.lower()}", format)
    found = decoded(folder_source(folder), (8, 8), tmp_path / "cache", on_broken="skip")
    assert found.broken.tolist() == [1] and len(found.pixels) == 6


@pytest.mark.parametrize(
    "error",
    [
        OSError("image file is truncated"),
        PermissionError(13, "Permission denied"),
        UnidentifiedImageError("cannot\nidentify"),
        SyntaxError("broken PNG file"),
        ValueError("bad header"),
        Image.DecompressionBombError("too many pixels"),
        OSError(),
    ],
)
def test_decoded__broken_images_are_grey_and_counted_by_every_process_alike(folder, tmp_path, error):
    source = folder_source(folder)

    def fail(i):
        if i in (1, 4):
            raise error
        return source.open(i)

    failing, told = dataclasses.replace(source, open=fail), " ".join(str(error).split()) or type(error).__name__
    expected = decoded(source, (8, 8), tmp_path / "whole").pixels
    first = decoded(failing, (8, 8), tmp_path / "cache", on_broken="skip")
    second = decoded(source, (8, 8), tmp_path / "cache", on_broken="skip")
    for found in (first, second):
        assert found.broken.tolist() == [1, 4] and found.broken.dtype == np.int64
        assert (found.pixels[[1, 4]] == GREY).all() and np.array_equal(found.pixels[[0, 2, 3]], expected[[0, 2, 3]])
    with pytest.raises(ValueError, match="cannot be read") as caught:
        decoded(failing, (8, 8), tmp_path / "cache")
    remedy = "data.on_broken=skip leaves them out."
    assert str(caught.value) == f"2 of 5 images cannot be read, first: {source.name(1)} ({told}). {remedy}"


def test_decoded__after_a_failure_skipping_opens_no_image_again(folder, tmp_path):
    (folder / "3.png").write_bytes(b"no image")
    source = folder_source(folder)
    with pytest.raises(ValueError, match="1 of 5 images"):
        decoded(source, (8, 8), tmp_path / "cache")
    found = decoded(dataclasses.replace(source, open=None), (8, 8), tmp_path / "cache", on_broken="skip")
    assert found.broken.tolist() == [3]


def test_decoded__an_image_that_can_be_read_again_is_read_again(folder, tmp_path):
    source = folder_source(folder)

    def out_of_reach(i):
        raise PermissionError(13, "Permission denied")

    denied = dataclasses.replace(source, open=lambda i: out_of_reach(i) if i == 2 else source.open(i))
    with pytest.raises(ValueError, match="1 of 5 images cannot be read, .* Permission denied"):
        decoded(denied, (8, 8), tmp_path / "cache")
    found = decoded(source, (8, 8), tmp_path / "cache")
    assert found.broken.tolist() == [] and not (found.pixels[2] == GREY).all()
    assert decoded(source, (8, 8), tmp_path / "cache", on_broken="skip").broken.tolist() == []


def test_decoded__where_every_image_is_broken_there_is_nothing_to_go_on_with(folder, tmp_path):
    for path in folder.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"5 of 5 images cannot be read, first: .*0\.png") as error:
        decoded(folder_source(folder), (8, 8), tmp_path / "cache", on_broken="skip")
    assert "skip" not in str(error.value)


@pytest.mark.timeout(20)
def test_decoded__pipes_and_dangling_links_are_broken_images_not_a_hang(folder, tmp_path):
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to(folder / "gone.png")
    found = decoded(folder_source(folder), (8, 8), tmp_path / "cache", on_broken="skip")
    assert found.broken.tolist() == [5, 6]


def test_decoded__a_mistake_in_our_own_code_is_no_broken_image(folder, tmp_path):
    def mistake(i):
        raise AttributeError("ours")

    with pytest.raises(AttributeError, match="ours"):
        decoded(dataclasses.replace(folder_source(folder), open=mistake), (8, 8), tmp_path, on_broken="skip")


@pytest.mark.faults
def test_decoded__what_a_killed_process_left_is_not_taken_for_whole(folder, tmp_path):
    source, cache = folder_source(folder), tmp_path / "cache"
    expected = decoded(source, (8, 8), cache).pixels.copy()
    (whole,) = cache.glob("*.npy")
    whole.with_suffix(".partial").write_bytes(whole.read_bytes()[:100])
    whole.unlink()
    assert np.array_equal(decoded(source, (8, 8), cache).pixels, expected)
    assert not list(cache.glob("*.partial"))


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "rewritten"])
def test_decoded__any_change_of_the_folder_gives_a_new_array(folder, tmp_path, change):
    before = decoded(folder_source(folder), (8, 8), tmp_path / "cache").pixels
    if change == "added":
        Image.new("RGB", (5, 5)).save(folder / "9.png")
    elif change == "removed":
        (folder / "0.png").unlink()
    elif change == "renamed":
        (folder / "0.png").rename(folder / "8.png")
    else:
        Image.new("RGB", (5, 5), "red").save(folder / "0.png")
    assert not np.array_equal(decoded(folder_source(folder), (8, 8), tmp_path / "cache").pixels, before)


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
