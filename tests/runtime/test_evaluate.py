"""Evaluations of finished runs and of files: figures, records, going on, and what is refused before anything starts."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from rich.console import Console
from scipy.stats import bootstrap, ttest_1samp

from amt_ray.config import ConfigError, protocol_options
from amt_ray.core.ports import Solo
from amt_ray.protocols import presets, protocol
from amt_ray.runtime import evaluate as evaluating_module
from amt_ray.runtime.evaluate import evaluate_all, interval, summary
from amt_ray.runtime.pretrain import RunFailedError, pretrain
from amt_ray.runtime.splits import load_splits
from amt_ray.runtime.storage import StoredCheckpoints
from amt_ray.runtime.trained import export, find
from tests.core import dataset_files
from tests.runtime.test_local import SHAPES
from tests.tiny import tiny


def quiet():
    return Console(file=io.StringIO(), width=120)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two seeds of a run on shapes, probed in two ways while training, and their tracking store."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMT_RAY_CACHE", str(folder / "cache"))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.chdir(folder)
        settings = {"ray__num_workers": 0, "ray__storage_path": str(folder / "runs")} | SHAPES
        probes = {"eval__protocols": ["knn", "linear-fast-1"], "eval__options": {"linear-fast-1": {"epochs": 3}}}
        runs = [pretrain(tiny(**settings, **probes, seed=seed), quiet()) for seed in (0, 1)]
    return runs, f"sqlite:///{folder / 'mlflow.db'}"


@pytest.fixture(autouse=True)
def _store(store, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store[1])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def client(store):
    return MlflowClient(store[1])


def evaluated(runs, folder, name, *settings, overrides=(), test=True):
    models = [find(run, None, None, overrides) for run in runs]
    return evaluate_all(models, name, protocol_options(name, settings), quiet(), folder, test)


def evaluations(client, run_id):
    runs = client.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{run_id}'")
    return [run for run in runs if run.data.tags.get("amt_ray.kind") == "evaluate"]


def test_pretraining__measures_every_protocol_asked_for(store, client):
    metrics = client.get_run(store[0][0]).data.metrics
    assert {"eval/knn_top1", "eval/linear_top1", "test/knn_top1", "test/linear_top1"} <= metrics.keys()


def test_evaluate__gives_what_the_protocol_gives_and_records_all_of_it(store, client, tmp_path):
    results = evaluated(store[0], tmp_path / "out", "knn", "k=[5,10]")
    for run_id, result in zip(store[0], results, strict=True):
        model = find(run_id, None, None, ())
        task = load_splits(model.experiment).task
        wanted = protocol("knn", {"k": [5, 10]})(model.encoder(), task, Solo(), test=True)
        assert result.metrics == wanted and "test/knn10_top1" in wanted
        child = next(r for r in evaluations(client, run_id) if r.info.run_id == result.run_id)
        assert child.info.status == "FINISHED" and child.data.metrics == pytest.approx(wanted)
        told = json.loads(client.get_run(run_id).data.tags["amt_ray.eval.knn-20-t0.07"])
        assert told["protocol"] == result.protocol == "knn-20-t0.07+k=5,10" and told["run"] == result.run_id
        assert told["eval/knn_top1"] == wanted["eval/knn_top1"]
    files = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    assert sorted(file["run_id"] for file in files) == sorted(result.run_id for result in results)
    file = next(file for file in files if file["run_id"] == results[0].run_id)
    assert file["settings"]["k"] == [5, 10] and file["settings"]["temperature"] == 0.07 and file["workers"] == 1
    assert file["data"]["name"] == "shapes" and file["data"]["image_size"] == 16 and file["encoder"]["depth"] == 2
    train, held_out = len(task.train_index), len(task.val_index)
    assert (file["data"]["train"], file["data"]["held_out"]) == (train, held_out)
    assert file["weights"] != files[1 - files.index(file)]["weights"]


def test_summary__has_mean_deviation_and_interval_over_models(store, tmp_path):
    results = evaluated(store[0], tmp_path, "knn")
    out = quiet()
    out.print(summary(results))
    shown = out.file.getvalue()
    values = [result.metrics["eval/knn_top1"] for result in results]
    row = next(line for line in shown.splitlines() if "eval/knn_top1" in line)
    assert [f"{value:.4f}" in row for value in values] == [True, True] and f"{np.mean(values):.4f}" in row
    assert "knn-20-t0.07" in shown and "95% interval" in shown


def test_summary__never_mixes_protocols_or_data(store, tmp_path):
    """Two runs whose experiments ask for other neighbours, or that learn from other images, have no mean."""
    first = evaluated(store[0][:1], tmp_path, "knn")
    for other in (
        evaluated(store[0][1:], tmp_path, "knn", "k=7"),
        evaluated(store[0][1:], tmp_path, "knn", overrides=["data.val_fraction=0.3"]),
    ):
        out = quiet()
        out.print(summary(first + other))
        shown = out.file.getvalue()
        assert "not to be compared" in shown and "mean" not in shown
        assert other[0].protocol in shown and f"{other[0].data['train']} train" in shown
    assert len(list(tmp_path.glob("*.json"))) == 3


def test_summary__shows_what_only_some_models_have(store, tmp_path):
    results = evaluated(store[0], tmp_path, "box_energy", test=False)
    shallow = dict(list(results[1].metrics.items())[:2])
    out = quiet()
    out.print(summary([results[0], dataclasses.replace(results[1], metrics=shallow)]))
    row = next(line for line in out.file.getvalue().splitlines() if "box_energy_layer_01" in line)
    assert " - " in row and "to" not in row


def test_evaluate__files_of_every_format_give_what_their_run_gives(store, tmp_path):
    run, told = find(store[0][0], None, None, ()), tmp_path / "e.yaml"
    told.write_text(run.experiment.to_yaml())
    for name in ("mae.pth", "timm.pth", "safetensors.safetensors"):
        export(run, Path(name).stem, tmp_path / name)
    public = torch.load(tmp_path / "mae.pth", weights_only=True)  # as the public fine-tuned files are
    encoder = {key: value for key, value in public["model"].items() if "decoder" not in key and key != "mask_token"}
    pooled = {key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key: encoder[key] for key in encoder}
    torch.save(
        {"model": {**pooled, "head.weight": torch.zeros(3, 16), "head.bias": torch.zeros(3)}}, tmp_path / "f.pth"
    )
    files = ["mae.pth", "timm.pth", "safetensors.safetensors", "f.pth"]
    models = [run, *(find(None, tmp_path / name, told, ()) for name in files)]
    results = evaluate_all(models, "knn", {}, quiet(), tmp_path / "out")
    assert all(result.metrics == results[0].metrics for result in results)
    assert len({result.weights for result in results}) == 5 and all(r.data == results[0].data for r in results)


def test_interval__is_that_of_students_t():
    values = [0.61, 0.64, 0.60, 0.66]
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval(values) == (f"{np.mean(values):.4f}", f"{np.std(values, ddof=1):.4f}", f"{low:.4f} to {high:.4f}")
    normal = bootstrap((values,), np.mean, rng=0).confidence_interval
    assert low < normal.low and high > normal.high  # a few seeds tell less than their spread suggests


def test_evaluate__stopped_goes_on_with_the_same_run_to_the_same_figures(store, client, monkeypatch, tmp_path):
    asked = (store[0][:1], tmp_path, "finetune-small-1", "epochs=4", "warmup_epochs=1", "batch_size=64")
    saved, save = [], StoredCheckpoints.save

    def stopping(self, epoch, *args):
        save(self, epoch, *args)
        saved.append(epoch)
        if saved == [1, 2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(StoredCheckpoints, "save", stopping)
    with pytest.raises(RunFailedError, match="The same command goes on"):
        evaluated(*asked)
    killed = [run for run in evaluations(client, store[0][0]) if run.info.status == "KILLED"]
    assert len(killed) == 1 and not list(tmp_path.glob("*.json"))
    resumed = evaluated(*asked)[0]
    assert saved == [1, 2, 3, 4] and resumed.run_id == killed[0].info.run_id
    alone = evaluated(*asked)[0]
    assert saved == [1, 2, 3, 4, 1, 2, 3, 4] and alone.run_id != resumed.run_id and alone.metrics == resumed.metrics


@pytest.mark.parametrize(
    ("name", "settings", "prefix"),
    [
        ("box-energy-1", (), "box_energy_layer_00"),
        ("detection-fast-1", ("epochs=1", "channels=8", "rois=8", "proposals=8", "warmup_steps=0"), "box_ap50"),
        ("linear-seg-fast-1", ("epochs=1", "warmup_steps=0"), "miou"),
        ("mae-linear-90", ("epochs=1", "warmup_epochs=0"), "linear_top1"),
    ],
)
def test_evaluate__any_protocol_measures_a_run_on_shapes(store, tmp_path, name, settings, prefix):
    result = evaluated(store[0][:1], tmp_path, name, *settings, test=False)[0]
    assert f"eval/{prefix}" in result.metrics and not any(key.startswith("test/") for key in result.metrics)


def test_evaluate__detection_runs_on_tiny_imagenets_boxes(store, tmp_path):
    dataset_files.tiny_imagenet(tmp_path / "data")
    overrides = [f"data={{name: tiny_imagenet, root: {tmp_path / 'data'}, image_size: 16, val_fraction: 0.4}}"]
    settings = ("epochs=1", "channels=8", "rois=8", "proposals=8")
    found = evaluated(store[0][:1], tmp_path, "detection-fast-1", *settings, overrides=overrides)[0].metrics
    assert set(found) == {f"{split}/box_{name}" for split in ("eval", "test") for name in ("ap", "ap50")}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("nearest", (), "an evaluation protocol must be one of .*knn-20-t0.07.*, got nearest"),
        ("knn", ("neighbours=3",), "must be of: k, temperature, features.*, got neighbours"),
        ("knn", ("temperature=-1",), "k and temperature must be above 0"),
        ("knn", ("k=many",), "must have the types of"),
        ("knn", ("k",), "--option must be key.path=value, got 'k'"),
    ],
)
def test_protocol_options__say_in_a_line_what_is_wrong(name, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        protocol_options(name, settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings", "data", "message"),
    [
        ("knn", ("k=[5000]",), None, "k must be at most the number of bank images, got 5000"),
        ("detection", (), "digits", "images with objects in train and test, got images without objects"),
        ("segmentation", (), "digits", "images with label maps in train and test"),
        ("box_energy", ("layers=9",), None, "for 2 blocks, got 9"),
    ],
)
def test_evaluate__data_that_a_protocol_cannot_take_are_refused_before_there_is_a_run(
    store, client, monkeypatch, tmp_path, name, settings, data, message
):
    overrides = [f"data={{name: {data}, image_size: 16}}"] if data else []
    before = len(evaluations(client, store[0][0]))
    monkeypatch.setattr(evaluating_module, "run_protocol", None)
    with pytest.raises(ConfigError, match=message):
        evaluated(store[0][:1], tmp_path, name, *settings, overrides=overrides)
    assert len(evaluations(client, store[0][0])) == before


def test_evaluate__label_maps_with_unknown_classes_are_refused_before_there_is_a_run(
    store, client, monkeypatch, tmp_path
):
    dataset_files.labelmaps(tmp_path / "data")
    Image.fromarray(np.full((12, 16), 9, np.uint8)).save(tmp_path / "data/annotations/validation/2.png")
    monkeypatch.setattr(evaluating_module, "run_protocol", None)
    overrides = [f"data={{name: labelmaps, root: {tmp_path / 'data'}, image_size: 16, val_fraction: 0.4}}"]
    with pytest.raises(ConfigError, match="must hold classes below 3, got 8 in .*validation/2.png"):
        evaluated(store[0][:1], tmp_path, "linear-seg-fast-1", overrides=overrides)


def test_pretraining__notes_which_protocols_its_figures_are_of(store, client):
    assert client.get_run(store[0][0]).data.tags["amt_ray.protocols"] == "knn-20-t0.07, linear-fast-1+epochs=3"


def test_presets__every_name_is_of_one_protocol_only():
    for name, preset in presets().items():
        assert protocol(name) is preset or protocol(name) == preset
        assert preset.protocol == name


def test_command__evaluates_a_checkpoint_and_prints_the_table(store, tmp_path):
    path = find(store[0][0], None, None, ()).path
    command = [sys.executable, "-m", "amt_ray.cli", "evaluate", "knn", "--checkpoint", str(path), "--option", "k=3"]
    data = ["--set", "data.name=digits", "--set", "data.flip=0", "--set", "ray.num_workers=0"]
    done = subprocess.run([*command, *data, "--no-test"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "knn-20-t0.07+k=3" in done.stdout and "eval/knn_top1" in done.stdout and "test/" not in done.stdout
    assert json.loads(next((tmp_path / "results").glob("knn-20-t0.07-*.json")).read_text())["model"] == str(path)
    done = subprocess.run([*command[:5], "--option", "k=3"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "amt-ray: at least one --run or --checkpoint must be given, got none.\n"


def test_evaluate__keeps_the_options_that_an_experiment_has_for_the_protocol(tmp_path):
    experiment = tiny(eval__protocols=["knn"], eval__options={"knn": {"k": [3], "temperature": 0.2}})
    assert experiment.evaluated_by("knn", {"k": 4}).eval.chosen == [protocol("knn", {"k": 4, "temperature": 0.2})]
    assert experiment.evaluated_by("linear-fast-1", {}).eval.chosen == [protocol("linear-fast-1")]
