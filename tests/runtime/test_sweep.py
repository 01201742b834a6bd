"""Sweeps on a real Ray: shared warm-ups, populations, budgets, stops of every kind, and what MLflow has of them."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray
import torch
import yaml
from mlflow import MlflowClient

from amt_ray.config import ConfigError, experiment_from
from amt_ray.core.checkpoint import read_about, read_weights
from amt_ray.core.ports import Silent, Solo
from amt_ray.runtime import local
from amt_ray.runtime.pretrain import RunFailedError
from amt_ray.runtime.storage import fetched
from amt_ray.runtime.sweep import open_book, recorded, sweep
from amt_ray.runtime.tracking import prepare
from amt_ray.space import LAYERS, MASK, THROW
from tests.runtime.shared_ray import children, quiet, steps
from tests.runtime.test_local import equal_states
from tests.tiny import TREE, tiny

pytestmark = pytest.mark.ray
MAE = {"masking.strategy": "random", MASK: 0.75, THROW: 0.0}


def small(name, **changes):
    return tiny(**{"name": name, "train__epochs": 4, "masking__warmup_epochs": 2, "eval__every_epochs": 1} | changes)


def weights_of(run):
    return read_weights(fetched(run.data.tags["amt_ray.checkpoint"]))[0]


def trained_alone(run, folder):
    """The weights of a trial's own configuration, trained by itself in this process."""
    torch.set_num_threads(1)
    checkpoint = fetched(run.data.tags["amt_ray.checkpoint"])
    experiment = experiment_from(read_about(checkpoint)["experiment"])
    checkpoints = local.stored(experiment, str(folder), Solo(), Silent())
    local.run(experiment, Solo(), Silent(), checkpoints)
    return read_weights(checkpoints.latest())[0]


@pytest.fixture(scope="module")
def shared(place, client):
    """A sweep of 2 seeds x (1 baseline + 2 layers), more trials than slots, cut short by its budget of 4 trials."""
    search = {
        "baselines": [MAE],
        "space": {LAYERS: {"grid": [-1, 0]}},
        "seeds": [0, 1],
        "max_concurrent_trials": 4,
        "budget": {"trials": 4},
    }
    console = quiet()
    parent = sweep(small("shared", sweep=search, tracking__log_model=True, tracking__register_best=True), console)
    return parent, console.file.getvalue()


def test_sweep__a_shared_warm_up_is_trained_once_a_seed_and_trials_end_as_if_alone(shared, client, tmp_path):
    parent, told = shared
    warmups, trials = children(client, parent, "warmup"), children(client, parent)
    assert [steps(client, run.info.run_id, "train/loss") for run in warmups] == [[1, 2], [1, 2]]
    assert len(trials) == 4 and {run.info.status for run in (*warmups, *trials)} == {"FINISHED"}
    for run in trials:
        for key in ("train/loss", "eval/knn_top1"):
            assert steps(client, run.info.run_id, key) == [1, 2, 3, 4]
    assert "sweep.budget.trials of 4 is spent, 2 trials not at their end" in told
    for run in (trials[1], trials[2]):  # the last layer and the first, whose scores came with the same warm-up
        assert run.data.params["attention.layers"] in ("-1", "0")
        assert equal_states(weights_of(run), trained_alone(run, tmp_path / run.info.run_id))


def test_sweep__grows_by_the_same_command_and_repeats_nothing(shared, client):
    parent, _ = shared
    before = {run.info.run_id: os.stat(run.data.tags["amt_ray.checkpoint"]).st_mtime_ns for run in
              children(client, parent)}  # fmt: skip
    changes = ["sweep.budget.trials=null", "sweep.space.attention.layers={grid: [-1, 0, rollout]}"]
    console = quiet()
    assert sweep(recorded(parent, changes), console, parent) == parent
    trials = children(client, parent)
    assert len(trials) == 8 and len(children(client, parent, "warmup")) == 2
    after = {run.info.run_id: os.stat(run.data.tags["amt_ray.checkpoint"]).st_mtime_ns for run in trials}
    assert before.items() <= after.items() and "4 trials of earlier sittings are kept" in console.file.getvalue()
    assert [run.data.params["attention.layers"] for run in trials].count("rollout") == 2
    assert all(steps(client, run.info.run_id, "train/loss") == [1, 2, 3, 4] for run in trials)
    assert client.get_run(parent).data.tags["amt_ray.trials"] == "8"
    with pytest.raises(ConfigError, match=r"can change sweep, ray, tracking only, .*, got train.epochs"):
        recorded(parent, ["train.epochs=9"])


def test_sweep__the_best_of_all_is_registered_on_request_and_embeds_images(shared, client, place, monkeypatch):
    import mlflow.pytorch

    version = client.get_model_version_by_alias("shared", "best")
    best = max(children(client, shared[0]), key=lambda run: run.data.metrics["eval/knn_top1"])
    assert version.run_id in {run.info.run_id for run in children(client, shared[0])}
    assert client.get_run(version.run_id).data.metrics["eval/knn_top1"] <= best.data.metrics["eval/knn_top1"]
    assert "Registered: models:/shared@best, version 1: the best of all, " in shared[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'mlflow.db'}")  # not for the tests after this one
    model = mlflow.pytorch.load_model("models:/shared@best")
    assert model(torch.zeros(5, 3, 16, 16)).shape == (5, 16)


def test_sweep__a_population_moves_ratios_within_one_run_a_member(place, client):
    search = {
        "search": "random",
        "num_samples": 3,
        "space": {MASK: {"uniform": [0.2, 0.6]}, THROW: {"uniform": [0.1, 0.6]}},
        "pbt": {"interval_epochs": 2, "quantile": 0.34},
    }
    parent = sweep(small("population", train__epochs=7, masking__warmup_epochs=1, sweep=search), quiet())
    members = children(client, parent)
    assert len(members) == 3 and {run.info.status for run in members} == {"FINISHED"}
    for run in members:
        assert steps(client, run.info.run_id, "train/loss") == [1, 2, 3, 4, 5, 6, 7]
    moved = [run for run in members if "amt_ray.clone_of" in run.data.tags]
    assert moved
    for run in moved:
        assert run.data.tags["amt_ray.clone_of"] in {other.info.run_id for other in members} - {run.info.run_id}
        now = {key: float(run.data.tags[f"hp.{key}"]) for key in (MASK, THROW)}  # the last move, of perhaps several
        assert now[MASK] + now[THROW] <= 15 / 16 + 1e-9 and f"hp/{MASK}" in run.data.metrics
        about = read_about(fetched(run.data.tags["amt_ray.checkpoint"]))
        assert about["experiment"]["masking"]["mask_ratio"] == now[MASK] != float(run.data.params[MASK])
    book = open_book(recorded(parent), prepare(recorded(parent)), parent)  # what a resumed sweep would start from
    assert len(book.entries) == 3 and not book.interrupted and book.next() == "finished"
    assert {e.run_id for e in book.entries.values() if e.now is not None} == {run.info.run_id for run in moved}


@pytest.mark.faults
def test_sweep__a_trial_whose_process_is_killed_goes_on_from_its_checkpoint(place, client):
    search = {"space": {MASK: {"grid": [0.3]}}, "max_failures": 1}
    killed, stop = [], threading.Event()

    def kill_after_two_epochs():
        while not killed and not stop.wait(0.2):
            found = client.get_experiment_by_name("mortal")
            runs = client.search_runs([found.experiment_id], "tags.`amt_ray.kind` = 'trial'") if found else []
            if runs and max(steps(client, runs[0].info.run_id, "train/loss"), default=0) >= 2:
                for process in psutil.Process().children(recursive=True):  # of this test's own Ray only
                    if "ImplicitFunc" in " ".join(process.cmdline()):
                        process.send_signal(signal.SIGKILL)
                        killed.append(time.time())

    watcher = threading.Thread(target=kill_after_two_epochs, daemon=True)
    watcher.start()
    parent = sweep(small("mortal", train__epochs=12, sweep=search), quiet())
    stop.set()
    watcher.join()
    (run,) = children(client, parent)
    assert killed and run.info.status == "FINISHED"
    points = client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in points] == list(range(1, 13))
    again = min(point.timestamp / 1000 for point in points if point.timestamp / 1000 > killed[0] + 0.5)
    print(f"\nmortal: {again - killed[0]:.1f} s from the fault to the end of the next epoch")


@pytest.mark.faults
def test_sweep__a_trial_whose_loss_is_not_finite_fails_once_and_the_others_go_on(place, client):
    search = {"space": {"optim.base_lr": {"grid": [1e-3, 1e30]}}, "max_failures": 3}
    console = quiet()
    with pytest.raises(
        RunFailedError, match=r"1 of 2 trials failed\. Go on with: amt-ray sweep --resume (\w+)"
    ) as told:
        sweep(small("infinite", masking__warmup_epochs=0, sweep=search), console)
    parent = str(told.value).rpartition(" ")[2]
    by_status = {run.info.status: run for run in children(client, parent)}
    assert by_status.keys() == {"FINISHED", "FAILED"} and client.get_run(parent).info.status == "FAILED"
    failed = by_status["FAILED"]
    assert failed.data.params["optim.base_lr"] == "1e+30" and "must stay finite" in failed.data.tags["amt_ray.error"]
    assert console.file.getvalue().count("  failed: ") == 1
    assert list(place.rglob(f"{parent}/**/tune-*")) and not list(place.rglob(f"{parent}/**/error.txt"))  # no other try


def command(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "MLFLOW_TRACKING_URI": ""}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [sys.executable, "-m", "amt_ray.cli", *arguments],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for(ready, process, seconds=120):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert process.poll() is None, process.communicate()[0]
        try:
            if found := ready():
                return found
        except Exception:  # the store is being made
            pass
        time.sleep(0.2)
    process.kill()
    raise AssertionError(process.communicate()[0])


@pytest.mark.faults
def test_sweep__ctrl_c_and_a_killed_driver_lose_no_trial_and_double_nothing(place, tmp_path):
    """One sweep: stopped by Ctrl-C, gone on with, its driver killed, gone on with to the end."""
    tree = {**TREE, "name": "stopped", "train": {"epochs": 8, "batch_size": 256}}
    tree["eval"] = {"every_epochs": 1}
    tree["sweep"] = {"space": {MASK: {"grid": [0.3, 0.4, 0.5]}}, "max_concurrent_trials": 1}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tree))
    store = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")

    def parent():
        runs = store.search_runs([store.get_experiment_by_name("stopped").experiment_id])
        return next(run.info.run_id for run in runs if run.data.tags["amt_ray.kind"] == "sweep")

    def trained(index, epoch):
        return lambda: any(
            run.data.tags["amt_ray.point"] == str(index)
            and max(steps(store, run.info.run_id, "train/loss"), default=0) >= epoch
            for run in children(store, parent())
        )

    first = command(tmp_path, "sweep", "x.yaml")
    wait_for(trained(0, 4), first)
    asked = time.monotonic()
    first.send_signal(signal.SIGINT)
    told = first.communicate(timeout=60)[0]
    assert time.monotonic() - asked < 30  # seconds, with room for a busy machine
    assert first.returncode == 1 and f"Go on with: amt-ray sweep --resume {parent()}" in told
    assert store.get_run(parent()).info.status == "KILLED"
    assert {run.info.status for run in children(store, parent())} == {"KILLED"}  # what trained is not left RUNNING

    second = command(tmp_path, "sweep", "--resume", parent())
    wait_for(trained(1, 3), second)
    ended = children(store, parent())[0]
    assert steps(store, ended.info.run_id, "train/loss") == list(range(1, 9))
    written = os.stat(ended.data.tags["amt_ray.checkpoint"]).st_mtime_ns
    second.kill()
    second.communicate()

    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        sweep(recorded(parent()), quiet(), parent())
    finally:
        os.chdir(before)
    trials = children(store, parent())
    assert len(trials) == 3 and {run.info.status for run in (*trials, store.get_run(parent()))} == {"FINISHED"}
    for run in trials:
        for key in ("train/loss", "eval/knn_top1"):
            assert steps(store, run.info.run_id, key) == list(range(1, 9))
    assert os.stat(trials[0].data.tags["amt_ray.checkpoint"]).st_mtime_ns == written
    assert equal_states(weights_of(trials[1]), trained_alone(trials[1], tmp_path / "alone"))


def test_sweep__leaves_no_placement_group_and_no_process_of_its_trials(place, client):
    search = {
        "space": {MASK: {"grid": [0.3, 0.5]}},
        "asha": {"grace_epochs": 1, "reduction_factor": 2},
        "share_warmup": False,
    }
    parent = sweep(small("groups", ray__num_workers=2, train__epochs=3, sweep=search), quiet())
    assert {run.info.status for run in children(client, parent)} == {"FINISHED"}
    until = time.monotonic() + 30
    while time.monotonic() < until and ray.available_resources().get("CPU", 0) < 2:
        time.sleep(0.5)
    assert ray.available_resources()["CPU"] == 2
    assert {group["state"] for group in ray.util.placement_group_table().values()} <= {"REMOVED"}
