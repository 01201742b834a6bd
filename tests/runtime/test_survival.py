"""A whole run without Ray, as the command line starts it, to which something happens."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from amt_ray.core.checkpoint import read_weights
from amt_ray.runtime import tracking
from amt_ray.runtime.pretrain import RunFailedError, pretrain, recorded_experiment
from amt_ray.runtime.storage import StoredCheckpoints
from tests.runtime.faulty import passes, recovery, when_struck
from tests.runtime.shared_ray import quiet, steps
from tests.runtime.test_local import equal_states, train
from tests.runtime.test_storage import small_disk
from tests.runtime.tracking_server import Server
from tests.tiny import tiny

pytestmark = pytest.mark.faults
EPOCHS, STEPS = 4, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with its own store."""
    made, before = tmp_path_factory.mktemp("work"), os.getcwd()
    os.chdir(made)
    yield made
    os.chdir(before)


@pytest.fixture(scope="module")
def uninterrupted(folder):
    """The weights of a training to which nothing happens."""
    plain = tiny(train__epochs=EPOCHS, eval__protocols=[])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMT_RAY_CACHE", str(folder / "cache"))
        return read_weights(train(plain, folder / "uninterrupted"))[0]


def faulty(folder, name, at, what="tell", pause_s=0.05, **changes):
    """An experiment that meets a fault; the folder in which it tells of it."""
    told = folder / f"told_{name}"
    told.mkdir()
    options = {"folder": str(told), "pause_s": pause_s, "at": at, "what": what}
    fixed = {"eval__protocols": [], "train__epochs": EPOCHS, "ray__num_workers": 0}
    return told, tiny(name=name, model__method="tests.runtime.faulty", model__options=options, **fixed | changes)


def run_of(client, name):
    (run,) = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    return run


def check(client, name, weights):
    """One run at its end, every epoch once, the uninterrupted weights."""
    run = run_of(client, name)
    assert run.info.status == "FINISHED" and "amt_ray.retrained_epochs" not in run.data.tags
    for key in ("train/loss", "train/lr"):
        assert steps(client, run.info.run_id, key) == list(range(1, EPOCHS + 1))
    assert equal_states(read_weights(Path(run.data.tags["amt_ray.checkpoint"]))[0], weights)


@pytest.mark.parametrize(
    ("at", "number", "status"),
    [
        ("train 15", signal.SIGKILL, "RUNNING"),  # in the middle of the third epoch
        ("score 5", signal.SIGKILL, "RUNNING"),  # in the second refresh
        ("train 15", signal.SIGTERM, "KILLED"),
    ],
)
def test_process__that_is_ended_loses_at_most_an_epoch(folder, uninterrupted, at, number, status):
    name = f"{at[:5]}_{number.name}"
    told, experiment = faulty(folder, name, at, "KILL" if number == signal.SIGKILL else "tell")
    (told / "x.yaml").write_text(yaml.safe_dump(experiment.model_dump(mode="json")))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "amt_ray.cli", "pretrain", str(told / "x.yaml")],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if number == signal.SIGTERM:
        when_struck(told, lambda pid: os.kill(pid, number)).join(120)
    printed = process.communicate(timeout=120)[0]
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    run = run_of(client, name)
    assert run.info.status == status
    assert process.returncode == (1 if number == signal.SIGTERM else -number), printed
    assert (f"Go on with: amt-ray pretrain --resume {run.info.run_id}" in printed) == (number == signal.SIGTERM)
    assert pretrain(recorded_experiment(None, run.info.run_id), quiet(), run.info.run_id) == run.info.run_id
    check(client, name, uninterrupted)
    assert len(passes(told)) <= STEPS * (EPOCHS + 1)
    print(f"\n{name}: {recovery(told)}")


def test_full_disk__ends_the_run_and_with_room_it_goes_on(folder, uninterrupted):
    with small_disk(folder / "disk", "20m"):
        told, experiment = faulty(folder, "disk", "train 15", ray__storage_path=str(folder / "disk"))
        ballast = folder / "disk" / "ballast"

        def fill(pid):
            with suppress(OSError), open(ballast, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**12))

        filler = when_struck(told, fill)
        with pytest.raises(RunFailedError, match="the checkpoint of epoch 3 must be written whole.* no space left on"):
            pretrain(experiment, quiet())
        filler.join()
        client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
        run = run_of(client, "disk")
        assert run.info.status == "FAILED" and "no space left on" in run.data.tags["amt_ray.error"]
        assert StoredCheckpoints(folder / "disk" / "disk" / run.info.run_id).latest().name == "epoch_00002"
        ballast.unlink()
        pretrain(recorded_experiment(None, run.info.run_id), quiet(), run.info.run_id)
        check(client, "disk", uninterrupted)
        assert len(passes(told)) == STEPS * (EPOCHS + 1)


def test_checkpoint_of_another_architecture__is_refused_in_a_line(folder, tmp_path):
    kept = train(tiny(train__epochs=1, eval__protocols=[]), tmp_path)
    with pytest.raises(ValueError, match=r"a checkpoint to go on from must be of this model, got .*size mismatch") as e:
        train(tiny(train__epochs=2, eval__protocols=[], model__encoder__embed_dim=32), tmp_path)
    assert "\n" not in str(e.value) and StoredCheckpoints(tmp_path).latest() == kept


@pytest.mark.faults(slow=True)
@pytest.mark.parametrize("away_s", [60.0, None])
def test_tracking_server__away_for_a_minute_or_for_good_stops_no_run(folder, uninterrupted, monkeypatch, away_s):
    """Of a run of about two minutes; gone for good, what was told lies on disk and is delivered when one is there."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    name = "away" if away_s else "gone"
    (folder / name).mkdir()
    server = Server(folder / name)
    server.start()
    told, experiment = faulty(folder, name, "train 9", pause_s=5.0 if away_s else 0.5, tracking__uri=server.uri)

    def leave(pid):
        server.kill()
        if away_s:
            time.sleep(away_s)
            server.start()

    leaver = when_struck(told, leave)
    started = time.monotonic()
    run_id = pretrain(experiment, quiet())
    print(f"\nMLflow {name}: the run took {time.monotonic() - started:.0f} s")
    leaver.join()
    if away_s is None:
        server.start()
        left = tracking.deliver(tracking.prepare(experiment).outbox_folder(run_id), timeout_s=60)
        assert set(left.values()) == {0}
    client = MlflowClient(server.uri)
    assert client.get_run(run_id).info.status == "FINISHED"
    check(client, name, uninterrupted)
    assert threading.active_count() < 50
    server.kill()
