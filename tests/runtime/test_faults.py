"""Runs on a real cluster of several nodes, in which processes and machines are lost. Minutes: ``pytest -m faults``."""

import os
import re
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
import torch.distributed as dist
import yaml
from ray.core.generated import autoscaler_pb2

from amt_ray.core.checkpoint import read_weights
from amt_ray.core.ports import ProcessGroup, Silent
from amt_ray.runtime import cluster, local, ray_train
from amt_ray.runtime.pretrain import RunFailedError, pretrain, recorded_experiment
from amt_ray.runtime.storage import StoredCheckpoints
from tests.runtime.faulty import passes, recovery, when_struck
from tests.runtime.shared_ray import nodes_in, quiet, steps
from tests.runtime.test_local import equal_states
from tests.tiny import tiny

pytestmark = [pytest.mark.ray, pytest.mark.faults(slow=True)]
EPOCHS, STEPS, WORKERS = 6, 6, 2


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """A head on which no worker runs, and two nodes of one worker each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        patch.setattr(cluster, "START_ATTEMPT_S", 10.0)  # how long Ray waits for a node that is no more
        with nodes_in(tmp_path_factory.mktemp("shared"), head_cpus=0, others=WORKERS) as made:
            ray.init(made.cluster.address, _node_ip_address="127.0.0.2", log_to_driver=False, logging_level="ERROR")
            yield made
            ray.shutdown()


def faulty(nodes, name, **changes):
    """Two workers, one of which meets a fault; the folder in which it tells of it."""
    folder = nodes.folder / f"told_{name}"
    folder.mkdir()
    options = {"folder": str(folder), "pause_s": 0.1}
    options |= {key: changes.pop(key) for key in ("at", "what", "pause_s") if key in changes}
    settings = {"train__epochs": EPOCHS, "eval__protocols": [], "ray__num_workers": WORKERS} | changes
    return folder, tiny(
        name=name, model__method="tests.runtime.faulty", model__options=options,
        ray__address=nodes.cluster.address, ray__storage_path=str(nodes.folder / "runs"),
        tracking__uri=f"sqlite:///{nodes.folder / 'mlflow.db'}", **settings,
    )  # fmt: skip


def _rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=WORKERS)
    torch.set_num_threads(1)
    plain, ranks = tiny(train__epochs=EPOCHS, eval__protocols=[], ray__num_workers=WORKERS), ProcessGroup("cpu")
    local.run(plain, ranks, Silent(), StoredCheckpoints(folder / "run", ranks))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The weights of a training to which nothing happens, by two processes without Ray."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        torch.multiprocessing.spawn(_rank, (folder,), nprocs=WORKERS)
    return read_weights(StoredCheckpoints(folder / "run").latest())[0]


def node_of(nodes, pid):
    """The node whose raylet started a worker."""
    parents = {parent.pid for parent in psutil.Process(pid).parents()}
    return next(node for node in nodes.others if raylet_of(node).pid in parents)


def raylet_of(node):
    return node.all_processes["raylet"][0].process


def drained(node, seconds):
    """Tell the cluster that a node will be gone."""
    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = client.drain_node(node.node_id, reason, "to be taken", int(1000 * (time.time() + seconds)))
    assert accepted, why


def all_workers_end(folder):
    """Whether the processes that trained are gone, after a while."""
    until = time.monotonic() + 30
    while left := {pid for _, pid in passes(folder) if psutil.pid_exists(pid)}:
        if time.monotonic() > until:
            return not [pid for pid in left if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
        time.sleep(0.5)
    return True


def check(nodes, folder, run_id, weights=None, lost_epochs=1):
    """One run at its end, every epoch once, the uninterrupted weights, no process left; tells what it took."""
    client = nodes.client()
    run = client.get_run(run_id)
    runs = client.search_runs([run.info.experiment_id])
    assert [one.info.run_id for one in runs if one.data.params["name"] == run.data.params["name"]] == [run_id]
    assert run.info.status == "FINISHED"
    for key in ("train/loss", "train/lr"):
        assert steps(client, run_id, key) == list(range(1, EPOCHS + 1))
    if weights is not None:
        assert equal_states(read_weights(Path(run.data.tags["amt_ray.checkpoint"]))[0], weights)
        assert "amt_ray.retrained_epochs" not in run.data.tags
        assert len(passes(folder)) <= WORKERS * STEPS * (EPOCHS + lost_epochs)
    assert all_workers_end(folder)
    print(f"\n{run.data.params['name']}: {recovery(folder)}")


@pytest.mark.parametrize(("at", "what"), [("train 9", "KILL"), ("score 5", "KILL"), ("train 9", "TERM")])
def test_worker__ended_in_an_epoch_or_a_refresh_is_replaced(nodes, uninterrupted, at, what):
    folder, experiment = faulty(nodes, f"worker_{at[:5]}_{what}", at=at, what=what)
    check(nodes, folder, pretrain(experiment, quiet()), uninterrupted)


def test_straggler__is_waited_for(nodes, uninterrupted):
    folder, experiment = faulty(nodes, "straggler", at="train 9", what="STOP")

    def go_on_later(pid):
        time.sleep(5)
        os.kill(pid, signal.SIGCONT)

    watcher = when_struck(folder, go_on_later)
    check(nodes, folder, pretrain(experiment, quiet()), uninterrupted, lost_epochs=0)
    assert not watcher.is_alive()


@pytest.mark.parametrize("how", ["lost", "raylet", "drained"])
def test_node__that_goes_is_left_for_a_spare_one(nodes, uninterrupted, how):
    nodes.add()
    pause_s = 1.0 if how == "raylet" else 0.1  # it takes Ray some 13 s to see that a raylet is gone
    folder, experiment = faulty(nodes, f"node_{how}", at="train 9", what="tell", pause_s=pause_s, ray__max_failures=3)

    def act(pid):
        node = node_of(nodes, pid)
        if how == "raylet":
            raylet_of(node).kill()
            raylet_of(node).wait()  # as its parent does on a real node: workers take a zombie for alive
        if how == "drained":
            drained(node, 3)
            time.sleep(6)
        if how != "raylet":
            nodes.cluster.remove_node(node, allow_graceful=False)
        nodes.others.remove(node)

    watcher = when_struck(folder, act)
    check(nodes, folder, pretrain(experiment, quiet()), uninterrupted)
    assert not watcher.is_alive()


def test_not_finite__is_not_tried_again_on_new_workers(nodes):
    folder, experiment = faulty(nodes, "not_finite", at="train 999", optim__base_lr=1e30)
    with pytest.raises(RunFailedError, match=r"must stay finite, got \w+ in epoch \d at step \d of 6, of images \d+, "):
        pretrain(experiment, quiet())
    assert len({pid for _, pid in passes(folder)}) == WORKERS and all_workers_end(folder)
    client = nodes.client()
    (run,) = client.search_runs([client.get_experiment_by_name("not_finite").experiment_id])
    assert run.info.status == "FAILED" and "must stay finite" in run.data.tags["amt_ray.error"]
    epoch = 1 + len(steps(client, run.info.run_id, "train/loss"))
    (file,) = client.list_artifacts(run.info.run_id, "not_finite")
    assert file.path == f"not_finite/epoch_{epoch:05d}.json"


def test_elastic__fewer_workers_go_on_and_more_join_again(nodes, uninterrupted, monkeypatch):
    monkeypatch.setattr(ray_train, "RESIZE_EVERY_S", 3.0)
    folder, experiment = faulty(nodes, "elastic", at="train 9", what="tell", train__epochs=60, ray__min_workers=1)
    ended = []
    runner = threading.Thread(target=lambda: ended.append(pretrain(experiment, quiet())), daemon=True)
    runner.start()

    def wait_for(ready):
        until = time.monotonic() + 120
        while not ready():
            assert runner.is_alive() and time.monotonic() < until
            time.sleep(0.2)

    client = nodes.client()

    def counts():
        found = client.get_experiment_by_name("elastic")
        runs = client.search_runs([found.experiment_id]) if found else []
        return [int(p.value) for run in runs for p in client.get_metric_history(run.info.run_id, "perf/workers")]

    wait_for((folder / "struck").exists)
    lost = node_of(nodes, int((folder / "struck").read_text()))
    nodes.cluster.remove_node(lost, allow_graceful=False)
    nodes.others.remove(lost)
    wait_for(lambda: 1 in counts())
    nodes.add()
    wait_for(lambda: counts()[-1] == WORKERS)
    runner.join(200)
    (run_id,) = ended
    told = counts()
    changes = [n for i, n in enumerate(told) if i == 0 or n != told[i - 1]]
    assert changes == [2, 1, 2] and steps(client, run_id, "train/loss") == list(range(1, 61))
    assert client.get_run(run_id).info.status == "FINISHED"
    print(f"\nelastic: {recovery(folder)}")


def driver(nodes, experiment, folder):
    """A process that trains on the cluster."""
    (folder / "x.yaml").write_text(yaml.safe_dump(experiment.model_dump(mode="json")))
    return subprocess.Popen(
        [sys.executable, "-m", "amt_ray.cli", "pretrain", str(folder / "x.yaml")],
        cwd=nodes.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def goes_on(nodes, name, command=None):
    """Resume the experiment's run: by a command as it was printed, or as ``amt-ray pretrain --resume`` does."""
    client = nodes.client()
    (run,) = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    if command:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        subprocess.run(command, shell=True, check=True, cwd=nodes.folder, env=os.environ | {"PATH": path})
        return run, run.info.run_id
    again = recorded_experiment(tiny(tracking__uri=f"sqlite:///{nodes.folder / 'mlflow.db'}"), run.info.run_id)
    return run, pretrain(again, quiet(), run.info.run_id)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, "RUNNING"), (signal.SIGTERM, "KILLED")])
def test_driver__that_is_killed_leaves_no_worker_and_its_run_goes_on(nodes, uninterrupted, number, status):
    name = f"driver_{number.name}"
    folder, experiment = faulty(nodes, name, at="train 15", what="tell")
    process = driver(nodes, experiment, folder)
    when_struck(folder, lambda pid: process.send_signal(number)).join(120)
    told = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    printed = re.search(r"Stopped\. Go on with: ((?:MLFLOW_TRACKING_URI=\S+ )?amt-ray pretrain --resume \w+)\n", told)
    assert bool(printed) == (number == signal.SIGTERM)
    assert all_workers_end(folder)
    run, run_id = goes_on(nodes, name, printed and printed[1])
    assert run.info.status == status
    check(nodes, folder, run_id, uninterrupted)


def test_head__that_is_lost_ends_the_driver_and_a_new_cluster_goes_on(nodes, uninterrupted):
    """The last test of this cluster."""
    folder, experiment = faulty(nodes, "head", at="train 15", what="tell")
    process = driver(nodes, experiment, folder)
    when_struck(folder, lambda pid: None).join(120)
    ray.shutdown()
    nodes.close()
    assert process.wait(200) != 0
    with nodes_in(nodes.folder, head_cpus=0, others=WORKERS) as again:
        ray.init(again.cluster.address, _node_ip_address="127.0.0.2", log_to_driver=False, logging_level="ERROR")
        run, run_id = goes_on(again, "head")
        assert run.info.status in ("RUNNING", "FAILED")
        check(again, folder, run_id, uninterrupted)
        ray.shutdown()
