import pytest
import torch

from amt_ray.core.masking.amt import AMT
from amt_ray.core.masking.random import Random
from amt_ray.core.methods.maskfeat import hog
from amt_ray.core.methods.simmim import SimMIM
from amt_ray.core.plan import Counts, PatchPlan
from amt_ray.core.relative import RelativePositions

SIZES = {"img_size": (16, 24), "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4}


@pytest.fixture(params=[{}, {"positions": "none", "relative_positions": True, "layer_scale": 0.1}])
def model(request):
    torch.manual_seed(0)
    simmim = SimMIM(**SIZES, **request.param).eval()
    if simmim.rel_pos_bias is not None:
        torch.nn.init.normal_(simmim.rel_pos_bias.relative_position_bias_table)
    return simmim


@pytest.fixture
def images(generator):
    return torch.randn(2, 3, 16, 24, generator=generator)


def slow_simmim(model, images, plan):
    """All tokens by the convolution, mask tokens put in, and attention to what is thrown forbidden by a mask."""
    tokens = model.patch_embed(images)
    kinds = plan.kinds()
    tokens = torch.where((kinds == 1).unsqueeze(-1), model.mask_token, tokens)
    tokens = torch.cat([model.cls_token.expand(len(tokens), -1, -1), tokens], 1)
    if model.pos_embed is not None:
        tokens = tokens + model.pos_embed
    thrown = torch.cat([torch.zeros(len(images), 1, dtype=torch.bool), kinds == 2], 1)
    forbidden = torch.zeros(thrown.shape).masked_fill(thrown, float("-inf"))[:, None, None, :]
    bias = model.rel_pos_bias() if model.rel_pos_bias is not None else torch.zeros(1, 1, 25, 25)
    for block in model.blocks:
        tokens = block(tokens, attn_mask=(bias + forbidden).expand(len(images), 4, 25, 25))
    pred = model.pixel_pred(model.norm(tokens)[:, 1:])
    return torch.stack([row[index] for row, index in zip(pred, plan.masked, strict=True)])


def test_simmim__equals_full_attention_that_never_looks_at_thrown_patches(model, images, generator):
    plan = AMT(0.45, 0.25)(torch.rand(2, 24, generator=generator), generator=generator)
    with torch.no_grad():
        assert torch.allclose(model(images, plan).pred, slow_simmim(model, images, plan), atol=1e-5)


def test_simmim__loss_is_the_mean_absolute_error_of_the_masked_pixels(model, images, generator):
    plan = Random(0.5)(torch.ones(2, 24), generator=generator)
    out = model(images, plan)
    total = 0.0
    for image, row, index in zip(images, out.pred, plan.masked, strict=True):
        for values, n in zip(row, index.tolist(), strict=True):
            y, x = 4 * (n // 6), 4 * (n % 6)
            total += (values.reshape(4, 4, 3) - image[:, y : y + 4, x : x + 4].permute(1, 2, 0)).abs().mean()
    assert torch.allclose(out.loss, total / (2 * 12), atol=1e-6)


def test_plan__units_expand_to_their_patches():
    units = PatchPlan.from_order(torch.tensor([[5, 0, 3, 1, 2, 4]]), Counts(visible=3, masked=2, thrown=1))
    plan = units.expand((4, 6), 2).check()
    assert plan.masked.tolist() == [[16, 17, 22, 23, 0, 1, 6, 7]] and plan.thrown.tolist() == [[12, 13, 18, 19]]
    assert units.expand((2, 3), 1) is units


def test_relative_positions__depend_on_the_offset_alone(generator):
    bias = RelativePositions((3, 4), 2)
    torch.nn.init.normal_(bias.relative_position_bias_table, generator=generator)
    table = {}
    for i in range(12):
        for j in range(12):
            offset = (i // 4 - j // 4, i % 4 - j % 4)
            value = bias()[0, :, 1 + i, 1 + j]
            assert torch.equal(table.setdefault(offset, value), value)
    assert len(table) == 5 * 7 and len({tuple(v.tolist()) for v in table.values()}) == 35
    index = torch.tensor([[7, 2, 5], [0, 11, 3]])
    for row, some in zip(index, bias(index), strict=True):
        tokens = torch.cat([torch.zeros(1, dtype=torch.long), row + 1])
        assert torch.equal(some, bias()[0][:, tokens][:, :, tokens])


def test_hog__finds_the_direction_of_an_edge():
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    across, down = hog(ramp, 8), hog(ramp.mT, 8)
    assert across.flatten().argmax() == 0 and down.flatten().argmax() == 4  # 0 and 90 degrees of 9 bins of 20
    assert torch.allclose(across.norm(), torch.tensor(1.0)) and not hog(torch.ones(1, 1, 8, 8), 4).any()
    assert torch.allclose(hog(3 * ramp, 4), hog(ramp, 4))
