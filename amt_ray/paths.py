"""Paths that mean the same from every folder: workers run in folders of their own, and a run is resumed elsewhere."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PATH_KEYS = ("data.root", "data.cache_dir", "model.checkpoint", "ray.storage_path")
SQLITE = re.compile(r"(sqlite(?:\+\w+)?:///)([^?]*)(.*)", re.DOTALL)


def absolute(path: str) -> str:
    """The path from the root of the file system; an address (``s3://...``) stays as it is."""
    return path if "://" in path else str(Path(path).expanduser().absolute())


def absolute_store(uri: str) -> str:
    """A tracking address whose file, if it names one, is named from the root of the file system."""
    file = sqlite_file(uri)
    if file is None:
        return uri
    head, _, tail = SQLITE.fullmatch(uri).groups()  # type: ignore[union-attr]
    return f"{head}{file}{tail}"


def sqlite_file(uri: str) -> Path | None:
    """The file of an sqlite address; None for other addresses, and for a database in memory."""
    found = SQLITE.fullmatch(uri)
    if found is None or not found[2] or found[2].startswith((":memory:", "file:")):
        return None
    return Path(found[2]).absolute()


def with_absolute_paths(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of an experiment in which no path depends on the working directory, nor one that a sweep sets."""
    located = _sections(tree)
    if isinstance(located.get("sweep"), dict):
        sweep = located["sweep"] = dict(located["sweep"])
        for key, axis in (sweep.get("space") or {}).items():
            sweep["space"] = {**sweep["space"], key: _axis(key, axis)}
        if sweep.get("baselines"):
            sweep["baselines"] = [_point(point) for point in sweep["baselines"]]
        if sweep.get("retrain_best"):
            sweep["retrain_best"] = _point(sweep["retrain_best"])
    return located


def _sections(tree: Mapping[str, Any]) -> dict[str, Any]:
    located = dict(tree)
    for dotted in PATH_KEYS:
        section, _, key = dotted.partition(".")
        path = located.get(section, {}).get(key)
        if path:
            located[section] = {**located[section], key: absolute(path)}
    if uri := located.get("tracking", {}).get("uri"):
        located["tracking"] = {**located["tracking"], "uri": absolute_store(uri)}
    return located


def _point(point: Mapping[str, Any]) -> dict[str, Any]:
    return {key: absolute(value) if key in PATH_KEYS and value else value for key, value in point.items()}


def _axis(key: str, axis: Mapping[str, Any]) -> dict[str, Any]:
    if key not in PATH_KEYS:
        return dict(axis)
    lists = {kind: axis[kind] for kind in ("grid", "choice") if axis.get(kind)}
    return {**axis, **{kind: [value and absolute(value) for value in values] for kind, values in lists.items()}}
