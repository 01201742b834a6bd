"""Every method, found by its file."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amt_ray import plugins
from amt_ray.core.attention import cls_attention
from amt_ray.core.encoder import Encoder
from amt_ray.core.masking.amt import AMT
from amt_ray.core.masking.random import Random
from amt_ray.core.plan import PatchPlan
from amt_ray.core.tokens import patchify, unpatchify
from amt_ray.core.weights import encoder_part

SIZES = {
    "img_size": (16, 24), "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4,
    "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2,
}  # fmt: skip


@pytest.fixture(params=plugins.names("methods"))
def method(request):
    torch.manual_seed(0)
    kind = plugins.load("methods", request.param)
    return kind(**{k: v for k, v in SIZES.items() if k in inspect.signature(kind).parameters})


@pytest.fixture
def images(generator):
    return torch.randn(3, 3, 16, 24, generator=generator)


@pytest.fixture
def plan(generator):
    return Random(0.4, 0.3)(torch.ones(3, 24), generator=generator)


def changed(images, index_BK, patch=4):
    """The images with other pixels in the given patches."""
    patches = patchify(images, patch)
    patches = patches.scatter(1, index_BK.unsqueeze(-1).expand(-1, -1, patches.shape[2]), 9.0)
    return unpatchify(patches, patch, (images.shape[2] // patch, images.shape[3] // patch))


def loss_and_gradients(method, images, plan):
    method.zero_grad()
    loss = method(images, plan).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in method.parameters() if p.grad is not None]


def test_method__thrown_patches_influence_neither_loss_nor_gradient(method, images, plan):
    loss, gradients = loss_and_gradients(method, images, plan)
    other_loss, other_gradients = loss_and_gradients(method, changed(images, plan.thrown), plan)
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, other_gradients, strict=True))


def test_method__masked_pixels_are_targets_only_and_visible_pixels_are_seen(method, images, plan):
    before = method(images, plan)
    hidden, seen = method(changed(images, plan.masked), plan), method(changed(images, plan.visible), plan)
    assert torch.equal(before.pred, hidden.pred) and not torch.equal(before.loss, hidden.loss)
    assert not torch.allclose(before.pred, seen.pred, atol=1e-4)


def test_method__predicts_each_masked_patch_in_the_plans_order(method, images, plan):
    out = method(images, plan)
    assert out.pred.shape[:2] == plan.masked.shape
    turned = PatchPlan(plan.visible.flip(1), plan.masked.flip(1), plan.thrown)
    assert torch.allclose(method(images, turned).pred, out.pred.flip(1), atol=1e-5)
    assert torch.allclose(out.loss, out.loss_B.mean())


def test_method__every_parameter_that_learns_gets_a_gradient(method, images, plan):
    loss_and_gradients(method, images, plan)
    assert [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None] == []


def test_method__own_parameters_are_named_so_that_the_encoder_is_what_is_left(method):
    assert encoder_part(method.state_dict()).keys() == Encoder(**method.sizes).state_dict().keys()


@settings(max_examples=12, deadline=None)
@given(
    grid=st.tuples(st.integers(2, 4), st.integers(2, 5)),
    patch=st.sampled_from([1, 2, 3, 4, 8]),
    unit=st.sampled_from([1, 2]),
    batch=st.integers(1, 3),
    ratios=st.tuples(st.floats(0.3, 0.6), st.floats(0, 0.35)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scores=st.sampled_from(["attention", "zeros", "constant"]),
)
@pytest.mark.parametrize("name", plugins.names("methods"))
def test_method__any_size_patch_unit_and_precision_trains_on_plans_of_its_own_attention(
    name, grid, patch, unit, batch, ratios, dtype, scores
):
    kind, units = plugins.load("methods", name), grid[0] * grid[1]
    rows, columns = grid[0] * unit, grid[1] * unit
    sizes = {**SIZES, "img_size": (rows * patch, columns * patch), "patch_size": patch}
    method = kind(**{k: v for k, v in sizes.items() if k in inspect.signature(kind).parameters})
    images = torch.randn(batch, 3, rows * patch, columns * patch)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        maps = {"zeros": torch.zeros, "constant": torch.ones}.get(scores, lambda *_: cls_attention(method, images))
        scores_BU = maps(batch, rows * columns).reshape(batch, grid[0], unit, grid[1], unit).mean((2, 4)).flatten(1)
        plan = AMT(*ratios)(scores_BU).expand((rows, columns), unit).check()
        out = method(images, plan)
        same = method(changed(images, plan.thrown, patch), plan)
    out.loss.backward()
    masked = int(units * ratios[0]) * unit**2
    assert plan.masked.shape == out.pred.shape[:2] == (batch, masked) and out.loss_B.shape == (batch,)
    assert torch.isfinite(out.loss_B).all() and torch.equal(out.loss_B, same.loss_B)
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)
