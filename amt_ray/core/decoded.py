"""Decode once: one uint8 array a node, memory-mapped by every worker on it."""

import fcntl
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from amt_ray.core.datasets import Source

CHUNK = 512


def default_cache_dir() -> Path:
    """``$AMT_RAY_CACHE``, else ``amt_ray`` in the user's cache folder."""
    if folder := os.environ.get("AMT_RAY_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "amt_ray"


def decoded(
    source: Source,
    size: tuple[int, int],
    cache_dir: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """All images of a split as one array, each resized as a whole to ``size``.

    The array is a file in the cache folder, mapped into memory, so the workers of a node share its pages. The first
    process to ask makes it, the others wait; a file that is there is whole.

    Args:
        source: The images.
        size: Rows and columns to store.
        cache_dir: Folder of the decoded files.
        on_progress: Called with images done and in all while decoding.

    Returns:
        [n, 3, rows, columns] uint8, copy-on-write.

    Raises:
        ValueError: If an image cannot be read; the message names it.
    """
    folder = cache_dir or default_cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(f"{source.fingerprint}|{source.count}|{size}|1".encode()).hexdigest()[:32]
    path = folder / f"{key}.npy"
    if not path.exists():
        with open(folder / f"{key}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the system even if its holder is killed
            if not path.exists():
                _decode_to(path, source, size, on_progress)
    array: np.ndarray = np.load(path, mmap_mode="c")
    return array


def _decode_to(
    path: Path, source: Source, size: tuple[int, int], on_progress: Callable[[int, int], None] | None
) -> None:
    partial = path.with_suffix(".partial")
    array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(source.count, 3, *size))

    def decode(start: int) -> int:
        stop = min(start + CHUNK, source.count)
        for i in range(start, stop):
            array[i] = _read(source, i, size)
        return stop - start

    done = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for count in pool.map(decode, range(0, source.count, CHUNK)):
            done += count
            if on_progress:
                on_progress(done, source.count)
    array.flush()
    os.replace(partial, path)


def _read(source: Source, i: int, size: tuple[int, int]) -> np.ndarray:
    try:
        with source.open(i) as image:
            image = image.convert("RGB")
            if image.size != size[::-1]:
                image = image.resize(size[::-1], Image.Resampling.BICUBIC)
            return np.asarray(image).transpose(2, 0, 1)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"every image must be readable, got {source.name(i)} ({error}).") from error
