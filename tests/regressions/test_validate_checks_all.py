"""What `validate` agrees to, starts: both call one check, before there is a run; `auto` is decided once.

Runs that fail after they were made, for reasons known before, are reported of most launchers, for instance
https://github.com/Lightning-AI/pytorch-lightning/issues/8268 (accelerators that are not there).
"""

import io
import sys
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient
from rich.console import Console

from amt_ray import cli
from amt_ray.address import read_file
from amt_ray.config import ConfigError, experiment_from, load_experiment
from amt_ray.runtime import preflight, resolve
from amt_ray.runtime.pretrain import pretrain
from amt_ray.runtime.sweep import sweep
from amt_ray.runtime.timing import estimated
from amt_ray.space import MASK, sweep_points
from amt_ray.trials import trial_experiment
from tests.tiny import TREE, tiny

HERE = {"ray__num_workers": 0, "train__epochs": 1, "masking__warmup_epochs": 0, "optim__warmup_epochs": 0}


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A folder with nothing in it, and no cluster."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def quiet():
    return Console(file=io.StringIO(), width=500)


def told(monkeypatch, capsys, *words):
    """Exit status and output of the command line."""
    monkeypatch.setattr(sys, "argv", ["amt-ray", *words])
    status = 0
    try:
        cli.main()
    except SystemExit as stop:
        status = stop.code or 0
    return status, *capsys.readouterr()


def missing_driver():
    """A database that MLflow knows, without its driver here."""
    return "mssql+pymssql://someone@localhost/runs"


WRONG = {
    "too many neighbours": ({"eval__options": {"knn": {"k": 5000}}}, "k must be at most the number of bank images"),
    "no data": ({"data__name": "imagefolder", "data__root": "nowhere"}, "data.root must be an existing folder"),
    "no weights": ({"model__checkpoint": "nowhere.pth"}, "nowhere.pth"),
    "no driver": ({"tracking__uri": missing_driver()}, "the driver of the tracking store's database must be installed"),
    "no such folder": (
        {"tracking__uri": "sqlite:///nowhere/x.db"},
        "the folder of the MLflow tracking store must exist",
    ),
    "too many workers": ({"ray__num_workers": 64}, "64 workers of 1 CPU must fit on this machine"),
    "storage": ({"ray__storage_path": "/proc/nowhere"}, "checkpoints must be writable at"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("start", [preflight.check, pretrain], ids=["validate", "pretrain"])
def test_start__refuses_what_validate_refuses_and_leaves_nothing_behind(kind, start, tmp_path):
    overrides, rule = WRONG[kind]
    experiment = tiny(**overrides)
    with pytest.raises(ConfigError, match=rule) as error:
        start(experiment, quiet())
    assert "\n" not in str(error.value) and "secret" not in str(error.value)
    assert not [path.name for path in tmp_path.iterdir()]  # no run, no store, no folder for checkpoints


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("workers", [0, 1])
def test_start__asks_for_no_gpu_where_there_is_none(workers):
    for start in (preflight.check, pretrain):
        with pytest.raises(
            ConfigError, match=r"ray.use_gpu must be false \(or auto\) where not every worker has a GPU"
        ):
            start(tiny(ray__num_workers=workers, ray__use_gpu=True), quiet())


def test_sweep__is_refused_for_the_inputs_of_any_of_its_points_and_for_the_workers_of_its_retraining():
    space = {"eval.options.knn.k": {"grid": [[5], [5000]]}}
    with pytest.raises(ConfigError, match="k must be at most the number of bank images, got 5000"):
        sweep(tiny(sweep={"space": space}), quiet())
    again = {"space": {MASK: {"grid": [0.3]}}, "retrain_best": {"ray.num_workers": 64}}
    with pytest.raises(ConfigError, match="64 workers of 1 CPU must fit on this machine"):
        sweep(tiny(sweep=again), quiet())


def test_validate__prints_the_estimate_and_then_the_refusal(monkeypatch, capsys, tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(TREE))
    status, out, err = told(monkeypatch, capsys, "validate", str(file), "--set", "eval.options={knn: {k: 5000}}")
    assert status == 2 and "# training: 4 epochs" in out and experiment_from(yaml.safe_load(out))
    assert err.splitlines()[-1].startswith("amt-ray: k must be at most the number of bank images, got 5000")


@pytest.mark.parametrize("how", ["--elsewhere", "ray.address", "RAY_ADDRESS"])
def test_validate__does_not_check_this_machine_for_work_that_goes_elsewhere_and_says_so(
    monkeypatch, capsys, tmp_path, how
):
    file = tmp_path / "x.yaml"
    changes = ["data.name=imagefolder", "data.root=/nowhere", "ray.use_gpu=true", "ray.num_workers=64"]
    changes += ["ray.address=10.0.0.1:6379"] if how == "ray.address" else []
    if how == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", "http://10.0.0.1:8265")
    file.write_text(yaml.safe_dump(TREE))
    words = [word for change in changes for word in ("--set", change)] + ["--elsewhere"] * (how == "--elsewhere")
    status, out, err = told(monkeypatch, capsys, "validate", str(file), *words)
    assert status == 0 and "use_gpu: true" in out
    assert "Not checked here, since the work goes elsewhere: GPUs and CPU cores, data.root" in " ".join(err.split())


def test_auto__is_decided_once_and_recorded_as_decided(monkeypatch, tmp_path):
    console = quiet()
    run_id = pretrain(tiny(ray__use_gpu="auto", **HERE), console)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    has = str(torch.cuda.is_available())
    assert client.get_run(run_id).data.params["ray.use_gpu"] == has
    assert yaml.safe_load(read_file(client, run_id, "config.yaml"))["ray"]["use_gpu"] is torch.cuda.is_available()
    assert f"ray.use_gpu: auto is {has.lower()} here (PyTorch sees" in console.file.getvalue()


@pytest.mark.parametrize(("gpus", "chosen"), [(0.0, False), (1.0, False), (2.0, True)])
def test_auto__is_a_gpu_where_there_is_one_for_each_worker(monkeypatch, gpus, chosen):
    monkeypatch.setattr(resolve, "gpus_here", lambda: gpus)
    experiment = tiny(ray__use_gpu="auto", ray__num_workers=2, sweep={"space": {MASK: {"grid": [0.3]}}})
    decided = resolve.resolved(experiment)
    assert decided.ray.use_gpu is decided.ray.on_gpu is chosen and decided.undecided == ()
    assert trial_experiment(decided, {MASK: 0.3}).ray.use_gpu is chosen
    assert resolve.resolved(decided) is decided


def test_auto__never_reaches_what_trains():
    unresolved = tiny(ray__use_gpu="auto")
    with pytest.raises(AssertionError, match="must be resolved"):
        _ = unresolved.ray.on_gpu
    assert estimated(unresolved, tflops=1.0).trials == 1
    again = {"space": {MASK: {"grid": [0.3]}}, "retrain_best": {"ray.use_gpu": "auto"}}
    with pytest.raises(ConfigError, match="must say what ray.use_gpu is, got auto"):
        sweep_points(tiny(sweep=again))


def test_own_images__trains_wherever_it_is_started():
    file = Path(cli.__file__).parents[1] / "experiments" / "own_images.yaml"
    assert load_experiment(file).ray.use_gpu == "auto"
