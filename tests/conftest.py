"""Shared by all tests: small pieces of the real thing, and no writing into the user's cache."""

import os

os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")

import pytest
import torch

import amt_ray.runtime  # noqa: F401  (sets Ray's authentication before Ray is imported)

BY_HAND = ("slurm", "postgres", "faults")  # a minute or more each: run by pytest -m slurm, ...


def pytest_collection_modifyitems(config, items):
    left_out = [name for name in BY_HAND if name not in config.getoption("markexpr")]
    skipped = [item for item in items if any(item.get_closest_marker(name) for name in left_out)]
    if skipped:
        config.hook.pytest_deselected(items=skipped)
        items[:] = [item for item in items if item not in skipped]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("AMT_RAY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
