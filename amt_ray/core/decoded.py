"""Decode once: one uint8 array a node, memory-mapped by every worker on it."""

import fcntl
import hashlib
import inspect
import json
import os
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from amt_ray.core.aspect import Size, window
from amt_ray.core.datasets import Source
from amt_ray.core.pixels import RULES, ValueRange, ValueRangeError, to_rgb

CHUNK = 512
GREY = 128
DIM = 64  # of 255: what the greatest value of a type's quarter becomes, as of 14 bits in 16
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
        sizes: How many images have these rows and columns, and the first that does.
        dim: The greatest value of all images in 8 bits where it is far below 255; None elsewhere.
    """

    pixels: np.ndarray
    broken: np.ndarray
    sizes: dict[Size, tuple[int, int]]
    dim: int | None


class Notes(NamedTuple):
    """What is known of the decoded images beside their pixels, kept in a file."""

    broken: dict[int, str]
    sizes: dict[Size, tuple[int, int]]
    dim: int | None

    @classmethod
    def read(cls, path: Path) -> "Notes":
        """The notes in a file."""
        told = json.loads(path.read_text())
        sizes = {(rows, columns): (count, first) for rows, columns, count, first in told["sizes"]}
        return cls({int(i): reason for i, reason in told["broken"].items()}, sizes, told["dim"])

    def to_json(self) -> str:
        """The file's text."""
        sizes = [[*size, *known] for size, known in sorted(self.sizes.items())]
        return json.dumps({"broken": dict(sorted(self.broken.items())), "sizes": sizes, "dim": self.dim})


def default_cache_dir() -> Path:
    """``$AMT_RAY_CACHE``, else ``amt_ray`` in the user's cache folder."""
    if folder := os.environ.get("AMT_RAY_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "amt_ray"


def decoded(
    source: Source,
    size: Size,
    cache_dir: Path | None = None,
    on_progress: OnProgress | None = None,
    on_broken: OnBroken = "fail",
    crop: bool = False,
    value_range: ValueRange | None = None,
) -> Decoded:
    """All images of a split as one array, each resized to ``size``.

    The array is a file in the cache folder, mapped into memory, so the workers of a node share its pages. The first
    process to ask makes it, the others wait; a file that is there is whole. Which images are broken, and how large all
    were, is kept in a file beside it, so that all processes leave out the same ones.

    Args:
        source: The images.
        size: Rows and columns to store.
        cache_dir: Folder of the decoded files.
        on_progress: Called with images done and in all while decoding.
        on_broken: ``fail``, or ``skip`` to go on with grey in the place of images that cannot be read.
        crop: Whether images of another aspect than that of ``size`` are cut to their centre instead of squashed.
        value_range: The values that become black and white, of images of more than 8 bits.

    Raises:
        ValueError: If an image cannot be read, unless it is to be skipped, or if none can, or if images need a range of
            values, or have no use for one; the message names the first.
    """
    folder = cache_dir or default_cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    look = _Look(source, size, crop, value_range)
    key = hashlib.sha256(look.key.encode()).hexdigest()[:32]
    path, notes = folder / f"{key}.npy", folder / f"{key}.notes.json"
    if not _is_whole(path, notes) or Notes.read(notes).broken:
        with open(folder / f"{key}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the system even if its holder is killed
            if not _is_whole(path, notes) or (on_broken == "fail" and _is_mended(notes, look)):
                _decode_to(path, notes, look, on_progress)
    broken, sizes, dim = Notes.read(notes)
    if broken and (on_broken == "fail" or len(broken) == source.count):
        raise ValueError(_message(broken, source))
    return Decoded(np.load(path, mmap_mode="c"), np.array(list(broken), dtype=np.int64), sizes, dim)


class _Look:
    """How the images of a source become pixels.

    Args:
        source: The images.
        size: Rows and columns.
        crop: As in `decoded`.
        value_range: As in `decoded`.
    """

    def __init__(self, source: Source, size: Size, crop: bool, value_range: ValueRange | None) -> None:
        self.source, self.size, self.crop, self.value_range = source, size, crop, value_range
        self.key = f"{source.fingerprint}|{source.count}|{size}|{RULES}|{crop}|{value_range}"
        self.bright = False  # whether a value above DIM was seen; from then on none is looked for

    def open(self, i: int) -> Image.Image:
        """Image ``i``, in RGB; one of a plug-in that returns it in another mode is made so here."""
        if self.value_range is not None and len(inspect.signature(self.source.open).parameters) > 1:
            return self.source.open(i, self.value_range)
        image = self.source.open(i)
        if image.mode == "RGB" and self.value_range is None:
            return image
        return to_rgb(image, self.value_range, self.source.name(i))

    def pixels(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int, int]]:
        """The pixels [3, rows, columns], and the image's own rows, columns and greatest value."""
        shape, wanted = (image.height, image.width), self.size[::-1]
        greatest = 255 if self.bright else int(np.asarray(image).max())
        self.bright |= greatest > DIM
        box = window(shape, self.size) if self.crop else (0, 0, *image.size)
        if image.size != wanted:
            image = image.resize(wanted, Image.Resampling.BICUBIC, box)
        return np.asarray(image).transpose(2, 0, 1), (*shape, greatest)


def _message(broken: dict[int, str], source: Source) -> str:
    first, reason = next(iter(broken.items()))
    remedy = " data.on_broken=skip leaves them out." if len(broken) < source.count else ""
    return f"{len(broken)} of {source.count} images cannot be read, first: {source.name(first)} ({reason}).{remedy}"


def _is_whole(path: Path, notes: Path) -> bool:
    return path.exists() and notes.exists()


def _is_mended(notes: Path, look: _Look) -> bool:
    """Whether an image noted as broken can be read now: its file was there but not to be had, for instance."""
    return any(not isinstance(_read(look, i), str) for i in Notes.read(notes).broken)


def _decode_to(path: Path, notes: Path, look: _Look, on_progress: OnProgress | None) -> None:
    partial, count = path.with_suffix(".partial"), look.source.count
    array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(count, 3, *look.size))
    broken: dict[int, str] = {}
    about = np.zeros((count, 3), dtype=np.int64)  # rows, columns, greatest value; zeros where broken

    def decode(start: int) -> int:
        stop = min(start + CHUNK, count)
        for i in range(start, stop):
            found = _read(look, i)
            if isinstance(found, str):
                broken[i], array[i] = found, GREY
            else:
                array[i], about[i] = found
        return stop - start

    done = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for part in pool.map(decode, range(0, count, CHUNK)):
            done += part
            if on_progress:
                on_progress(done, count)
    array.flush()
    os.replace(partial, path)
    greatest = int(about[:, 2].max())
    dim = greatest if greatest <= DIM and len(broken) < count else None
    partial.write_text(Notes(broken, _counted(about[:, :2]), dim).to_json())
    os.replace(partial, notes)  # last: no older array is ever seen with newer notes


def _counted(sizes_n2: np.ndarray) -> dict[Size, tuple[int, int]]:
    """How many there are of each rows and columns, and the first; broken images have none."""
    shapes, first, counts = np.unique(sizes_n2, axis=0, return_index=True, return_counts=True)
    found = zip(shapes.tolist(), counts.tolist(), first.tolist(), strict=True)
    return {(rows, columns): (count, index) for (rows, columns), count, index in found if rows}


def _read(look: _Look, i: int) -> tuple[np.ndarray, tuple[int, int, int]] | str:
    """What `_Look.pixels` gives of image ``i``, or why it cannot be read, in one line."""
    try:
        with look.open(i) as image:
            return look.pixels(image)
    except ValueRangeError:
        raise
    except BROKEN as error:
        return " ".join(str(error).split()) or type(error).__name__
