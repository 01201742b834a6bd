"""Several processes that start at once on one tracking store.

An sqlite store that several processes open while it is fresh is damaged for good (alembic's migrations run twice), and
a data set that two runs log at the same moment breaks a UNIQUE rule of MLflow's tables.
"""

import multiprocessing
import os
import sys
import threading

import pytest
from mlflow import MlflowClient

from amt_ray.cli import main
from amt_ray.runtime import tracking
from amt_ray.runtime.tracking import opening
from tests.tiny import TREE, tiny

DRIVERS, EXPERIMENTS = 4, 2


def starts(number, folder, gate, told):
    """A driver as far as its first run; what it prints goes to a file."""
    printed = os.open(folder / f"printed_{number}", os.O_CREAT | os.O_WRONLY)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.chdir(folder)
    experiment = tiny(name=f"e{number % EXPERIMENTS}", tracking__uri=f"sqlite:///{folder / 'store' / 'mlflow.db'}")
    gate.wait()
    try:
        target = tracking.prepare(experiment)
        told.put((number, target.experiment_id, tracking.start_experiment_run(target, experiment, "r", "pretrain")))
    except BaseException as error:
        told.put((number, f"{type(error).__name__}: {error}", None))


def test_drivers__that_start_at_once_on_a_fresh_sqlite_store_share_it_and_print_nothing(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    gate, told = context.Barrier(DRIVERS), context.Queue()
    processes = [context.Process(target=starts, args=(n, tmp_path, gate, told)) for n in range(DRIVERS)]
    for process in processes:
        process.start()
    found = sorted(told.get(timeout=250) for _ in processes)
    for process in processes:
        process.join()
    assert all(run_id for _, _, run_id in found), found
    assert "".join((tmp_path / f"printed_{n}").read_text() for n in range(DRIVERS)) == ""
    client = MlflowClient(f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}")
    assert {e.name for e in client.search_experiments()} == {"Default", *(f"e{n}" for n in range(EXPERIMENTS))}
    for number, experiment_id, run_id in found:
        run = client.get_run(run_id)
        assert client.get_experiment_by_name(f"e{number % EXPERIMENTS}").experiment_id == experiment_id
        assert run.info.experiment_id == experiment_id and len(run.inputs.dataset_inputs) == 3


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    MlflowClient(uri).search_experiments()
    return uri


def test_experiment__that_another_driver_makes_meanwhile_is_taken(store, monkeypatch):
    look = MlflowClient.get_experiment_by_name

    def look_too_early(self, name):
        monkeypatch.setattr(MlflowClient, "get_experiment_by_name", look)
        found = look(self, name)
        MlflowClient(store).create_experiment(name)
        return found

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", look_too_early)
    target = tracking.prepare(tiny(name="raced", tracking__uri=store))
    assert MlflowClient(store).get_experiment_by_name("raced").experiment_id == target.experiment_id


def test_experiment__that_was_deleted_is_restored(store):
    target = tracking.prepare(tiny(name="deleted", tracking__uri=store))
    target.client.delete_experiment(target.experiment_id)
    assert tracking.prepare(tiny(name="deleted", tracking__uri=store)) == target
    assert target.client.get_experiment(target.experiment_id).lifecycle_stage == "active"


def test_data_set__that_several_runs_log_at_once_is_an_input_of_each(store, monkeypatch):
    target = tracking.prepare(tiny(name="inputs", tracking__uri=store))
    monkeypatch.setattr(opening, "PAUSE_S", 0.05)
    faults = []

    def log(experiment, run_id, gate):
        gate.wait()
        try:
            tracking.log_data(target, run_id, experiment)
        except Exception as error:
            faults.append(error)

    for images in range(100, 110):  # each a data set of its own
        experiment, gate = tiny(data__train_images=images), threading.Barrier(3)
        runs = [target.client.create_run(target.experiment_id).info.run_id for _ in range(3)]
        threads = [threading.Thread(target=log, args=(experiment, run_id, gate)) for run_id in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not faults
        used = [target.client.get_run(run_id).inputs.dataset_inputs for run_id in runs]
        assert [len(inputs) for inputs in used] == [3, 3, 3]
        assert len({i.dataset.digest for inputs in used for i in inputs}) == 3


@pytest.mark.parametrize("words", [["pretrain", "FILE"], ["pretrain", "--resume", "abc"], ["sweep", "--resume", "abc"]])
def test_store__that_cannot_be_opened_is_one_line_without_a_traceback(tmp_path, monkeypatch, capfd, words):
    import yaml

    (tmp_path / "x.yaml").write_text(yaml.safe_dump(TREE | {"ray": {"num_workers": 0}}))
    (tmp_path / "bad.db").write_text("no database")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///bad.db")
    monkeypatch.setattr(sys, "argv", ["amt-ray", *(str(tmp_path / "x.yaml") if w == "FILE" else w for w in words)])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capfd.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1 and "file is not a database" in told, told
