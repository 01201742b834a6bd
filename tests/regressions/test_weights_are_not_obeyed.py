"""A weights file says of what sizes its model is. Whatever else stands in its metadata is not obeyed."""

import json
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

import amt_ray
from amt_ray.config import ConfigError, located
from amt_ray.core.methods.mae import MAE
from amt_ray.runtime.evaluate import evaluate_all
from amt_ray.runtime.trained import export, find
from amt_ray.runtime.visualize import visualize
from tests.tiny import tiny


def weights(folder, **changes):
    """A weights file with a whole configuration in it, parts of which another person chose."""
    tree = tiny(data__flip=0.0).model_dump(mode="json")
    for key, value in changes.items():
        section, name = key.split("__")
        tree[section][name] = value
    torch.manual_seed(0)
    model = MAE(
        img_size=16,
        patch_size=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        decoder_embed_dim=16,
        decoder_depth=1,
        decoder_num_heads=2,
    )
    path = folder / "model.safetensors"
    about = {"format": 1, "experiment": tree}
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path, {"amt_ray": json.dumps(about)})
    return path


def test_find__takes_sizes_and_patches_and_nothing_else(tmp_path):
    hostile = {
        "tracking__uri": "http://127.0.0.1:9", "data__cache_dir": str(tmp_path / "cache"), "data__root": "/etc",
        "ray__address": "ray://127.0.0.1:9", "ray__storage_path": str(tmp_path / "runs"), "ray__num_workers": 7,
        "train__batch_size": 7 * 64, "model__checkpoint": "/etc/passwd",
    }  # fmt: skip
    experiment = find(None, weights(tmp_path, **hostile), None, ()).experiment
    wanted = tiny().model
    assert experiment.model == wanted and experiment.image_size == (16, 16) and experiment.data.name == "digits"
    defaults = located(type(experiment)(model=wanted, data=experiment.data, eval={"protocols": []}), find_data=False)
    assert experiment == defaults and experiment.data.root is experiment.data.cache_dir is None
    assert not (tmp_path / "cache").exists() and not (tmp_path / "runs").exists()


def test_evaluate_and_visualize__need_the_data_named_beside_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = weights(tmp_path)
    alone = find(None, path, None, ())
    for use in (
        lambda: evaluate_all([alone], "knn", {}, Console(quiet=True), tmp_path),
        lambda: visualize(alone, None, tmp_path),
    ):
        with pytest.raises(
            ConfigError, match="the data must be named beside weights, .* got .*model.safetensors alone"
        ):
            use()
    with pytest.raises(ConfigError, match="the data must be named beside weights"):
        amt_ray.evaluate(path, "knn", quiet=True)
    named = find(None, path, None, ["data.name=digits", "ray.num_workers=0", "data.flip=0"])
    found = evaluate_all([named], "knn", {}, Console(quiet=True), tmp_path)[0].metrics
    again = amt_ray.evaluate(path, "knn", quiet=True, experiment=tiny(ray__num_workers=0))
    assert found == again and 0.2 < found["eval/knn_top1"] <= 1
    assert export(alone, "safetensors", tmp_path / "out.safetensors").startswith("Wrote")


@pytest.mark.parametrize(("key", "kind"), [("data__name", "datasets"), ("model__method", "methods")])
def test_find__imports_no_module_that_a_file_names(tmp_path, monkeypatch, key, kind):
    (tmp_path / "planted_part.py").write_text("raise SystemExit('executed')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = weights(tmp_path, **{key: "planted_part"})
    with pytest.raises(ConfigError, match=f"a weights file can name {kind} of this package only, got planted_part"):
        find(None, path, None, ())
    path = weights(tmp_path, **{key: "os.path"})
    with pytest.raises(ConfigError, match=f"a weights file can name {kind} of this package only, got os.path"):
        find(None, path, None, ())
    assert "planted_part" not in sys.modules
