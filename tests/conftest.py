"""Shared by all tests: small pieces of the real thing, and no writing into the user's cache."""

import os

os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")

import pytest
import torch

import amt_ray.runtime  # noqa: F401  (sets Ray's authentication before Ray is imported)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("AMT_RAY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
