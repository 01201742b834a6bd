"""A weights file is what it states: its heads are not guessed, values that are no numbers are not measured.

Sources: timm's issue 1792 and MAE's issue 3 (loads that surprise), MAE's issue 65 and mmpretrain's issue 1632 (not a
number), timm's release notes of 1.0.30 (positions of grids with equally many patches).
"""

import dataclasses
import importlib
import math
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from amt_ray import plugins
from amt_ray.cli import main
from amt_ray.config import ConfigError
from amt_ray.core.attention import Scoring
from amt_ray.core.box_energy import box_energy, energy
from amt_ray.core.checkpoint import write_checkpoint
from amt_ray.core.encoder import Encoder
from amt_ray.core.evals import Task
from amt_ray.core.export import export
from amt_ray.core.finite import NotFiniteError
from amt_ray.core.methods.mae import MAE
from amt_ray.core.methods.simmim import SimMIM
from amt_ray.core.ports import Solo
from amt_ray.core.preview import PlanOf, preview
from amt_ray.core.probing import accuracies, measured, top_hits
from amt_ray.core.weights import build_encoder, heads_note, read_state, sizes_of, start_from
from amt_ray.runtime import local
from amt_ray.runtime.trained import Trained, find
from tests.core.probes import coloured_images, source_of, tiny_encoder
from tests.core.test_evals_contract import small
from tests.core.test_weights import DECODER, SIZES, cubic_matrix, mae
from tests.tiny import tiny

HEADS = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2}


def run_of(model, num_heads, decoder_heads=2):
    """What a run's checkpoint says of a model."""
    encoder, decoder = {"embed_dim": 16, "num_heads": num_heads}, {"embed_dim": 8, "num_heads": decoder_heads}
    return {
        "experiment": {"data": {"image_size": 16}, "model": {"patch_size": 4, "encoder": encoder, "decoder": decoder}}
    }


def written(tmp_path, kind, model, num_heads):
    """A model of so many heads as a file that states them."""
    if kind == "checkpoint":
        write_checkpoint(tmp_path, model.state_dict(), {}, run_of(model, num_heads))
        return tmp_path
    path = tmp_path / {"mae": "a.pth", "timm": "a.safetensors", "safetensors": "b.safetensors"}[kind]
    export(model, kind, path)
    return path


# --- heads


@pytest.mark.parametrize("kind", ["checkpoint", "mae", "timm", "safetensors"])
def test_heads__other_than_those_that_the_file_states_are_refused(tmp_path, kind):
    path = written(tmp_path, kind, mae(num_heads=4), 4)
    with pytest.raises(
        ValueError, match=r"encoder\.num_heads must be that of the weights, 4, got 2\. The file is "
    ) as e:
        start_from(MAE(**SIZES, **DECODER), path)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="must be that of the weights, 4, got 2"):
        build_encoder(path, num_heads=2)
    start_from(MAE(**{**SIZES, "num_heads": 4}, **DECODER), path)
    assert build_encoder(path).sizes["num_heads"] == 4 and heads_note(path, None) is None


@pytest.mark.parametrize("kind", ["checkpoint", "mae"])
def test_heads__of_the_decoder_are_checked_where_it_is_loaded(tmp_path, kind):
    path = written(tmp_path, kind, mae(), 2)
    other = {**DECODER, "decoder_num_heads": 4}
    with pytest.raises(ValueError, match=r"decoder\.num_heads must be that of the weights, 2, got 4"):
        start_from(MAE(**SIZES, **other), path)
    assert start_from(MAE(**SIZES, **DECODER), path) == "method"
    export(mae(), "safetensors", tmp_path / "encoder.safetensors")
    assert start_from(MAE(**SIZES, **other), tmp_path / "encoder.safetensors") == "encoder"


def test_heads__that_a_relative_position_bias_shows_need_no_statement(tmp_path):
    model = SimMIM(**{**SIZES, "num_heads": 4}, positions="none", relative_positions=True)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    assert build_encoder(tmp_path / "a.pth", 16).sizes["num_heads"] == 4
    assert heads_note(tmp_path / "a.pth", 4) is None
    with pytest.raises(ValueError, match="must be that of the weights, 4, got 2"):
        build_encoder(tmp_path / "a.pth", 16, num_heads=2)
    with pytest.raises(ValueError, match="must be that of the weights, 4, got 2"):
        start_from(SimMIM(**SIZES, positions="none", relative_positions=True), tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("width", "depth", "patch", "heads"),
    [
        (192, 4, 16, None),
        (192, 12, 4, None),
        (192, 12, 16, 3),
        (384, 12, 8, 6),
        (768, 12, 16, 12),
        (768, 8, 16, None),  # timm's vit_small of old: 8 heads
        (1024, 24, 14, 16),
        (512, 12, 16, None),
        (64, 12, 16, None),
    ],
)
def test_heads__of_a_file_of_others_are_known_by_a_name_or_asked_for(width, depth, patch, heads):
    with torch.device("meta"):
        state = Encoder(4 * patch, patch, 3, width, depth, 4).state_dict()
    if heads is None:
        with pytest.raises(ValueError, match=rf"num_heads must be given .* got width {width}, {depth} blocks, patches"):
            sizes_of(state)
    else:
        assert sizes_of(state).num_heads == heads
    assert sizes_of(state, num_heads=4).num_heads == 4


def test_heads__taken_by_a_name_are_those_of_timms_models_of_these_sizes():
    for name in ("tiny_patch16", "small_patch8", "small_patch32", "base_patch8", "base_patch32", "large_patch14"):
        with torch.device("meta"):
            model = timm.create_model(f"vit_{name}_224")
        assert sizes_of(model.state_dict()).num_heads == model.blocks[0].attn.num_heads


def test_heads__that_nothing_states_are_said_in_a_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.pth"
    torch.save(Encoder(32, 16, 3, 192, 12, 6).state_dict(), path)
    line = heads_note(path, None)
    assert line.endswith("3 are taken, as of the ViT with a name that is 192 wide with 12 blocks and patches of 16")
    assert heads_note(path, 6).endswith("6 are taken, as the experiment says, where 3 are usual")
    assert heads_note(path, 3).endswith("3 are taken, as the experiment says")
    assert Trained(path, None).note == line
    monkeypatch.setattr(
        sys, "argv", ["amt-ray", "export", "--checkpoint", str(path), "--out", str(tmp_path / "b.safetensors")]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0 and line in capsys.readouterr().out
    torch.save(Encoder(16, 4, 3, 192, 4, 6).state_dict(), path)
    monkeypatch.setattr(
        sys, "argv", ["amt-ray", "export", "--checkpoint", str(path), "--out", str(tmp_path / "c.safetensors")]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "num_heads must be given" in capsys.readouterr().err


def test_heads__of_an_experiment_are_held_against_the_file_before_anything_starts(tmp_path):
    experiment = tiny(model__encoder__num_heads=4)
    method = local.build_model(experiment)
    write_checkpoint(tmp_path, method.state_dict(), {}, {"experiment": experiment.model_dump(mode="json")})
    (tmp_path / "x.yaml").write_text(tiny(model__encoder__num_heads=2).to_yaml())
    for act in (lambda found: found.encoder(), lambda found: found.method()):
        with pytest.raises(ConfigError, match=r"encoder\.num_heads must be that of the weights, 4, got 2"):
            act(find(None, tmp_path, tmp_path / "x.yaml", ()))
    with pytest.raises(ConfigError, match=r"encoder\.num_heads must be that of the weights, 4, got 2"):
        local.checkpoint_note(tiny(model__checkpoint=str(tmp_path)))
    assert local.checkpoint_note(experiment.override({"model.checkpoint": str(tmp_path)})) is None


# --- not a number


def spoilt(encoder, value, name="blocks.1.attn.qkv.weight"):
    with torch.no_grad():
        encoder.get_parameter(name).view(-1)[3] = value
    return encoder


def task_of(generator):
    train, test = coloured_images(60, 6, generator), coloured_images(20, 6, generator)
    return Task(train, torch.arange(40), torch.arange(40, 60), test, (8, 8), 0, source_of(train), source_of(test))


@pytest.mark.parametrize("name", plugins.names("evals"))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_protocol__refuses_weights_that_are_no_numbers(name, value, generator):
    protocol = small(plugins.load("evals", name))
    with pytest.raises(ValueError, match=r"weights must be finite, got others in blocks\.1\.attn\.qkv\.weight"):
        protocol(spoilt(tiny_encoder(), value), task_of(generator), Solo(), test=True)


class Overflowing(Encoder):
    """Finite weights, of which features come that are no numbers."""

    def embed(self, *args, **kwargs):
        return super().embed(*args, **kwargs) * torch.nan


@pytest.mark.parametrize("name", plugins.names("evals"))
def test_protocol__refuses_features_that_are_no_numbers(name, generator):
    encoder = tiny_encoder()
    encoder.__class__ = Overflowing
    protocol = small(plugins.load("evals", name))
    with pytest.raises((NotFiniteError, ValueError), match=r"finite|NaN") as caught:
        protocol(encoder, task_of(generator), Solo())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_file__of_weights_that_are_no_numbers_is_refused_whoever_reads_it(tmp_path, suffix, value):
    path = tmp_path / f"a.{suffix}"
    state = spoilt(mae(), value).state_dict()
    save_file(state, path) if suffix == "safetensors" else torch.save({"model": state}, path)
    match = r"weights must be finite numbers, .* has others in blocks\.1\.attn\.qkv\.weight\.$"
    for read in (read_state, lambda path: build_encoder(path, num_heads=2), lambda path: start_from(mae(), path)):
        with pytest.raises(ValueError, match=match):
            read(path)
    with pytest.raises(ConfigError, match=match):
        find(None, path, None, ())
    (tmp_path / "x.yaml").write_text(tiny().to_yaml())
    with pytest.raises(ConfigError, match=match):
        find(None, path, tmp_path / "x.yaml", ()).encoder()
    with pytest.raises(ConfigError, match=match):
        local.build_model(tiny(model__checkpoint=str(path)))


def test_evaluate__of_a_file_of_no_numbers_is_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    experiment = tiny(ray__num_workers=0)
    state = spoilt(local.build_model(experiment), math.nan).state_dict()
    write_checkpoint(tmp_path, state, {}, {"experiment": experiment.model_dump(mode="json")})
    (tmp_path / "x.yaml").write_text(experiment.to_yaml())
    for verb in (["evaluate", "knn"], ["evaluate", "box-energy-1"], ["visualize"], ["export"]):
        monkeypatch.setattr(sys, "argv", ["amt-ray", *verb, "x.yaml", "--checkpoint", str(tmp_path)])
        with pytest.raises(SystemExit) as stop:
            main()
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and "weights must be finite numbers" in error, verb


def test_counts__of_scores_that_are_no_numbers_are_no_figure():
    truth = torch.tensor([0, 1, 2])
    scores = torch.eye(3).expand(2, 3, 3).clone()
    assert top_hits(scores, truth)[:, 0].tolist() == [3, 3]
    scores[1, 2, 0] = torch.nan
    one, other = top_hits(scores, truth)
    assert one.tolist() == [3, 3] and bool(torch.isnan(other).all())
    with pytest.raises(NotFiniteError, match="must give finite scores of classes, got others for eval/knn"):
        accuracies("eval/knn", other, 3, 3)


def test_energy__of_scores_that_are_no_numbers_is_none(generator):
    covered_BN = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert energy(torch.zeros(1, 1, 4), covered_BN).tolist() == [[1.0]]  # a constant map: as attention spread evenly
    assert bool(torch.isnan(energy(torch.full((1, 1, 4), torch.nan), covered_BN)).all())
    images = coloured_images(8, 4, generator)
    objects = source_of(images).objects
    with pytest.raises(NotFiniteError, match="attention scores must be finite"):
        box_energy(spoilt(tiny_encoder(), math.nan), images, torch.arange(8), objects, Scoring(), Solo())


def test_picture__of_scores_that_are_no_numbers_is_not_drawn(generator):
    model = spoilt(mae(img_size=8), math.nan)
    plans = PlanOf(tiny().strategy_at(1.0), Scoring())
    with pytest.raises(ValueError, match="attention scores must be finite"):
        preview(model, coloured_images(8, 4, generator), torch.arange(2), plans, 0)


def test_linear_probe__does_not_choose_a_rate_that_has_blown_its_head_up(generator):
    protocol = dataclasses.replace(
        plugins.load("evals", "linear_probe").presets["linear-fast-1"], epochs=3, warmup_epochs=0, base_lrs=(1e38, 1.0)
    )
    found = protocol(tiny_encoder(), task_of(generator), Solo())
    assert found["eval/linear_base_lr"] == 1.0 and found["eval/linear_top1"] >= 0


# --- positions


@pytest.mark.parametrize(("old", "new"), [((2, 8), (4, 4)), ((4, 4), (2, 8)), ((3, 12), (6, 6)), ((2, 8), (3, 5))])
def test_positions__of_a_grid_that_is_not_square_are_resized_and_not_only_reshaped(tmp_path, old, new):
    """timm below 1.0.30 takes equally many positions for the same grid."""
    donor = mae(img_size=(4 * old[0], 4 * old[1]))
    export(donor, "mae", tmp_path / "a.pth")
    model = build_encoder(tmp_path / "a.pth", img_size=(4 * new[0], 4 * new[1]))
    grid = donor.pos_embed[0, 1:].reshape(*old, -1).double().numpy()
    expected = np.einsum("ag,bw,gwd->abd", cubic_matrix(new[0], old[0]), cubic_matrix(new[1], old[1]), grid)
    assert model.grid == new
    np.testing.assert_allclose(model.pos_embed[0, 1:].reshape(*new, -1).detach().numpy(), expected, atol=1e-5)
    assert not np.allclose(expected.reshape(-1), grid.reshape(-1)[: expected.size], atol=1e-2)


def test_timm__that_is_required_resizes_such_grids():
    needed = tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]
    floor = next(line for line in needed if line.startswith("timm")).partition(">=")[2]
    locked = next(line for line in Path("requirements.lock").read_text().splitlines() if line.startswith("timm=="))
    parts = [tuple(map(int, version.split("."))) for version in (floor, locked.partition("==")[2])]
    assert parts[0] >= (1, 0, 30) and parts[1] >= parts[0]


@pytest.mark.parametrize("name", ["detection", "segmentation"])
def test_protocol__whose_last_step_broke_the_model_measures_nothing(name, generator):
    """Scores that are no numbers would be boxes that just vanish, and pixels of the first class."""
    module, task = importlib.import_module(f"amt_ray.core.evals.{name}"), task_of(generator)
    run = module._Run(small(plugins.load("evals", name)), tiny_encoder(), task, Solo())
    spoilt(next(part for part in run.model.modules() if isinstance(part, Encoder)), math.nan, "blocks.1.mlp.fc2.weight")
    run.model.eval()
    (split,) = measured(task, test=False)
    with torch.no_grad(), pytest.raises(NotFiniteError, match="must be finite, got others"):
        run.precisions(split) if name == "detection" else module.overlaps("eval", run.confusion(split))
