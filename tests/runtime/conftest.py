import pytest
from mlflow import MlflowClient

from tests.runtime.shared_ray import ray_in


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with its own store, on one local Ray of two CPUs."""
    folder = tmp_path_factory.mktemp("work")
    with ray_in(folder):
        yield folder


@pytest.fixture(scope="module")
def client(place):
    return MlflowClient(f"sqlite:///{place / 'mlflow.db'}")
