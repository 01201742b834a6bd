"""Runs that were killed while they were made, started in another folder, or named to the wrong verb.

A relative storage path makes a resume elsewhere train anew (https://github.com/ray-project/ray/issues/48664 is one of
its kind); a killed process leaves runs RUNNING (https://github.com/mlflow/mlflow/issues/4248).
"""

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import ray
import torch
import yaml
from mlflow import MlflowClient

from amt_ray.address import to_type, tracking_uri
from amt_ray.cli import main
from amt_ray.config import ConfigError, experiment_from, load_experiment, located, overridden
from amt_ray.runtime import ledger, resuming, tracking
from amt_ray.runtime.cluster import connected
from amt_ray.runtime.pretrain import pretrain, recorded_experiment, storage_of
from amt_ray.runtime.storage import StoredCheckpoints
from amt_ray.runtime.sweep import _params, _start, recorded, sweep
from tests.runtime.shared_ray import quiet, steps
from tests.tiny import TREE, tiny

MASK = "masking.mask_ratio"
SWEEP = {"space": {MASK: {"grid": [0.3, 0.4]}}}
SHORT = {
    "ray__num_workers": 0, "train__epochs": 2, "eval__protocols": [], "masking__warmup_epochs": 0,
    "optim__warmup_epochs": 0, "data__train_images": 256, "masking__strategy": "random", "masking__throw_ratio": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The address of a store that all tests here share: a fresh one takes seconds to make."""
    torch.set_num_threads(1)
    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    tracking.prepare(tiny(tracking__uri=uri, name="first"))
    return uri


@pytest.fixture
def here(tmp_path, store, monkeypatch):
    """A working directory, and the store in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    return tmp_path


def run_of(run_id):
    return MlflowClient(tracking_uri()).get_run(run_id)


def cli(monkeypatch, capsys, *words):
    """Exit status, and the error printed."""
    monkeypatch.setattr(sys, "argv", ["amt-ray", *words])
    try:
        main()
    except SystemExit as ended:
        return ended.code, capsys.readouterr().err
    return 0, capsys.readouterr().err


# killed while a run is made


def killed_in(call, kind, uri, folder):
    """Make a run and die before a call of MLflow's client: nothing after it is done."""
    os.environ["MLFLOW_TRACKING_URI"] = uri
    setattr(MlflowClient, call, lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
    experiment = half_made(kind, folder)
    target = tracking.prepare(experiment)
    if kind == "sweep":
        _start(experiment, target)
    elif kind == "pretrain":
        tracking.start_experiment_run(target, experiment, "killed", kind)
    else:
        tracking.child_run(target, experiment, "killed", "0" * 32, kind, {ledger.WARMUP: "key"})


def half_made(kind, folder):
    search = {"sweep": {**SWEEP, "metric": "train/loss", "mode": "min", "force": True}} if kind == "sweep" else {}
    return tiny(name=f"half_{kind}", ray__storage_path=str(folder / "runs"), **SHORT, **search)


def kill(call, kind, uri, folder):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=killed_in, args=(call, kind, uri, folder))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def made(run):
    """What of a run is there."""
    names = {file.path for file in MlflowClient(tracking_uri()).list_artifacts(run.info.run_id)}
    marks = [key for key in run.data.tags if key.startswith("amt_ray.unmade")]
    return len(run.data.params), {"config.yaml", "environment.txt"} <= names, len(run.inputs.dataset_inputs), len(marks)


@pytest.mark.parametrize("call", ["log_batch", "log_artifacts", "log_inputs", "delete_tag"])
def test_pretraining__killed_while_its_run_was_made_is_completed_by_a_resume(here, store, monkeypatch, capsys, call):
    kill(call, "pretrain", store, here)
    client, wanted = MlflowClient(store), half_made("pretrain", here)
    experiment_id = client.get_experiment_by_name(wanted.name).experiment_id
    (run,) = client.search_runs([experiment_id], "attributes.status = 'RUNNING'")
    run_id = run.info.run_id
    assert made(run)[3] == 1 and made(run)[2] == (0 if call != "delete_tag" else 2)  # control: it is half made
    assert recorded_experiment(None, run_id) == wanted
    if call == "log_batch":
        status, told = cli(monkeypatch, capsys, "pretrain", "--resume", run_id)
        assert status == 0 and steps(client, run_id, "train/loss") == [1, 2], told
    else:
        tracking.complete(tracking.prepare(wanted), run_id, wanted, wanted.dotted())
        client.set_terminated(run_id)
    run = run_of(run_id)
    assert made(run) == (len(wanted.dotted()), True, 2, 0) and run.info.status == "FINISHED"
    assert run.data.params[MASK] == "0.4" and recorded_experiment(None, run_id) == wanted


@pytest.mark.parametrize("kind", ["sweep", "warmup"])
def test_sweep_and_child__killed_while_their_runs_were_made_are_completed(here, store, kind):
    kill("log_batch", kind, store, here)
    wanted = half_made(kind, here)
    target = tracking.prepare(wanted)
    (run,) = target.client.search_runs([target.experiment_id])
    run_id = run.info.run_id
    assert made(run)[:3] == (0, False, 0)
    if kind == "sweep":
        assert recorded(run_id) == wanted and recorded(run_id, ["sweep.num_samples=9"]).sweep.num_samples == 9
        tracking.complete(target, run_id, wanted, _params(wanted), inputs=False)
        assert made(run_of(run_id)) == (len(wanted.dotted()) + 3, True, 0, 0)
    else:
        tags = {ledger.WARMUP: "key"}
        assert tracking.child_run(target, wanted, "killed", "0" * 32, kind, tags) == run_id
        assert made(run_of(run_id)) == (len(wanted.dotted()), True, 2, 0)


def test_child__that_an_earlier_version_left_without_params_is_completed(here):
    experiment = tiny(name="earlier")
    target = tracking.prepare(experiment)
    tags = {"amt_ray.kind": "trial", "mlflow.parentRunId": "1" * 32, "amt_ray.point": "0"}
    run_id = target.client.create_run(target.experiment_id, tags=tags).info.run_id
    assert tracking.child_run(target, experiment, "x", "1" * 32, "trial", {"amt_ray.point": "0"}) == run_id
    assert made(run_of(run_id)) == (len(experiment.dotted()), True, 3, 0)


def test_run__whose_making_fails_does_not_stay_running(here, monkeypatch):
    target = tracking.prepare(tiny(name="fails"))
    for error, status in ((ValueError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED")):
        with monkeypatch.context() as broken:
            broken.setattr(MlflowClient, "log_artifacts", lambda *a, error=error: (_ for _ in ()).throw(error))
            with pytest.raises(type(error)):
                tracking.start_experiment_run(target, tiny(name="fails"), status, "pretrain")
        (run,) = target.client.search_runs([target.experiment_id], f"attributes.run_name = '{status}'")
        assert run.info.status == status


def test_resume__of_a_run_without_a_configuration_says_so_in_a_line(here, monkeypatch, capsys):
    target = tracking.prepare(tiny(name="bare"))
    run_id = target.client.create_run(target.experiment_id, tags={"amt_ray.kind": "pretrain"}).info.run_id
    status, told = cli(monkeypatch, capsys, "pretrain", "--resume", run_id)
    assert status == 2 and told.count("\n") == 1
    assert f"must name a run with its config.yaml, got {run_id} without it" in told


def test_configuration__of_any_length_is_carried_by_the_call_that_creates_the_run(here):
    space = {f"model.options.k{i}": {"grid": [os.urandom(16).hex() for _ in range(20)]} for i in range(40)}
    experiment = experiment_from(TREE | {"name": "long", "sweep": {"space": space}})
    tags = tracking.runs.packed(experiment.to_yaml())
    assert len(tags) > 1 and max(map(len, tags.values())) <= 4000
    assert yaml.safe_load(tracking.unpacked(tags)) == experiment.model_dump(mode="json")


# runs of a driver that has gone


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, SystemExit, ValueError])
def test_children__of_a_driver_that_ends_are_not_running(here, error):
    target = tracking.prepare(tiny(name="children"))
    parent = target.client.create_run(target.experiment_id).info.run_id

    def child(kind, status):
        tags = {"amt_ray.kind": kind, "mlflow.parentRunId": parent}
        run_id = target.client.create_run(target.experiment_id, tags=tags).info.run_id
        if status != "RUNNING":
            target.client.set_terminated(run_id, status)
        return run_id

    left = {child(kind, "RUNNING"): "KILLED" for kind in ("trial", "warmup", "retrain")}  # of a driver killed before
    ended = {child("trial", status): status for status in ("FINISHED", "FAILED", "KILLED")}
    ours = {}
    with pytest.raises(error) if error else nullcontext(), resuming.children_end(target, parent):
        assert {run_id: run_of(run_id).info.status for run_id in (left | ended)} == left | ended
        ours |= {child("trial", "RUNNING"): "KILLED", child("warmup", "RUNNING"): "KILLED"}
        if error:
            raise error
    assert {run_id: run_of(run_id).info.status for run_id in ours} == ours


# paths


def test_paths__of_an_experiment_are_absolute_those_of_its_sweep_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    tree = TREE | {
        "data": {**TREE["data"], "cache_dir": "cache"},
        "tracking": {"uri": "sqlite:///x.db?timeout=9"},
        "sweep": {
            "space": {"model.checkpoint": {"grid": ["a.pth", None, "s3://b/c.pth"]}},
            "baselines": [{"model.checkpoint": "d.pth", MASK: 0.5}],
            "retrain_best": {"data.root": "more"},
        },
    }
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tree))
    for found in (load_experiment(tmp_path / "x.yaml"), located(experiment_from(tree))):
        assert found.ray.storage_path == f"{tmp_path}/runs" and found.data.root == f"{tmp_path}/data"
        assert found.data.cache_dir == f"{tmp_path}/cache"
        assert found.tracking.uri == f"sqlite:///{tmp_path}/x.db?timeout=9"
        assert found.sweep.space["model.checkpoint"].grid == (f"{tmp_path}/a.pth", None, "s3://b/c.pth")
        assert found.sweep.baselines == ({"model.checkpoint": f"{tmp_path}/d.pth", MASK: 0.5},)
        assert found.sweep.retrain_best == {"data.root": f"{tmp_path}/more"}
        assert located(found) == found
    remote = tiny(ray__storage_path="s3://bucket/runs", tracking__uri="https://host/mlflow")
    assert located(remote).ray.storage_path == "s3://bucket/runs"
    assert located(remote).tracking.uri == "https://host/mlflow"
    # a folder "data" where a run is resumed is not its data
    assert overridden(tiny(), ["sweep.num_samples=2", "ray.max_failures=1"]).data.root is None


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, "sqlite:///HERE/mlflow.db"),
        ("sqlite:///x.db", "sqlite:///HERE/x.db"),
        ("sqlite:///HERE/x.db", "sqlite:///HERE/x.db"),
        ("sqlite+pysqlite:///a/x.db?mode=rw", "sqlite+pysqlite:///HERE/a/x.db?mode=rw"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("postgresql://host/db", "postgresql://host/db"),
        ("http://host:5000", "http://host:5000"),
    ],
)
def test_tracking_uri__names_its_file_from_the_root(tmp_path, monkeypatch, given, wanted):
    monkeypatch.chdir(tmp_path)
    given, wanted = given and given.replace("HERE", str(tmp_path)), wanted.replace("HERE", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if given:
        assert tracking_uri(tiny(tracking__uri=given)) == wanted
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert tracking_uri() == wanted
    assert to_type("amt-ray", located(tiny(tracking__uri=given))) == "amt-ray"


def test_target__of_a_relative_sqlite_address_is_the_same_store_from_every_folder(store, monkeypatch):
    monkeypatch.chdir(Path(tracking_sqlite(store)).parent)
    for experiment in (tiny(name="relative", tracking__uri="sqlite:///mlflow.db"), tiny(name="relative")):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
        target = tracking.prepare(experiment)
        assert target.uri == store
        with tempfile.TemporaryDirectory() as elsewhere, monkeypatch.context() as there:
            there.chdir(elsewhere)  # as a trial's process does
            run_id = tracking.start_experiment_run(target, experiment, "x", "trial")
            assert not os.listdir(elsewhere)
        assert MlflowClient(store).get_run(run_id).info.experiment_id == target.experiment_id


def test_cache_folder__of_a_relative_path_is_one_for_driver_and_workers(here, monkeypatch):
    monkeypatch.setenv("AMT_RAY_CACHE", "cache")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with connected(tiny()):
        assert os.environ["AMT_RAY_CACHE"] == str(here / "cache")


def tracking_sqlite(uri):
    return uri.removeprefix("sqlite:///")


@pytest.fixture(scope="module")
def stopped(store, tmp_path_factory):
    """A pretraining of a relative storage path, started in one folder and stopped after its last epoch."""
    folder = tmp_path_factory.mktemp("started")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store)
        patch.setenv("AMT_RAY_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        run_id = pretrain(tiny(name="stopped", **SHORT, ray__storage_path="runs"), quiet())
    return folder, run_id


def test_run__is_resumed_in_another_folder_from_its_own_checkpoints(here, store, stopped):
    folder, run_id = stopped
    client = MlflowClient(store)
    place = StoredCheckpoints(folder / "runs" / "stopped" / run_id)
    assert client.get_run(run_id).data.params["ray.storage_path"] == str(folder / "runs")
    client.set_terminated(run_id, "KILLED")
    place.place.remove("epoch_00002")
    assert pretrain(recorded_experiment(None, run_id), quiet(), run_id) == run_id
    assert not (here / "runs").exists() and [stored.epoch for stored in place.listed()] == [1, 2]
    assert steps(client, run_id, "train/loss") == [1, 2] and client.get_run(run_id).info.status == "FINISHED"
    assert "amt_ray.retrained_epochs" not in client.get_run(run_id).data.tags  # it went on, and did not begin anew


def test_resume__that_finds_no_checkpoint_where_mlflow_has_epochs_is_refused(here, store, monkeypatch, capsys):
    target = tracking.prepare(tiny(name="moved"))
    run_id = tracking.start_experiment_run(target, located(tiny(name="moved", **SHORT)), "x", "pretrain")
    place = here / "runs" / "moved" / run_id
    target.client.log_metric(run_id, "train/loss", 1.0, step=1)
    target.client.log_metric(run_id, "train/loss", 0.9, step=2)
    status, told = cli(monkeypatch, capsys, "pretrain", "--resume", run_id)
    assert status == 2 and told.count("\n") == 1
    assert f"must find its checkpoints, got none in {place} for run {run_id}, of which MLflow has 2 epochs" in told
    assert not (here / "runs").exists()
    # an earlier version recorded the path as it was given
    tracking.log_text(target, run_id, "config.yaml", tiny(name="moved", **SHORT, ray__storage_path="old").to_yaml())
    assert f"got none in {here}/old/moved" in cli(monkeypatch, capsys, "pretrain", "--resume", run_id)[1]


def test_resume__after_a_kill_before_the_first_checkpoint_starts_anew_and_says_so(here, store):
    experiment = located(tiny(name="first", **SHORT | {"train__epochs": 1}))
    target = tracking.prepare(experiment)
    run_id = tracking.start_experiment_run(target, experiment, "x", "pretrain")
    target.client.log_metric(run_id, "train/loss", 1.0, step=1)
    Path(storage_of(experiment)).mkdir(parents=True)
    console = quiet()
    assert pretrain(recorded_experiment(None, run_id), console, run_id) == run_id
    assert f"Run {run_id} was stopped before its first checkpoint" in console.file.getvalue()


def test_sweep__that_finds_none_of_its_trials_checkpoints_is_refused(here, store):
    experiment = located(half_made("sweep", here).override({"name": "lost"}))
    target = tracking.prepare(experiment)
    parent = _start(experiment, target)

    def trial(status):
        tags = {"amt_ray.kind": "trial", "mlflow.parentRunId": parent}
        run_id = target.client.create_run(target.experiment_id, tags=tags).info.run_id
        for step in (1, 2):
            target.client.log_metric(run_id, "train/loss", 1.0, step=step)
        target.client.set_terminated(run_id, status)
        return run_id

    trial("FINISHED")
    resuming.check_trials(target, parent, storage_of(experiment))  # nothing of it is to go on
    forked, whole = trial("KILLED"), trial("FINISHED")  # the first has the epochs of a warm-up, and none of its own
    with pytest.raises(ConfigError, match=f"got none in {storage_of(experiment)} for sweep {parent}, .* {forked} .* 2"):
        sweep(recorded(parent), quiet(), parent)
    StoredCheckpoints(Path(storage_of(experiment)) / whole).save(2, {}, lambda folder: (folder / "x").touch())
    resuming.check_trials(target, parent, storage_of(experiment))


def test_resume__in_a_folder_without_the_store_makes_none(here, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    for verb in ("pretrain", "sweep"):
        status, told = cli(monkeypatch, capsys, verb, "--resume", "0" * 32)
        assert status == 2 and f"(there is no {here}/mlflow.db)" in told and not os.listdir(here)


def test_resume__goes_on_in_the_store_where_the_run_was_found(here, store, tmp_path):
    experiment = tiny(name="copied", tracking__uri=store)
    target = tracking.prepare(experiment)
    run_id = tracking.start_experiment_run(target, experiment, "x", "pretrain")
    shutil.copy(tracking_sqlite(store), tmp_path / "copy.db")
    os.environ["MLFLOW_TRACKING_URI"] = "sqlite:///copy.db"  # `here` restores it
    assert recorded_experiment(None, run_id).tracking.uri == f"sqlite:///{tmp_path}/copy.db"


# the right verb


@pytest.mark.parametrize("verb", ["pretrain", "sweep"])
@pytest.mark.parametrize("kind", ["pretrain", "sweep", "trial", "warmup", "retrain", "evaluate", "other"])
def test_resume__takes_runs_of_its_verb_and_names_the_verb_of_others(here, monkeypatch, capsys, verb, kind):
    if verb == kind:
        return
    experiment = half_made("sweep" if kind == "sweep" else "pretrain", here).override({"name": "kinds"})
    target = tracking.prepare(experiment)
    run_id = tracking.start_experiment_run(target, experiment, "x", kind, parent="9" * 32)
    status, told = cli(monkeypatch, capsys, verb, "--resume", run_id)
    wanted = {
        "pretrain": f"resume it with amt-ray pretrain --resume {run_id}.",
        "sweep": f"resume it with amt-ray sweep --resume {run_id}.",
        "evaluate": "resume it with the amt-ray evaluate command that started it.",
        "other": f"must name a {verb} run of amt-ray, got {run_id}",
    }
    assert status == 2 and told.count("\n") == 1
    assert wanted.get(kind, f"resume it with amt-ray sweep --resume {'9' * 32}, the sweep that it belongs to.") in told
    assert run_of(run_id).info.status == "RUNNING"  # as it was


def test_resume__of_a_deleted_run_is_refused(here, monkeypatch, capsys):
    target = tracking.prepare(tiny(name="gone"))
    run_id = tracking.start_experiment_run(target, tiny(name="gone"), "x", "pretrain")
    target.client.delete_run(run_id)
    status, told = cli(monkeypatch, capsys, "pretrain", "--resume", run_id)
    assert status == 2 and "must name a run that is not deleted" in told


def no_ray(monkeypatch):
    def started(*arguments, **named):
        raise AssertionError("Ray must not be started")

    monkeypatch.setattr(ray, "init", started)


def test_resume__of_a_finished_pretraining_says_so_and_starts_nothing(here, store, stopped, monkeypatch, capsys):
    folder, run_id = stopped
    no_ray(monkeypatch)
    client = MlflowClient(store)
    client.set_terminated(run_id, "FINISHED")
    before = client.get_run(run_id)
    tree = yaml.safe_load(recorded_experiment(None, run_id).to_yaml())
    tree["ray"]["num_workers"] = 1
    tracking.log_text(tracking.Target(store, before.info.experiment_id), run_id, "config.yaml", yaml.safe_dump(tree))
    console = quiet()
    assert pretrain(recorded_experiment(None, run_id), console, run_id) == run_id
    assert console.file.getvalue() == f"Run {run_id} is finished, all 2 epochs: nothing to do.\n"
    shutil.move(folder / "runs", folder / "kept")
    console = quiet()
    pretrain(recorded_experiment(None, run_id), console, run_id)
    assert f"(its checkpoints are no longer in {folder}/runs/stopped/{run_id})" in console.file.getvalue()
    shutil.move(folder / "kept", folder / "runs")
    assert run_of(run_id).info == before.info and not (here / "runs").exists()
    assert cli(monkeypatch, capsys, "pretrain", "--resume", run_id) == (0, "")


def test_resume__of_a_finished_sweep_ranks_it_and_starts_no_ray(here, monkeypatch):
    no_ray(monkeypatch)
    search = {"name": "done", "eval__every_epochs": 1, "train__epochs": 2, "masking__warmup_epochs": 1}
    experiment = located(tiny(**search, sweep={"space": {MASK: {"grid": [0.3, 0.4]}}}))
    target = tracking.prepare(experiment)
    parent = _start(experiment, target)
    for index, ratio in enumerate((0.3, 0.4)):
        task = {"index": index, "point": {MASK: ratio}, "seed": 0, "baseline": False, "epochs": None, "drawn": None,
                "member": 0}  # fmt: skip
        own = experiment.override({MASK: ratio, "sweep": None})
        run_id = tracking.child_run(target, own, "x", parent, "trial", ledger.trial_tags(task))
        for step in (1, 2):
            target.client.log_metric(run_id, "train/loss", 1.0, step=step)
            target.client.log_metric(run_id, "eval/knn_top1", ratio, step=step)
        tracking.finish(target, run_id, "FINISHED")
    console = quiet()
    assert sweep(recorded(parent), console, parent) == parent
    told = console.file.getvalue()
    assert "nothing is left to run" in told and "eval/knn_top1 0.4000" in told
