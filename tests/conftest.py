"""Shared by all tests: small pieces of the real thing, and no writing into the user's cache."""

import os

os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")

import pytest
import torch

import amt_ray.runtime  # noqa: F401  (sets Ray's authentication before Ray is imported)

BY_HAND = ("slurm", "postgres")  # a minute or more each: run by pytest -m slurm, ...; and so faults(slow=True)


def pytest_collection_modifyitems(config, items):
    asked = config.getoption("markexpr")

    def left_out(item):
        if any(item.get_closest_marker(name) and name not in asked for name in BY_HAND):
            return True
        slow = any(mark.kwargs.get("slow") for mark in item.iter_markers("faults"))
        return slow and "faults" not in asked

    skipped = [item for item in items if left_out(item)]
    if skipped:
        config.hook.pytest_deselected(items=skipped)
        items[:] = [item for item in items if item not in skipped]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("AMT_RAY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
