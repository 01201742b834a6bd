"""A real Ray of two CPUs, real workers and trials, a real MLflow store: all tests share one cluster."""

import json
import signal
import threading
import time

import psutil
import pytest

from amt_ray.config import protocol_options
from amt_ray.core.checkpoint import read_training, read_weights
from amt_ray.runtime import tracking
from amt_ray.runtime.evaluate import evaluate_all
from amt_ray.runtime.pretrain import pretrain
from amt_ray.runtime.storage import StoredCheckpoints, fetched, joined
from amt_ray.runtime.sweep import recorded, sweep
from amt_ray.runtime.trained import find
from tests.runtime.shared_ray import children, quiet, ray_in, steps
from tests.s3 import bucket
from tests.tiny import tiny

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def server():
    with bucket() as uri:
        yield uri


@pytest.fixture(scope="module")
def place(server, tmp_path_factory):
    """As everywhere, but the workers may use the S3 server."""
    folder = tmp_path_factory.mktemp("work")
    with ray_in(folder):
        yield folder


def kill_a_worker_when(ready):
    """In the background, SIGKILL one training process as soon as ``ready()``; the thread ends when it has done so."""

    def kill():
        for _ in range(600):
            for process in psutil.Process().children(recursive=True) if ready() else ():  # of this test's own Ray only
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    process.send_signal(signal.SIGKILL)
                    return
            time.sleep(0.1)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    return killer


def trained(client, experiment_name, epoch):
    """Whether MLflow has the epoch."""
    found = client.get_experiment_by_name(experiment_name)
    runs = client.search_runs([found.experiment_id]) if found else []
    return any(max(steps(client, run.info.run_id, "train/loss"), default=0) >= epoch for run in runs)


@pytest.mark.faults
def test_pretrain__two_workers_survive_a_killed_one_without_gap_or_double(place, client, server):
    storage = server.format("/runs")
    experiment = tiny(
        name="two_workers", ray__num_workers=2, ray__storage_path=storage, train__epochs=6, eval__every_epochs=3
    )
    killer = kill_a_worker_when(lambda: trained(client, "two_workers", 2))
    run_id = pretrain(experiment, quiet())
    assert not killer.is_alive()
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    for key in ("train/loss", "train/lr", "perf/images_per_s"):
        assert steps(client, run_id, key) == [1, 2, 3, 4, 5, 6]
    assert steps(client, run_id, "eval/knn_top1") == [3, 6] and steps(client, run_id, "test/knn_top1") == [6]
    assert run.data.params["masking.mask_ratio"] == "0.4" and run.data.params["ray.num_workers"] == "2"
    assert {"git.commit", "version.torch", "version.ray", "method", "strategy"} <= run.data.tags.keys()
    names = {file.path for folder in ("", "figures") for file in client.list_artifacts(run_id, folder)}
    assert {"config.yaml", "checkpoint.json", "figures/masks.png"} <= names
    checkpoint = json.loads(open(client.download_artifacts(run_id, "checkpoint.json")).read())["path"]
    assert checkpoint == joined(storage, "two_workers", run_id, "epoch_00006")
    training = read_training(fetched(checkpoint))
    assert training["epoch"] == 6 and len(training["random_states"]) == 2 and training["mlflow_run_id"] == run_id


def test_sweep__more_trials_than_slots_end_in_one_tree_and_the_best_is_trained_again(place, client):
    search = {
        "max_concurrent_trials": 4,
        "baselines": [{"masking.strategy": "random", "masking.mask_ratio": 0.75, "masking.throw_ratio": 0.0}],
        "space": {"masking.mask_ratio": {"grid": [0.3, 0.5]}, "masking.throw_ratio": {"grid": [0.2, 0.5]}},
        "retrain_best": {"ray.num_workers": 2},
    }
    console = quiet()
    parent = sweep(tiny(name="search", train__epochs=2, eval__every_epochs=1, sweep=search), console)
    experiment_id = client.get_run(parent).info.experiment_id
    runs = client.search_runs([experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    kinds = [child.data.tags["amt_ray.kind"] for child in runs]
    assert sorted(kinds) == ["retrain"] + ["trial"] * 4 + ["warmup"]  # 0.5 + 0.5 leaves nothing visible
    assert {child.info.status for child in (*runs, client.get_run(parent))} == {"FINISHED"}
    trials = [child for child in runs if child.data.tags["amt_ray.kind"] == "trial"]
    assert sorted(t.data.tags["amt_ray.point"] for t in trials) == ["0", "1", "2", "3"]
    assert [t.data.params["masking.strategy"] for t in trials if "amt_ray.baseline" in t.data.tags] == ["random"]
    for child in runs:
        epochs = [1] if child.data.tags["amt_ray.kind"] == "warmup" else [1, 2]
        assert steps(client, child.info.run_id, "train/loss") == epochs
        assert "amt_ray.checkpoint" in child.data.tags
    searched = [t for t in trials if "amt_ray.baseline" not in t.data.tags]  # a baseline is there to be compared with
    searched.sort(key=lambda t: int(t.data.tags["amt_ray.point"]))  # of equals, the first counts
    best = max(searched, key=lambda t: t.data.metrics["eval/knn_top1"])
    retrained = next(child for child in runs if child.data.tags["amt_ray.kind"] == "retrain")
    for key in ("masking.strategy", "masking.mask_ratio", "masking.throw_ratio"):
        assert retrained.data.params[key] == best.data.params[key]
    assert retrained.data.params["ray.num_workers"] == "2"
    assert "trial 4/4 done" in console.file.getvalue() and "1 infeasible" in console.file.getvalue()


def test_sweep__resumed_after_its_end_repeats_nothing(place, client):
    parent = next(
        run.info.run_id
        for run in client.search_runs([client.get_experiment_by_name("search").experiment_id])
        if run.data.tags["amt_ray.kind"] == "sweep"
    )
    experiment_id = client.get_run(parent).info.experiment_id
    before = len(client.search_runs([experiment_id]))
    assert sweep(recorded(parent), quiet(), parent) == parent
    assert len(client.search_runs([experiment_id])) == before


def test_sweep__trials_of_two_workers_and_asha_neither_hang_nor_leave_a_run_open(place, client):
    search = {
        "max_concurrent_trials": 2,
        "search": "optuna",
        "num_samples": 2,
        "space": {"masking.mask_ratio": {"uniform": [0.2, 0.8]}, "masking.throw_ratio": {"uniform": [0.1, 0.8]}},
        "asha": {"grace_epochs": 1, "reduction_factor": 2},
    }
    parent = sweep(tiny(name="pairs", ray__num_workers=2, train__epochs=2, eval__every_epochs=1, sweep=search), quiet())
    trials = children(client, parent)
    assert len(trials) == 2 and {t.info.status for t in trials} == {"FINISHED"}
    for t in trials:
        stopped = "amt_ray.stopped_early" in t.data.tags
        assert steps(client, t.info.run_id, "train/loss") in ([1], [1, 2]) and (
            stopped or "test/knn_top1" in t.data.metrics
        )


def test_checkpoint__of_workers_in_an_object_store_reads_back_as_one_of_a_folder(place, client, server):
    run = client.search_runs([client.get_experiment_by_name("two_workers").experiment_id])[0]
    run_place = joined(server.format("/runs"), "two_workers", run.info.run_id)
    epochs = [stored.epoch for stored in StoredCheckpoints(run_place).listed()]
    assert epochs in ([5, 6], [3, 5, 6])  # the newest two, and the best of the two that were probed
    weights, about = read_weights(fetched(run.data.tags["amt_ray.checkpoint"]))
    assert about["experiment"]["name"] == "two_workers" and "blocks.1.mlp.fc2.bias" in weights
    assert tracking.tracking_uri() == f"sqlite:///{place / 'mlflow.db'}"


@pytest.mark.faults
def test_evaluate__two_workers_one_of_them_killed_find_what_one_process_finds(place, client, monkeypatch):
    run_id = client.search_runs([client.get_experiment_by_name("two_workers").experiment_id])[0].info.run_id
    found = {}
    for workers in (2, 0):
        for name, settings in (("knn", ()), ("finetune-small-1", ("epochs=12", "warmup_epochs=1", "base_lr=0.02"))):
            model = find(run_id, None, None, [f"ray.num_workers={workers}", "ray.storage_path=runs"])
            if workers and name != "knn":
                killer = kill_a_worker_when(lambda: any(place.glob("**/evaluations/*/epoch_00003")))
            found[workers, name] = evaluate_all(
                [model], name, protocol_options(name, settings), quiet(), place / "results"
            )[0]
    assert not killer.is_alive()
    assert found[2, "knn"].metrics == pytest.approx(found[0, "knn"].metrics) and found[2, "knn"].workers == 2
    alone, together = (found[workers, "finetune-small-1"].metrics["test/finetune_top1"] for workers in (0, 2))
    assert together == pytest.approx(alone, abs=0.1) and alone > 0.2
    assert client.get_run(found[2, "knn"].run_id).data.tags["mlflow.parentRunId"] == run_id
