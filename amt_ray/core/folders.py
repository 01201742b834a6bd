"""Folders of images: the files below one, which folder is which split, and what was skipped."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# what PIL opens and people keep images in
EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif", ".webp", ".ppm", ".pgm", ".pbm", ".pnm",
    ".tif", ".tiff", ".tga", ".jp2", ".j2k", ".avif",
)  # fmt: skip
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
NAMED = 3  # so many are named of what may be many


@dataclass
class Skipped:
    """What lies below a folder and is not taken.

    Attributes:
        hidden: Names that begin with ``.`` or ``__``.
        others: Files that are no images, by their ending.
        loops: Links that lead back to a folder above them.
        again: How many files and folders a link shows a second time.
        empty: Class folders without images.
    """

    hidden: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    loops: list[str] = field(default_factory=list)
    again: int = 0
    empty: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """In words; empty where nothing was skipped."""
        said = [f"{len(self.hidden)} hidden ({first_of(self.hidden)})"] if self.hidden else []
        if count := self.others.total():
            said.append(f"{count} {_plural(count, 'file that is no image', 'files that are no images')} "
                        f"({first_of(sorted(self.others))})")  # fmt: skip
        if count := len(self.loops):
            said.append(f"{count} {_plural(count, 'link that leads back', 'links that lead back')} "
                        f"({first_of(self.loops)})")  # fmt: skip
        said += [f"{self.again} that a link shows again"] if self.again else []
        if count := len(self.empty):
            said.append(f"{count} {_plural(count, 'folder', 'folders')} without images ({first_of(self.empty)})")
        return ", ".join(said)


def _plural(count: int, one: str, more: str) -> str:
    return one if count == 1 else more


@dataclass(frozen=True)
class Below:
    """The images below a folder: sorted paths relative to it, and what was skipped."""

    files: list[str]
    skipped: Skipped


def first_of(names: list[str] | tuple[str, ...]) -> str:
    """The first names, with ``...`` where there are more."""
    return ", ".join([*names[:NAMED], *(["..."] if len(names) > NAMED else [])])


def is_hidden(name: str) -> bool:
    """Whether a file or folder is not meant to be seen: ``.ipynb_checkpoints``, ``._1.jpg``, ``__MACOSX``."""
    return name.startswith((".", "__"))


def images_below(folder: Path, reads: tuple[str, ...] = ()) -> Below:
    """The images below a folder, each once in each folder of the first level; links are followed, but not in circles.

    Args:
        folder: The folder.
        reads: Endings of other files that are read elsewhere and so are not told as skipped.

    Raises:
        ValueError: If a folder cannot be read.
    """
    skipped, top = Skipped(), os.path.realpath(folder)
    found: list[str] = []
    for names in _tops(folder):
        walk = _Walk(str(folder), skipped, reads)
        if isinstance(names, str):
            real = os.path.realpath(folder / names)
            if _leads_back(real, (top,)):
                skipped.loops.append(names)
                continue
            walk.into(names, real, (top,))
            skipped.empty += [] if walk.files or walk.linked else [names]
        else:
            walk.entries("", top, names, (top,))
        found += walk.distinct()
    return Below(sorted(found), skipped)


def _tops(folder: Path) -> Iterator[str | list[os.DirEntry[str]]]:
    """The entries of a folder that are not folders, and the name of each folder that is not hidden."""
    beside = []
    for entry in _entries(str(folder)):
        if is_hidden(entry.name) or not _is_dir(entry):
            beside.append(entry)
        else:
            yield entry.name
    yield beside


class _Walk:
    """The images of one folder of the first level."""

    def __init__(self, root: str, skipped: Skipped, reads: tuple[str, ...]) -> None:
        self.root, self.skipped, self.reads = root, skipped, reads
        self.real_of: dict[str, str] = {}  # of the folders walked through
        self.seen: set[str] = set()
        self.files: list[str] = []
        self.linked: list[tuple[str, str]] = []

    def into(self, here: str, real: str, above: tuple[str, ...]) -> None:
        """Walk a folder, unless it was seen."""
        if real in self.seen:
            self.skipped.again += 1
            return
        self.entries(here, real, _entries(os.path.join(self.root, here)), (*above, real))

    def entries(self, here: str, real: str, entries: list[os.DirEntry[str]], above: tuple[str, ...]) -> None:
        """Take the images among these, and walk the folders."""
        self.seen.add(real)
        self.real_of[here] = real
        for entry in entries:
            path = os.path.join(here, entry.name)
            if is_hidden(entry.name):
                self.skipped.hidden.append(path)
            elif not _is_dir(entry):
                self._file(entry, path)
            elif not entry.is_symlink():
                self.into(path, os.path.join(real, entry.name), above)
            elif _leads_back(target := os.path.realpath(entry.path), above):
                self.skipped.loops.append(path)
            else:
                self.into(path, target, above)

    def _file(self, entry: os.DirEntry[str], path: str) -> None:
        name = entry.name.lower()
        if not name.endswith(EXTENSIONS):
            if not name.endswith(self.reads or ("\0",)):
                self.skipped.others[os.path.splitext(name)[1] or "no ending"] += 1
        elif entry.is_symlink():
            self.linked.append((path, os.path.realpath(entry.path)))
        else:
            self.files.append(path)

    def distinct(self) -> list[str]:
        """The images; of several names of one file the first, and its own before a link's."""
        if not self.linked:
            return self.files
        known = {os.path.join(self.real_of[os.path.dirname(f)], os.path.basename(f)) for f in self.files}
        for path, real in sorted(self.linked):
            if real in known:
                self.skipped.again += 1
            else:
                known.add(real)
                self.files.append(path)
        return self.files


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"data.root must be readable, got {error.strerror} for {folder}.") from error


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _leads_back(real: str, above: tuple[str, ...]) -> bool:
    """Whether a folder is one of those above, or holds one of them."""
    return any(folder == real or folder.startswith(real.rstrip(os.sep) + os.sep) for folder in above)


def split_folders(root: Path) -> dict[str, str]:
    """The folders of ``root`` that are named as a split, whatever their case: split -> name.

    Raises:
        ValueError: If two are named as the same split.
    """
    found: dict[str, str] = {}
    if not root.is_dir():
        return found
    for entry in _entries(str(root)):
        for split, names in SPLIT_NAMES.items():
            if entry.name.lower() in names and _is_dir(entry):
                if split in found:
                    raise ValueError(
                        f"data.root must have one folder for {split}, got {found[split]} and {entry.name} in {root}."
                    )
                found[split] = entry.name
    return {split: found[split] for split in SPLIT_NAMES if split in found}


def not_used(root: Path, used: tuple[str, ...]) -> str:
    """The folders beside those of the splits, and how many images lie flat beside them, in words."""
    entries = [entry for entry in _entries(str(root)) if not is_hidden(entry.name) and entry.name not in used]
    folders = [entry.name for entry in entries if _is_dir(entry)]
    flat = sum(entry.name.lower().endswith(EXTENSIONS) for entry in entries if entry.name not in folders)
    said = [f"folders {first_of(folders)}"] if folders else []
    return ", ".join(said + ([f"{flat} images in {root}"] if flat else []))
