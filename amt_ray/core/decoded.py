"""Decode once: one uint8 array a node, memory-mapped by every worker on it."""

import fcntl
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from amt_ray.core.datasets import Source

CHUNK = 512
GREY = 128
# what PIL's readers raise on damaged files of one format or another
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
OnBroken = Literal["fail", "skip"]
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Decoded:
    """The images of a split.

    Attributes:
        pixels: [n, 3, rows, columns] uint8, copy-on-write; grey where an image is broken.
        broken: [k] int64, ascending: the images that cannot be read.
    """

    pixels: np.ndarray
    broken: np.ndarray


def default_cache_dir() -> Path:
    """``$AMT_RAY_CACHE``, else ``amt_ray`` in the user's cache folder."""
    if folder := os.environ.get("AMT_RAY_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "amt_ray"


def decoded(
    source: Source,
    size: tuple[int, int],
    cache_dir: Path | None = None,
    on_progress: OnProgress | None = None,
    on_broken: OnBroken = "fail",
) -> Decoded:
    """All images of a split as one array, each resized as a whole to ``size``.

    The array is a file in the cache folder, mapped into memory, so the workers of a node share its pages. The first
    process to ask makes it, the others wait; a file that is there is whole. Which images are broken is kept in a file
    beside it, so that all processes leave out the same ones.

    Args:
        source: The images.
        size: Rows and columns to store.
        cache_dir: Folder of the decoded files.
        on_progress: Called with images done and in all while decoding.
        on_broken: ``fail``, or ``skip`` to go on with grey in the place of images that cannot be read.

    Raises:
        ValueError: If an image cannot be read, unless it is to be skipped, or if none can; the message names the first.
    """
    folder = cache_dir or default_cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(f"{source.fingerprint}|{source.count}|{size}|2".encode()).hexdigest()[:32]
    path, notes = folder / f"{key}.npy", folder / f"{key}.broken.json"
    if not _is_whole(path, notes) or _read_notes(notes):
        with open(folder / f"{key}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the system even if its holder is killed
            if not _is_whole(path, notes) or (on_broken == "fail" and _is_mended(notes, source, size)):
                _decode_to(path, notes, source, size, on_progress)
    broken = _read_notes(notes)
    if broken and (on_broken == "fail" or len(broken) == source.count):
        raise ValueError(_message(broken, source))
    return Decoded(np.load(path, mmap_mode="c"), np.array(list(broken), dtype=np.int64))


def _message(broken: dict[int, str], source: Source) -> str:
    first, reason = next(iter(broken.items()))
    remedy = " data.on_broken=skip leaves them out." if len(broken) < source.count else ""
    return f"{len(broken)} of {source.count} images cannot be read, first: {source.name(first)} ({reason}).{remedy}"


def _is_whole(path: Path, notes: Path) -> bool:
    return path.exists() and notes.exists()


def _read_notes(notes: Path) -> dict[int, str]:
    return {int(i): reason for i, reason in json.loads(notes.read_text()).items()}


def _is_mended(notes: Path, source: Source, size: tuple[int, int]) -> bool:
    """Whether an image noted as broken can be read now: its file was there but not to be had, for instance."""
    return any(not isinstance(_read(source, i, size), str) for i in _read_notes(notes))


def _decode_to(path: Path, notes: Path, source: Source, size: tuple[int, int], on_progress: OnProgress | None) -> None:
    partial = path.with_suffix(".partial")
    array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(source.count, 3, *size))
    broken: dict[int, str] = {}

    def decode(start: int) -> int:
        stop = min(start + CHUNK, source.count)
        for i in range(start, stop):
            found = _read(source, i, size)
            if isinstance(found, str):
                broken[i], array[i] = found, GREY
            else:
                array[i] = found
        return stop - start

    done = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for count in pool.map(decode, range(0, source.count, CHUNK)):
            done += count
            if on_progress:
                on_progress(done, source.count)
    array.flush()
    os.replace(partial, path)
    partial.write_text(json.dumps(dict(sorted(broken.items()))))
    os.replace(partial, notes)  # last: no older array is ever seen with newer notes


def _read(source: Source, i: int, size: tuple[int, int]) -> np.ndarray | str:
    """The pixels [3, rows, columns], or why they cannot be read, in one line."""
    try:
        with source.open(i) as image:
            image = image.convert("RGB")
            if image.size != size[::-1]:
                image = image.resize(size[::-1], Image.Resampling.BICUBIC)
            return np.asarray(image).transpose(2, 0, 1)
    except BROKEN as error:
        return " ".join(str(error).split()) or type(error).__name__
