"""One tracking store for all tests of the report: making its schema takes longer than the tests."""

import pytest

from tests.report.store import Store, write_live, write_seeds, write_sweep


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """Ids of sweeps: ``live`` with its trial ``running`` (which tests change), ``seeds``, and ``sweep``, the newest."""
    made = Store(tmp_path_factory.mktemp("report"))
    made.live, made.running = write_live(made)
    made.seeds = write_seeds(made)
    made.sweep = write_sweep(made)
    return made
