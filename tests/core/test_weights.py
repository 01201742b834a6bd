import argparse
import json
import math
import os
import pickle

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import Block
from torch import nn

from amt_ray.core.checkpoint import write_checkpoint
from amt_ray.core.encoder import Encoder
from amt_ray.core.export import describe, export, save_encoder, to_mae, to_timm
from amt_ray.core.methods.mae import MAE
from amt_ray.core.methods.simmim import SimMIM
from amt_ray.core.tokens import patchify
from amt_ray.core.weights import (
    build_encoder,
    encoder_part,
    grid_of,
    interpolate_positions,
    load_encoder,
    load_method,
    read_state,
    sizes_of,
    start_from,
)

D, DEPTH, WIDE = 16, 2, 8  # WIDE: the decoder
SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": D, "depth": DEPTH, "num_heads": 2}
DECODER = {"decoder_embed_dim": WIDE, "decoder_depth": 1, "decoder_num_heads": 2}


def shuffled(model):
    """The model with every parameter random, so that no value is right by its initialisation."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def encoder(**sizes):
    return shuffled(Encoder(**{**SIZES, **sizes}))


def mae(**sizes):
    return shuffled(MAE(**{**SIZES, **DECODER, **sizes}))


def same(left, right):
    return set(left) == set(right) and all(
        torch.equal(left[k], right[k]) and left[k].dtype == right[k].dtype for k in right
    )


def tokens(encoder, images):
    with torch.no_grad():
        return encoder.encode(patchify(images, encoder.patch_size))


def blocks(prefix, depth, width):
    """Names and shapes of the transformer blocks in facebookresearch/mae."""
    names = {}
    for n in range(depth):
        for name, out, into in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            names |= {f"{prefix}.{n}.{name}.weight": (out, into), f"{prefix}.{n}.{name}.bias": (out,)}
        for norm in ("norm1", "norm2"):
            names |= {f"{prefix}.{n}.{norm}.weight": (width,), f"{prefix}.{n}.{norm}.bias": (width,)}
    return names


def random_state(shapes):
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def public_encoder(patches=16, width=D, depth=DEPTH):
    """Names and shapes of the public encoder-only checkpoints."""
    return {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + patches, width),
        "patch_embed.proj.weight": (width, 3, 4, 4),
        "patch_embed.proj.bias": (width,),
        **blocks("blocks", depth, width),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }


def public_mae(patches=16):
    """Names and shapes of the public checkpoints with a decoder, written out from facebookresearch/mae's model."""
    return {
        **public_encoder(patches),
        "mask_token": (1, 1, WIDE),
        "decoder_pos_embed": (1, 1 + patches, WIDE),
        "decoder_embed.weight": (WIDE, D),
        "decoder_embed.bias": (WIDE,),
        **blocks("decoder_blocks", 1, WIDE),
        "decoder_norm.weight": (WIDE,),
        "decoder_norm.bias": (WIDE,),
        "decoder_pred.weight": (48, WIDE),
        "decoder_pred.bias": (48,),
    }


def public_finetuned(pool):
    """The fine-tuned format: a classifier, and after global pooling `fc_norm` in the place of `norm`."""
    shapes = {**public_encoder(), "head.weight": (5, D), "head.bias": (5,)}
    return {
        name.replace("norm.", "fc_norm.") if pool and name[:5] == "norm." else name: s for name, s in shapes.items()
    }


# --- reading


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def save_zip(path):
    torch.save({"model": {"w": torch.ones(1)}, "args": Evil()}, path)


def save_legacy(path):
    torch.save({"model": Evil()}, path, _use_new_zipfile_serialization=False)


def save_pickle(path):
    path.write_bytes(pickle.dumps(Evil(), protocol=2))


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_pickle])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_read_state__refuses_a_file_that_wants_to_run_code(tmp_path, monkeypatch, save, suffix):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"evil{suffix}"
    save(path)
    with pytest.raises(
        ValueError, match=r"tensors and plain values only, .* asks for \w+\.mkdir: not loaded\.$"
    ) as caught:
        read_state(path)
    assert "\n" not in str(caught.value) and not (tmp_path / "executed").exists()
    if save is not save_pickle:  # the file is armed: without the guard it does run
        torch.load(path, weights_only=False)
        assert (tmp_path / "executed").exists()


def test_read_state__lets_only_argument_namespaces_in_and_only_while_it_reads(tmp_path):
    torch.save({"model": {"w": torch.ones(1)}, "args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pth")
    assert read_state(tmp_path / "a.pth")[0]["w"] == 1
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    torch.save({"model": {"w": torch.ones(1)}, "args": argparse.Namespace(path=tmp_path)}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="asks for pathlib"):
        read_state(tmp_path / "b.pth")


@pytest.mark.parametrize("around", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 3}])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_read_state__unwraps_and_takes_prefixes_off(tmp_path, around, prefix):
    state = random_state(public_encoder())
    torch.save(around({prefix + name: tensor for name, tensor in state.items()}), tmp_path / "a.pt")
    found, about = read_state(tmp_path / "a.pt")
    assert same(found, state) and about == {}


def test_read_state__of_safetensors_gives_metadata_and_of_a_folder_its_weights(tmp_path):
    state, about = random_state(public_encoder()), {"experiment": {"name": "x"}, "epoch": 3}
    write_checkpoint(tmp_path, state, {}, about)
    for path in (tmp_path, str(tmp_path), tmp_path / "model.safetensors"):
        found, told = read_state(path)
        assert same(found, state) and told == {"format": 1, **about}
    save_file(state, tmp_path / "other.safetensors")
    assert read_state(tmp_path / "other.safetensors")[1] == {}


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.pth", None, "none at .*a.pth"),
        (".", None, "none at .*model.safetensors"),
        ("a.pth", b"", "must be readable"),
        ("a.pth", b"hello world", "must be readable"),
        ("a.pth", b"PK\x03\x04 cut off", "must be readable"),
        ("a.safetensors", b"", "must be readable"),
        ("a.safetensors", b"hello world, hello", "must be readable"),
        ("a.pth", torch.ones(3), "must hold a state dict"),
        ("a.pth", [torch.ones(3)], "must hold a state dict"),
        ("a.pth", {}, "must hold a state dict"),
        ("a.pth", {"model": {}}, "must hold a state dict"),
        ("a.pth", {"w": torch.ones(1), "lr": 0.1}, "must hold a state dict"),
        ("a.pth", {1: torch.ones(1)}, "must hold a state dict"),
        ("a.pth", {"model": {"w": torch.ones(1)}, "amt_ray": "[1]"}, "must be a JSON object"),
        ("a.pth", {"model": {"w": torch.ones(1)}, "amt_ray": "{"}, "must be readable"),
    ],
)
def test_read_state__refuses_what_is_no_checkpoint_in_one_line(tmp_path, name, content, match):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=match) as caught:
        read_state(path)
    assert "\n" not in str(caught.value)


# --- sizes


@pytest.mark.parametrize("chans", [1, 3])
@pytest.mark.parametrize("ratio", [4.0, 2.5])
def test_sizes_of__are_those_the_encoder_was_made_with(chans, ratio):
    state = Encoder((24, 40), 8, chans, 128, 3, 2, ratio).state_dict()
    sizes = sizes_of(state, num_heads=2)
    assert (sizes.patch_size, sizes.in_chans, sizes.embed_dim, sizes.depth) == (8, chans, 128, 3)
    assert (sizes.mlp_ratio, sizes.num_patches, sizes.num_heads) == (ratio, 15, 2)
    assert sizes_of(state, num_heads=4).num_heads == 4
    assert sizes_of(state, {"encoder": {"img_size": [24, 40], "patch_size": 8, "num_heads": 8}}).num_heads == 8


@pytest.mark.parametrize("size", ["tiny_patch16", "small_patch16", "base_patch16", "large_patch16", "huge_patch14"])
def test_sizes_of__gives_the_named_models_their_heads(size):
    with torch.device("meta"):
        model = timm.create_model(f"vit_{size}_224")
    assert sizes_of(model.state_dict()).num_heads == model.blocks[0].attn.num_heads


@pytest.mark.parametrize(("width", "hidden"), [(28, 61), (44, 49), (52, 63), (16, 64)])
def test_sizes_of__a_ratio_gives_back_the_hidden_width(width, hidden):
    state = random_state({**public_encoder(width=width), "blocks.0.mlp.fc1.weight": (hidden, width)})
    assert int(width * sizes_of(state, num_heads=2).mlp_ratio) == hidden


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({}, "num_heads must be given .* got width 16, 2 blocks, patches of 4"),
        ({"pos_embed": None}, "no such pos_embed"),
        ({"pos_embed": (17, D)}, "no such pos_embed"),
        ({"patch_embed.proj.weight": (D, 48)}, "no such patch_embed.proj.weight"),
        ({"patch_embed.proj.weight": (D, 3, 4, 8)}, "patches must be square, got 4 x 8"),
    ],
)
def test_sizes_of__refuses_what_it_cannot_tell(change, match):
    shapes = {name: shape for name, shape in {**public_encoder(), **change}.items() if shape}
    with pytest.raises(ValueError, match=match):
        sizes_of(random_state(shapes))


# --- positions


def cubic_matrix(new, old):
    """Weights of cubic convolution (a = -0.75) on one axis: pixel centres aligned, the edge repeated."""

    def kernel(x, a=-0.75):
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    matrix = np.zeros((new, old))
    for i in range(new):
        place = (i + 0.5) * old / new - 0.5
        for j in range(math.floor(place) - 1, math.floor(place) + 3):
            matrix[i, min(max(j, 0), old - 1)] += kernel(place - j)
    return matrix


@pytest.mark.parametrize(
    ("old", "new"), [((4, 4), (6, 6)), ((4, 6), (7, 3)), ((2, 8), (8, 2)), ((7, 5), (3, 9)), ((14, 14), (7, 7))]
)
def test_interpolate_positions__is_the_slow_separable_one(old, new):
    positions = torch.randn(1, 1 + old[0] * old[1], 5, generator=torch.Generator().manual_seed(0))
    grid = positions[0, 1:].reshape(*old, 5).double().numpy()
    expected = np.einsum("ag,bw,gwd->abd", cubic_matrix(new[0], old[0]), cubic_matrix(new[1], old[1]), grid)
    found = interpolate_positions(positions, old, new)
    assert found.shape == (1, 1 + new[0] * new[1], 5) and torch.equal(found[:, 0], positions[:, 0])
    np.testing.assert_allclose(found[0, 1:].reshape(*new, 5).numpy(), expected, atol=1e-5)
    if old != old[::-1]:  # the oracle tells rows from columns
        transposed = np.einsum("ag,bw,gwd->abd", cubic_matrix(new[1], old[0]), cubic_matrix(new[0], old[1]), grid)
        assert np.abs(transposed.reshape(-1, 5) - expected.reshape(-1, 5)).max() > 0.1


def test_interpolate_positions__on_the_same_grid_changes_nothing_and_refuses_a_wrong_grid():
    positions = torch.randn(1, 25, 4).to(torch.bfloat16)
    assert torch.equal(interpolate_positions(positions, (4, 6), (4, 6)), positions)
    assert not torch.equal(interpolate_positions(positions, (4, 6), (6, 4)), positions)
    assert interpolate_positions(positions, (4, 6), (5, 5)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="got 5 x 5 for 24"):
        interpolate_positions(positions, (5, 5), (4, 6))


@pytest.mark.parametrize(
    ("patches", "img_size", "told", "old"),
    [
        (16, 16, None, (4, 4)),
        (36, 16, None, (6, 6)),
        (16, (8, 24), None, (4, 4)),
        (36, 16, (4, 9), (4, 9)),
        (32, (16, 32), None, (4, 8)),  # no square has 32 places: the encoder's own grid
        (32, (16, 32), (8, 4), (8, 4)),
        (36, (16, 36), (6, 6), (6, 6)),
        (36, (16, 36), (4, 9), (4, 9)),
        (36, (16, 36), None, "36 positions of unknown grid"),  # 6 x 6 or the encoder's 4 x 9
        (12, 16, None, "12 positions of unknown grid"),
    ],
)
def test_load__puts_positions_of_encoder_and_decoder_on_the_models_grid(patches, img_size, told, old):
    state, model = random_state(public_mae(patches)), mae(img_size=img_size)
    if isinstance(old, str):
        for load in (load_encoder, load_method):
            with pytest.raises(ValueError, match=old):
                load(model, state, told)
        return
    load_method(model, state, told)
    for name in ("pos_embed", "decoder_pos_embed"):
        assert torch.equal(getattr(model, name), interpolate_positions(state[name], old, model.grid))
    alone = encoder(img_size=img_size)
    load_encoder(alone, state, told)
    assert torch.equal(alone.pos_embed, model.pos_embed)


# --- loading


def test_load_method__takes_the_public_mae_format_and_gives_every_tensor_back():
    state, model = random_state(public_mae()), mae()
    load_method(model, state)
    assert same(model.state_dict(), state)
    model.load_state_dict(state, strict=True)


@pytest.mark.parametrize("shapes", [public_encoder(), public_mae(), public_finetuned(False), public_finetuned(True)])
def test_load_encoder__takes_every_format_of_the_public_checkpoints(tmp_path, shapes):
    state, images = random_state(shapes), torch.randn(2, 3, 16, 16)
    args = argparse.Namespace(model="vit", lr=1e-3, opt_betas=None, global_pool="fc_norm.weight" in state)
    torch.save(
        {"model": state, "optimizer": {"state": {}}, "epoch": 99, "scaler": {}, "args": args}, tmp_path / "a.pth"
    )
    model, expected = encoder(), encoder()
    expected.load_state_dict({k: state[k] if k in state else state[f"fc_{k}"] for k in public_encoder()}, strict=True)
    assert not torch.equal(tokens(model, images), tokens(expected, images))
    load_encoder(model, read_state(tmp_path / "a.pth")[0])
    assert torch.equal(tokens(model, images), tokens(expected, images))


def test_load_encoder__prefers_norm_to_fc_norm():
    state = random_state({**public_encoder(), "fc_norm.weight": (D,), "fc_norm.bias": (D,)})
    model = encoder()
    load_encoder(model, state)
    assert torch.equal(model.norm.weight, state["norm.weight"])


def test_load_encoder__into_a_method_leaves_the_decoder_as_it_is():
    model, state = mae(), random_state(public_mae())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_encoder(model, state)
    for name, tensor in model.state_dict().items():
        of_decoder = name.startswith(("decoder", "mask_token"))
        assert torch.equal(tensor, before[name] if of_decoder else state[name])


def without(shapes, *names):
    return {name: shape for name, shape in shapes.items() if name not in names}


WRONG = [
    (without(public_encoder(), "cls_token"), "missing: cls_token"),
    (without(public_encoder(), "norm.weight", "norm.bias"), "missing: norm.weight, norm.bias"),
    (public_encoder(depth=1), "missing: blocks.1.norm1.weight, .* and 9 more"),
    (public_encoder(depth=3), "unknown: blocks.2.attn.qkv.weight, .* and 9 more"),
    (public_encoder(width=32), "shapes: cls_token is 1 x 1 x 32 and not 1 x 1 x 16, pos_embed .* and .* more"),
    (
        {**public_encoder(), "patch_embed.proj.weight": (D, 3, 8, 8)},
        "patch_embed.proj.weight is 16 x 3 x 8 x 8 and not",
    ),
    ({**public_encoder(), "rel_pos_bias.table": (49, 2)}, r"unknown: rel_pos_bias.table\.$"),
    ({**public_encoder(), "blocks.0.ls1.gamma": (D,)}, r"unknown: blocks.0.ls1.gamma\.$"),
    ({"fc.weight": (3, 3)}, "missing: cls_token, .*; unknown: fc.weight"),
]


@pytest.mark.parametrize(("shapes", "match"), WRONG)
def test_load__of_a_wrong_architecture_gives_one_line_and_changes_nothing(shapes, match):
    for model, load in ((encoder(), load_encoder), (mae(), load_method)):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        decoder = {} if load is load_encoder else without(public_mae(), *public_encoder())
        with pytest.raises(ValueError, match=match) as caught:
            load(model, random_state({**shapes, **decoder}))
        assert "\n" not in str(caught.value) and same(model.state_dict(), before)


def test_load_method__says_that_a_file_holds_an_encoder_only_and_refuses_a_classifier():
    with pytest.raises(ValueError, match="missing: mask_token, .* The file holds an encoder only"):
        load_method(mae(), random_state(public_encoder()))
    with pytest.raises(ValueError, match=r"unknown: head.weight\.$"):
        load_method(mae(), random_state({**public_mae(), "head.weight": (5, D)}))


# --- timm


CUSTOM = {"img_size": (16, 24), "patch_size": 4, "embed_dim": D, "depth": DEPTH, "num_heads": 2}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("sizes", [{}, CUSTOM])
def test_timm__loads_the_export_strictly_with_equal_features_and_back(tmp_path, suffix, sizes):
    ours = encoder(**(sizes or {"img_size": 224, "patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}))
    path = tmp_path / f"model{suffix}"
    export(ours, "timm", path, {"name": "x"})
    theirs = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(path), **sizes).eval()
    images = torch.randn(2, 3, *theirs.patch_embed.img_size)
    with torch.no_grad():
        torch.testing.assert_close(tokens(ours, images), theirs.forward_features(images), atol=1e-5, rtol=0)
        assert theirs(images).shape == (2, 1000) and not theirs(images).any()
        theirs.norm.bias += 1e-3
        assert (tokens(ours, images) - theirs.forward_features(images)).abs().max() > 1e-4
        theirs.norm.bias.copy_(ours.norm.bias)
    back = Encoder(**(sizes or {"embed_dim": 192, "num_heads": 3}))
    load_encoder(back, theirs.state_dict())
    assert same(back.state_dict(), ours.state_dict())


def test_timm__state_of_a_method_is_its_encoders_and_the_classifier_has_the_classes_asked_for():
    model = mae()
    assert to_timm(model, 7)["head.weight"].shape == (7, D) and to_timm(model, 7)["head.bias"].shape == (7,)
    assert set(to_timm(model, 0)) == set(public_encoder())
    timm.create_model("vit_tiny_patch16_224", num_classes=0, **SIZES).load_state_dict(to_timm(model, 0), strict=True)


def with_layer_scale():
    model = Encoder(**SIZES)
    model.blocks = nn.ModuleList(Block(D, 2, qkv_bias=True, init_values=0.1) for _ in range(DEPTH))
    for block in model.blocks:
        block.norm1.eps = block.norm2.eps = 1e-6
    return shuffled(model)


def with_relative_positions():
    model = encoder()
    model.rel_pos_bias = nn.ParameterDict({"table": torch.zeros(49, 2)})
    return model


def test_timm__holds_layer_scale_where_the_encoder_has_it():
    ours, images = with_layer_scale(), torch.randn(2, 3, 16, 16)
    assert "blocks.1.ls2.gamma" in to_timm(ours)
    theirs = timm.create_model("vit_tiny_patch16_224", init_values=1.0, **SIZES).eval()
    theirs.load_state_dict(to_timm(ours), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(tokens(ours, images), theirs.forward_features(images), atol=1e-5, rtol=0)
    again = with_layer_scale()
    again.blocks[0].ls1.gamma.data.zero_()
    load_encoder(again, theirs.state_dict())
    assert same(again.state_dict(), ours.state_dict())


def test_to_timm__refuses_what_timm_has_no_place_for(tmp_path):
    with pytest.raises(ValueError, match=r"timm has no place for rel_pos_bias.table\.$"):
        export(with_relative_positions(), "timm", tmp_path / "a.pth")
    assert list(tmp_path.iterdir()) == []


# --- MAE's format and safetensors


@pytest.mark.parametrize("img_size", [16, (16, 36)])
def test_mae__round_trips_bit_for_bit_under_the_public_names(tmp_path, img_size):
    model = mae(img_size=img_size)
    patches = model.num_patches
    assert {k: tuple(v.shape) for k, v in to_mae(model)["model"].items()} == public_mae(patches)
    export(model, "mae", tmp_path / "a.pth", {"epoch": 3})
    assert same(torch.load(tmp_path / "a.pth", weights_only=True)["model"], model.state_dict())
    state, about = read_state(tmp_path / "a.pth")
    back = MAE(**{**SIZES, **DECODER, "img_size": img_size})
    load_method(back, state, grid_of(about))
    assert same(back.state_dict(), model.state_dict()) and about["epoch"] == 3
    export(back, "mae", tmp_path / "b.pth", {"epoch": 3})
    assert same(read_state(tmp_path / "b.pth")[0], state)


def test_to_mae__shares_nothing_with_the_model_and_takes_a_plain_encoder():
    model = encoder()
    state = to_mae(model)["model"]
    assert same(state, model.state_dict()) and set(state) == set(public_encoder())
    state["norm.bias"].zero_()
    assert model.norm.bias.any()


class Linear(Encoder):
    """A method that is not MAE: mask tokens in the encoder and a linear head."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.decoder_pred = nn.Linear(self.embed_dim, 48)


@pytest.mark.parametrize("make", [lambda: Linear(**SIZES), with_layer_scale, with_relative_positions])
def test_to_mae__refuses_a_state_that_is_not_maes(tmp_path, make):
    with pytest.raises(ValueError, match="must be of an MAE, got (Linear|Encoder) with"):
        export(make(), "mae", tmp_path / "a.pth")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("img_size", [16, (16, 36), (8, 24)])
def test_build_encoder__rebuilds_what_save_encoder_wrote(tmp_path, img_size):
    ours = mae(img_size=img_size, in_chans=1, mlp_ratio=2.5, num_heads=4)
    about = {"mean": [0.5], "std": [0.25], "epoch": 3, "encoder": {"num_heads": 8}}
    save_encoder(tmp_path / "a.safetensors", ours, about)
    back = build_encoder(tmp_path / "a.safetensors")
    images = torch.randn(2, 1, *(side * 4 for side in ours.grid))
    assert type(back) is Encoder and describe(back) == describe(ours)
    assert torch.equal(tokens(back.eval(), images), tokens(ours, images))
    told = read_state(tmp_path / "a.safetensors")[1]
    assert told == {"format": 1, **about, "encoder": describe(ours)} and told["encoder"]["num_heads"] == 4


def test_build_encoder__of_a_runs_checkpoint_takes_heads_and_grid_from_its_configuration(tmp_path):
    model = mae(img_size=(16, 36), num_heads=4)
    run = {"data": {"image_size": [16, 36]}, "model": {"patch_size": 4, "encoder": {"embed_dim": D, "num_heads": 4}}}
    write_checkpoint(tmp_path, model.state_dict(), {}, {"experiment": run, "epoch": 3})
    assert describe(build_encoder(tmp_path)) == describe(model)
    write_checkpoint(tmp_path, model.state_dict(), {}, {"experiment": {"data": {}, "model": {"encoder": {}}}})
    with pytest.raises(ValueError, match="must tell image size, patch size and heads, 'num_heads' is missing"):
        build_encoder(tmp_path)


def test_build_encoder__of_a_public_checkpoint_takes_heads_and_image_size_as_arguments(tmp_path):
    torch.save({"model": random_state(public_encoder())}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="num_heads must be given"):
        build_encoder(tmp_path / "a.pth")
    same_size = build_encoder(tmp_path / "a.pth", num_heads=2)
    plain = {"positions": "sincos", "relative_positions": False, "layer_scale": None}
    assert describe(same_size) == {"in_chans": 3, "mlp_ratio": 4.0, **SIZES, "img_size": [16, 16], **plain}
    wider = build_encoder(tmp_path / "a.pth", img_size=(16, 32), num_heads=2)
    assert torch.equal(wider.pos_embed, interpolate_positions(same_size.pos_embed, (4, 4), (4, 8)))


SIMMIM = {"positions": "none", "relative_positions": True, "layer_scale": 0.1}


@pytest.mark.parametrize("options", [SIMMIM, {"positions": "learned"}, {"relative_positions": True}])
def test_build_encoder__rebuilds_simmims_variants_from_a_run_and_from_an_export(tmp_path, options):
    model = shuffled(SimMIM(**{**SIZES, "img_size": (16, 24)}, **options))
    experiment = {
        "data": {"image_size": [16, 24]},
        "model": {"patch_size": 4, "encoder": {"num_heads": 2}, "options": options},
    }
    write_checkpoint(tmp_path, model.state_dict(), {}, {"experiment": experiment})
    save_encoder(tmp_path / "a.safetensors", model)
    images = torch.randn(2, 3, 16, 24)
    for path in (tmp_path, tmp_path / "a.safetensors"):
        back = build_encoder(path).eval()
        assert describe(back) == describe(model)
        assert torch.equal(tokens(back, images), tokens(model, images))
    wider = build_encoder(tmp_path, img_size=(24, 24))
    assert wider.grid == (6, 6) and bool(torch.isfinite(tokens(wider.eval(), torch.randn(1, 3, 24, 24))).all())


def test_build_encoder__needs_the_image_size_where_no_tensor_tells_it(tmp_path):
    torch.save(shuffled(SimMIM(**SIZES, **SIMMIM)).state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="image size must be given"):
        build_encoder(tmp_path / "a.pth")
    assert build_encoder(tmp_path / "a.pth", img_size=16).grid == (4, 4)
    with pytest.raises(ValueError, match="relative_position_bias_table is 52 x 2 and not"):
        build_encoder(tmp_path / "a.pth", img_size=24)


def test_start_from__takes_the_whole_method_where_the_file_has_it_and_else_the_encoder(tmp_path):
    donor, fresh = mae(), MAE(**SIZES, **DECODER)
    export(donor, "mae", tmp_path / "whole.pth")
    save_encoder(tmp_path / "encoder.safetensors", donor)
    assert start_from(fresh, tmp_path / "whole.pth") == "method"
    assert same(fresh.state_dict(), donor.state_dict())
    other = MAE(**SIZES, **DECODER)
    before = other.decoder_pred.weight.clone()
    assert start_from(other, tmp_path / "encoder.safetensors") == "encoder"
    assert same(encoder_part(other.state_dict()), encoder_part(donor.state_dict()))
    assert torch.equal(other.decoder_pred.weight, before)
    simmim = SimMIM(**SIZES)
    assert start_from(simmim, tmp_path / "whole.pth") == "encoder"  # MAE's decoder is nothing to SimMIM
    assert torch.equal(simmim.cls_token, donor.cls_token)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_export__keeps_every_bit_of_a_dtype(tmp_path, dtype):
    model = mae().to(dtype)
    export(model, "safetensors", tmp_path / "a.safetensors")
    export(model, "mae", tmp_path / "a.pth")
    export(model, "timm", tmp_path / "t.safetensors")
    assert same(load_file(tmp_path / "a.safetensors"), {k: model.state_dict()[k] for k in public_encoder()})
    assert same(read_state(tmp_path / "a.pth")[0], model.state_dict())
    assert {tensor.dtype for tensor in load_file(tmp_path / "t.safetensors").values()} == {dtype}


def test_export__metadata_of_every_format_with_room_for_it_rebuilds_the_encoder(tmp_path):
    model = mae(img_size=(16, 36), num_heads=4)
    for format, name in (("mae", "a.pth"), ("timm", "a.safetensors"), ("safetensors", "b.safetensors")):
        export(model, format, tmp_path / name, {"mean": [0.1, 0.2, 0.3]})
        assert describe(build_encoder(tmp_path / name)) == describe(model)
        assert read_state(tmp_path / name)[1]["mean"] == [0.1, 0.2, 0.3]
    with safe_open(tmp_path / "b.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["amt_ray"])["encoder"]["img_size"] == [16, 36]


@pytest.mark.parametrize(
    ("format", "name", "match"),
    [
        ("onnx", "a.onnx", "format must be one of timm, mae, safetensors, got 'onnx'"),
        ("mae", "a.safetensors", "format mae must end in .pth or .pt or .bin, got .*a.safetensors"),
        ("safetensors", "a.pth", "format safetensors must end in .safetensors"),
        ("timm", "a", "format timm must end in .pth"),
    ],
)
def test_export__refuses_unknown_formats_and_suffixes(tmp_path, format, name, match):
    with pytest.raises(ValueError, match=match):
        export(mae(), format, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("format", "name", "writer"),
    [("timm", "a.pth", "torch.save"), ("mae", "a.pth", "torch.save"), ("safetensors", "a.safetensors", "save_file")],
)
def test_export__that_fails_half_way_leaves_the_older_file_and_nothing_else(
    tmp_path, monkeypatch, format, name, writer
):
    path = tmp_path / "new" / name
    export(mae(), format, path)
    older = path.read_bytes()

    def half(_, partial, **kwargs):
        partial.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(f"amt_ray.core.export.{writer}", half)
    with pytest.raises(OSError, match="disk full"):
        export(mae(), format, path)
    assert path.read_bytes() == older and list(path.parent.iterdir()) == [path]
