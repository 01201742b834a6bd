"""Every method, found by its file."""

import inspect

import pytest
import torch

from amt_ray import plugins
from amt_ray.core.encoder import Encoder
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


def changed(images, index_BK):
    """The images with other pixels in the given patches."""
    patches = patchify(images, 4)
    patches = patches.scatter(1, index_BK.unsqueeze(-1).expand(-1, -1, 48), 9.0)
    return unpatchify(patches, 4, (4, 6))


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
