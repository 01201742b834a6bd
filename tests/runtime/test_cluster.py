"""A real Ray cluster of several nodes on this machine, one 127.0.0.x each; work reaches it through Ray Jobs."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import yaml
from rich.console import Console

from amt_ray.config import ConfigError
from amt_ray.runtime import shared_paths, submit
from amt_ray.runtime.cluster import concurrent_runs
from amt_ray.runtime.deadline import NoWorkersError
from amt_ray.runtime.pretrain import RunFailedError, pretrain
from amt_ray.runtime.tracking.environment import source
from amt_ray.runtime.trial_deadline import TrialDeadline
from tests.runtime.shared_ray import nodes_in
from tests.tiny import TREE, tiny

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    with nodes_in(tmp_path_factory.mktemp("shared")) as made:
        yield made


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    (folder / "base.yaml").write_text(yaml.safe_dump(TREE))
    (folder / "x.yaml").write_text("extends: base.yaml\nname: sent\nray: {num_workers: 2}\n")
    return str(folder / "x.yaml")


@pytest.fixture(scope="module")
def joined(nodes):
    """This process as a driver on the head."""
    ray.init(nodes.cluster.address, _node_ip_address="127.0.0.2", log_to_driver=False, logging_level="ERROR")
    yield nodes
    ray.shutdown()


def on_cluster(nodes, **overrides):
    return tiny(ray__address=nodes.cluster.address, tracking__uri="http://127.0.0.1:1/", **overrides)


def test_without_an_address__ray_is_started_and_none_that_is_known_here_is_joined(nodes):
    """Ray remembers the newest cluster of the machine; one that was killed would be waited for, for minutes."""
    program = (
        "import ray; from amt_ray.runtime.cluster import connected; from tests.tiny import tiny\n"
        "with connected(tiny()): print('joined', ray.get_runtime_context().gcs_address, len(ray.nodes()))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    _, address, count = done.stdout.splitlines()[-1].split()
    assert address != nodes.cluster.address and count == "1", done.stderr


def test_submit__trains_on_two_nodes_with_the_code_and_yaml_of_here(nodes, file):
    done = nodes.amt("submit", "pretrain", file, "--set", "train.epochs=2", "--set", "eval.protocols=[]")
    assert done.returncode == 0, done.stdout + done.stderr
    run_id = re.search(r"Run (\w+)", done.stdout)[1]
    run = nodes.client().get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.metrics.keys() >= {"train/loss"}
    assert run.data.params["name"] == "sent" and run.data.params["train.epochs"] == "2"
    assert source()["tags"].items() <= run.data.tags.items()  # the commit is known here only
    assert Path(run.data.tags["amt_ray.checkpoint"]).is_relative_to(nodes.folder / "runs")
    assert "SUCCEEDED, exit status 0" in submit.states(nodes.url, None)[0]


def test_submit__ends_with_the_verbs_own_exit_status_and_message(nodes):
    job, told = submit.submit(nodes.url, "pretrain", ["--resume", "none-such"]), []
    assert submit.follow(nodes.url, job, told.append) == 2
    assert "amt-ray: --run and --resume must name a run of this tracking store" in "".join(told)
    assert "".join(told) == submit.output(nodes.url, job)  # each line once


def test_status__with_another_token_is_refused_in_one_line(nodes, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    told = nodes.amt("status")
    assert told.returncode == 2 and "must be the cluster's token, got it refused by" in told.stderr
    assert told.stderr.count("\n") == 1


@pytest.mark.faults(slow=True)
def test_submit__ctrl_c_ends_the_following_and_stop_the_job(nodes, file):
    words = ("pretrain", file, "--set", "ray.num_workers=4")  # more than there are, so it waits, and says so
    with subprocess.Popen(
        nodes.command("submit", *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as p:
        lines = []
        while not lines or "Waiting up to 600 s for 4 workers of 1 CPU; there: 2 CPU" not in lines[-1]:
            lines.append(p.stdout.readline())
            assert lines[-1], "".join(lines) + p.stderr.read()
        p.send_signal(signal.SIGINT)
        told = p.communicate(timeout=30)[1]
    job = re.search(r"Job (\S+)\.", lines[0])[1]
    assert p.returncode == 130 and f"The job goes on. Follow: amt-ray logs --follow {job}" in told
    assert f"{job}  RUNNING" in nodes.amt("status", job).stdout
    assert f"{job}  STOPPED" in nodes.amt("stop", job).stdout
    followed = nodes.amt("logs", "--follow", job)
    assert followed.returncode == 1 and "Waiting up to 600 s" in followed.stdout
    runs = nodes.client().search_runs(["1"], "params.`ray.num_workers` = '4'")
    assert [run.info.status for run in runs] == ["KILLED"]


def test_workers__more_than_there_are_end_in_what_is_asked_and_what_is_there(joined):
    with pytest.raises(ConfigError) as error:
        concurrent_runs(on_cluster(joined, ray__num_workers=4, ray__start_timeout_s=1.0))
    rule = "4 workers of 1 CPU must fit within ray.start_timeout_s = 1 s, got 2 CPU, 0 GPU on 2 nodes, free 2 CPU"
    assert rule in str(error.value)
    assert concurrent_runs(on_cluster(joined, ray__num_workers=2)) == 1


def test_sweep__of_which_no_trial_runs_ends_in_time_and_one_that_runs_does_not(joined):
    deadline = TrialDeadline(on_cluster(joined, ray__start_timeout_s=0.2))
    waiting, running = SimpleNamespace(status="PENDING"), SimpleNamespace(status="RUNNING")
    for trials in ([waiting], [waiting, running], [waiting]):
        deadline.on_step_end(0, trials)
        time.sleep(0.3)
    with pytest.raises(
        NoWorkersError, match=r"a trial of 1 CPU must start within ray.start_timeout_s = 0.2 s, got 2 CPU"
    ):
        deadline.on_step_end(0, [waiting])


@pytest.fixture
def blind_node(joined):
    """A third node that sees an empty folder where the others see ``hidden``."""
    hidden, alone = joined.folder / "hidden", ["unshare", "--mount", *(["--map-root-user"] if os.getuid() else [])]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let a process have its own mounts")
    hidden.mkdir()
    (hidden / "image.png").touch()
    start = f"--address={joined.cluster.address} --node-ip-address=127.0.0.4 --num-cpus=1 --block"
    script = f"mount -t tmpfs none {hidden} && exec ray start {start} --object-store-memory=100000000"
    node = subprocess.Popen([*alone, "sh", "-c", script], stdout=subprocess.DEVNULL, start_new_session=True)
    while sum(one["Alive"] for one in ray.nodes()) < 3:
        assert node.poll() is None
        time.sleep(0.2)
    yield hidden
    os.killpg(node.pid, signal.SIGTERM)
    node.wait(30)


def test_shared_paths__a_node_that_lacks_one_is_named_with_it(joined, blind_node, monkeypatch):
    monkeypatch.setattr(shared_paths, "SEEN_WITHIN_S", 1.0)
    monkeypatch.setattr(shared_paths, "_tracking_places", lambda experiment: [])
    with pytest.raises(ConfigError) as error:
        shared_paths.check(on_cluster(joined, ray__storage_path=str(blind_node)))
    told = f"ray.storage_path must be one place for all nodes, got {blind_node} on node 127.0.0.4 ("
    assert told in str(error.value) and "the driver's file is not there" in str(error.value)
    with pytest.raises(ConfigError, match=r"data.root must be one .* on node 127.0.0.4 .*an empty folder"):
        shared_paths.check(
            on_cluster(joined, ray__storage_path=str(joined.folder / "runs"), data__root=str(blind_node))
        )
    assert [one.name for one in blind_node.iterdir()] == ["image.png"]


@pytest.mark.faults(slow=True)
def test_pretrain__a_node_that_is_lost_and_stays_away_ends_the_run_in_time(joined):
    experiment = tiny(
        name="lost", ray__num_workers=2, train__epochs=500, eval__protocols=[], ray__start_timeout_s=10.0,
        ray__address=joined.cluster.address, ray__storage_path=str(joined.folder / "runs"),
        tracking__uri=f"sqlite:///{joined.folder / 'mlflow.db'}",
    )  # fmt: skip

    def lose():
        while not list((joined.folder / "runs" / "lost").glob("*/epoch_00002*")):
            time.sleep(0.2)
        joined.cluster.remove_node(joined.others[0], allow_graceful=False)

    loser = threading.Thread(target=lose, daemon=True)
    loser.start()
    with pytest.raises(RunFailedError) as error:
        pretrain(experiment, Console(file=io.StringIO()))
    assert "2 workers of 1 CPU must start within ray.start_timeout_s = 10 s, got 1 CPU" in str(error.value)
    assert "amt-ray pretrain --resume" in str(error.value) and not loser.is_alive()
