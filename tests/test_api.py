"""The same from Python."""

import subprocess
import sys

import pytest
import torch
import yaml

import amt_ray
from amt_ray.api import Run, Sweep
from amt_ray.config import ConfigError
from amt_ray.runtime import tracking
from tests.tiny import TREE, tiny

BASELINE = {"masking.strategy": "random", "masking.mask_ratio": 0.75, "masking.throw_ratio": 0.0}


def test_import__of_the_package_brings_neither_ray_nor_torch():
    program = "import sys, amt_ray; print([m for m in ('ray', 'torch', 'mlflow', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    assert {"load", "pretrain", "sweep", "evaluate", "encoder", "cost"} <= set(dir(amt_ray))
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        _ = amt_ray.train


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with a store of its own and an experiment file."""
    folder = tmp_path_factory.mktemp("api")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TREE))
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def run(place):
    experiment = amt_ray.load("tiny.yaml", **{"train.epochs": 2, "ray.num_workers": 0, "masking.mask_ratio": 0.35})
    return amt_ray.pretrain(experiment, quiet=True)


def test_load__takes_dotted_keys_with_values_of_any_kind(place):
    changes = {"attention.layers": [0, -1], "optim.clip_grad": None, "data.crop_scale": (0.5, 1.0), "seed": 3}
    experiment = amt_ray.load(place / "tiny.yaml", **changes)
    assert (experiment.attention.layers, experiment.optim.clip_grad, experiment.seed) == ((0, -1), None, 3)
    assert experiment.data.crop_scale == (0.5, 1.0)
    with pytest.raises(ConfigError, match="every key must be known, got train.epoch"):
        amt_ray.load(place / "tiny.yaml", **{"train.epoch": 5})


def test_cost__prints_what_the_experiment_comes_to(place):
    told = str(amt_ray.cost(amt_ray.load("tiny.yaml"), tflops=0.01))
    assert "4 epochs of 1,295 images" in told and "0.01 TFLOP/s" in told


def test_pretrain__gives_a_run_with_metrics_history_picture_and_checkpoint(run):
    assert run.status == "FINISHED" and run.name == "tiny" and run.params["masking.mask_ratio"] == "0.35"
    assert list(run.history().index) == [1, 2] and run.history()[2] == run.metrics["train/loss"]
    assert "test/knn_top1" in run.metrics and run.experiment.train.epochs == 2
    assert (run.checkpoint / "model.safetensors").is_file()
    assert run.picture().size[0] > 100


def test_encoder__of_a_run_or_its_file_is_a_module_that_embeds_images(run):
    images = torch.randn(3, 3, 16, 16)
    features = amt_ray.encoder(run).features(images)
    assert features.shape == (3, 16) and torch.equal(amt_ray.encoder(run.checkpoint).features(images), features)
    assert not amt_ray.encoder(run).training


def test_evaluate__measures_a_run_by_a_named_protocol(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")  # not where the run is
    found = amt_ray.evaluate(run, "knn", quiet=True, k=[5])
    assert {"eval/knn_top1", "test/knn_top1"} <= found.keys() and 0 < found["test/knn_top1"] <= 1


@pytest.fixture(scope="module")
def search(run, place):
    """A finished sweep as its runs say it, two points with two seeds and a baseline: nothing was trained."""
    space = {"masking.mask_ratio": {"grid": [0.3, 0.5]}}
    experiment = tiny(sweep={"space": space, "baselines": [BASELINE]})
    target = tracking.prepare(experiment)
    parent = tracking.start_run(target, "search", "sweep", {}, {})
    tracking.log_text(target, parent, "config.yaml", experiment.to_yaml())
    values = {(0.3, 0): 0.6, (0.3, 1): 0.7, (0.5, 0): 0.9, (0.5, 1): 0.3, (0.75, 0): 0.95}
    for (ratio, seed), value in values.items():
        point = BASELINE if ratio == 0.75 else {"masking.mask_ratio": ratio}
        tags = {"amt_ray.baseline": "true"} if ratio == 0.75 else {}
        trial = experiment.override({**point, "seed": seed})
        child = tracking.start_experiment_run(target, trial, f"{ratio}", "trial", tags, parent)
        target.client.log_metric(child, "eval/knn_top1", value)
        target.client.set_terminated(child)
    return Sweep(parent, target.uri)


def test_sweep__best_is_a_trial_of_the_point_with_the_best_mean_over_seeds(search):
    best = search.best
    assert (best.params["masking.mask_ratio"], best.params["seed"]) == ("0.3", "1")
    assert best.metrics["eval/knn_top1"] == 0.7 and isinstance(best, Run)


def test_sweep__frame_has_a_row_a_trial_with_the_keys_that_differ_as_numbers(search):
    frame = search.frame()
    assert len(frame) == 5 and list(frame.index) == [trial.id for trial in search.trials]
    assert frame["masking.mask_ratio"].tolist() == [0.3, 0.3, 0.5, 0.5, 0.75]
    assert frame["point"].tolist() == [0, 0, 1, 1, 2] and frame["baseline"].tolist() == [False] * 4 + [True]
    assert "train.epochs" not in frame and frame["masking.strategy"].tolist() == ["amt"] * 4 + ["random"]
    assert search.retrained is None


def test_sweep__compare_writes_the_page(search, place):
    page = search.compare(place / "report.html")
    assert page.is_file() and "masking.mask_ratio" in page.read_text()
