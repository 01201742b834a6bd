"""From a run to its weights, pictures and exported files."""

import io
import json
import subprocess
import sys
import tempfile

import pytest
import timm
import torch
from PIL import Image
from rich.console import Console

from amt_ray.config import ConfigError
from amt_ray.core.checkpoint import read_weights
from amt_ray.core.weights import build_encoder, read_state
from amt_ray.runtime.pretrain import pretrain
from amt_ray.runtime.trained import export, find
from amt_ray.runtime.visualize import visualize
from tests.runtime.test_local import SHAPES
from tests.tiny import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on shapes, and its tracking store."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMT_RAY_CACHE", str(folder / "cache"))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.chdir(folder)
        experiment = tiny(
            **SHAPES, ray__num_workers=0, ray__storage_path=str(folder / "runs"), model__encoder__num_heads=4
        )
        return pretrain(experiment, Console(quiet=True)), f"sqlite:///{folder / 'mlflow.db'}"


@pytest.fixture(autouse=True)
def _store(run, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", run[1])


def test_find__gives_weights_and_configuration_by_run_and_by_checkpoint(run):
    by_run = find(run[0], None, None, ())
    by_file = find(None, by_run.path, None, ["seed=7", "data.name=shapes"])
    assert by_run.experiment.data.name == "shapes" and by_file.needed().seed == 7
    assert by_file.experiment.model == by_run.experiment.model
    method, whole = by_run.method()
    wanted = read_weights(by_run.path)[0]
    assert whole and all(torch.equal(wanted[name], value) for name, value in method.state_dict().items())


def test_find__leaves_no_temporary_folder(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    find(run[0], None, None, ())
    assert not list(tmp_path.iterdir())


def test_find__looks_for_a_run_in_the_tracking_store_of_the_file(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI names another"):
        find(run[0], None, None, ())
    file = tmp_path / "x.yaml"
    file.write_text(tiny(**SHAPES, tracking__uri=run[1]).to_yaml())
    assert find(run[0], None, file, ()).path.name == "epoch_00004"


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ((None, None, None, ()), "exactly one of --run and --checkpoint must be given"),
        (("r", "p", None, ()), "exactly one of --run and --checkpoint must be given"),
        (("unknown", None, None, ()), "must name a run of this tracking store, got unknown"),
        ((None, "nowhere", None, ()), "none at nowhere"),
    ],
)
def test_find__says_in_a_line_what_is_wrong(told, message):
    with pytest.raises(ConfigError, match=message) as caught:
        find(*told)
    assert "\n" not in str(caught.value)


def test_damaged_checkpoint__is_refused_by_name_and_passed_over_with_a_warning_by_a_resumed_run(run):
    trained = find(run[0], None, None, ())
    weights = trained.path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    wanted = bytes(content)
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ConfigError, match="epoch_00004 must be whole: model.safetensors must have the SHA-256"):
        find(run[0], None, None, ())
    told = io.StringIO()
    pretrain(trained.experiment, Console(file=told, width=200), resume=run[0])
    assert f"warning: the checkpoint {trained.path} is not whole and is passed over: model" in told.getvalue()
    assert weights.read_bytes() == wanted and find(run[0], None, None, ()).path == trained.path


def test_unwritable_storage__is_told_before_there_is_a_run(run, tmp_path):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file"
    with pytest.raises(ConfigError, match=f"checkpoints must be writable at {place}/tiny .Not a directory."):
        pretrain(tiny(ray__num_workers=0, ray__storage_path=str(place)), Console(quiet=True))


def test_export__timm_gives_the_same_features_and_every_format_its_own_file(run, tmp_path):
    trained = find(run[0], None, None, ())
    said = export(trained, "timm", tmp_path / "a.pth")
    assert "num_heads=4" in said
    other = timm.models.vision_transformer.VisionTransformer(16, 4, embed_dim=16, depth=2, num_heads=4)
    other.load_state_dict(torch.load(tmp_path / "a.pth", weights_only=True), strict=True)
    images = torch.randn(3, 3, 16, 16)
    encoder = trained.encoder().eval()
    with torch.no_grad():
        assert (other.eval().forward_features(images)[:, 0] - encoder.features(images)).abs().max() < 1e-5
    export(trained, "mae", tmp_path / "m.pth")
    again = find(None, tmp_path / "m.pth", None, ())
    state = read_state(tmp_path / "m.pth")[0]
    assert again.experiment is None and all(torch.equal(state[k], v) for k, v in encoder.state_dict().items())
    with pytest.raises(ConfigError, match="an experiment file must be named beside weights that carry none"):
        again.method()
    export(again, "safetensors", tmp_path / "s.safetensors")
    assert torch.equal(build_encoder(tmp_path / "s.safetensors").cls_token, encoder.cls_token)
    with pytest.raises(ConfigError, match="format must be one of"):
        export(trained, "onnx", tmp_path / "o")


def test_export__tells_the_colours_that_the_encoder_expects(run, tmp_path):
    export(find(run[0], None, None, ()), "safetensors", tmp_path / "s.safetensors")
    about = read_state(tmp_path / "s.safetensors")[1]
    assert about["data"] == "shapes" and about["mean"] == [0.5] * 3 and about["std"] == [0.29] * 3


def test_visualize__draws_every_layer_of_the_chosen_images(run, tmp_path):
    png, page = visualize(find(run[0], None, None, ()), [3, 1], tmp_path / "out")
    rows = 1 + 2 + 1 + 1 + 1  # image, layers, scores, plan, reconstruction
    with Image.open(png) as picture:
        assert picture.height > rows * 100 and picture.width > 2 * 100
    text = page.read_text()
    assert text.count("<img ") == 2 * rows and "layer 1" in text and "energy" in text
    assert "http" not in text.replace("http-equiv", "")
    with pytest.raises(ConfigError, match=r"--images must be of 0 to 299, got \[300\]"):
        visualize(find(run[0], None, None, ()), [300], tmp_path)


def test_visualize__says_whether_the_plan_is_drawn_from_the_scores_and_its_labels_do_not_overlap(run, tmp_path):
    wide = ["data.image_size=[16,48]", "attention.layers=[-1,0]"]  # pictures of 37 rows, under labels of four lines
    drawn = visualize(find(run[0], None, None, wide), [3], tmp_path)[1].read_text()
    assert "drawn from the scores of layers 0, 1, averaged" in drawn and "what the plan is drawn from" in drawn
    png, page = visualize(find(run[0], None, None, [*wide, "masking.strategy=random"]), [3], tmp_path)
    text = page.read_text()
    assert "not drawn from the scores of layers 0, 1" in text and "the plan does not use them" in text
    with Image.open(png) as picture:
        assert picture.height > sum([1, 2, 1, 2, 4, 3]) * 18


def test_visualize__of_an_encoder_alone_shows_no_reconstruction(run, tmp_path):
    trained = find(run[0], None, None, ())
    export(trained, "safetensors", tmp_path / "s.safetensors")
    (tmp_path / "e.yaml").write_text(json.dumps(trained.experiment.model_dump(mode="json")))
    _, page = visualize(find(None, tmp_path / "s.safetensors", tmp_path / "e.yaml", ()), None, tmp_path / "out", 1)
    assert "reconstruction" not in page.read_text()


def test_command__bad_input_is_one_line_and_status_2(run, tmp_path):
    command = [sys.executable, "-m", "amt_ray.cli", "visualize", "--run", run[0], "--images", "3,x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == "amt-ray: --images must be indices with commas between, got 3,x.\n"
