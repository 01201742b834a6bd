import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import PatchEmbed

from amt_ray.core.encoder import Encoder
from amt_ray.core.tokens import gather_tokens, pair, patch_grid, patchify, sincos_positions, unpatchify


def slow_patches(images, patch):
    """Every value of every patch by its own index."""
    B, C, Y, X = images.shape
    out = np.zeros((B, (Y // patch) * (X // patch), patch * patch * C), dtype=np.float32)
    for b, c, y, x in np.ndindex(B, C, Y, X):
        n = (y // patch) * (X // patch) + x // patch
        out[b, n, ((y % patch) * patch + x % patch) * C + c] = images[b, c, y, x]
    return torch.from_numpy(out)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    patch=st.integers(1, 4),
    chans=st.integers(1, 3),
    batch=st.integers(1, 2),
)
def test_patchify__is_the_slow_one_and_unpatchify_its_inverse(rows, columns, patch, chans, batch):
    images = torch.rand(batch, chans, rows * patch, columns * patch, generator=torch.Generator().manual_seed(0))
    patches = patchify(images, patch)
    assert torch.equal(patches, slow_patches(images.numpy(), patch))
    assert torch.equal(unpatchify(patches, patch, (rows, columns)), images)


@pytest.mark.parametrize(("size", "patch"), [(30, 4), ((32, 30), 4), (32, 0), ((30, 32), 4)])
def test_patch_grid__refuses_what_does_not_divide(size, patch):
    rows, columns = pair(size)
    with pytest.raises(ValueError, match=f"must divide the image size, got {patch} for {rows} x {columns}"):
        patch_grid(size, patch)
    assert patch_grid((32, 64), 4) == (8, 16) and patch_grid(32, 8) == (4, 4)


def test_gather_tokens__takes_each_images_own_and_shares_a_batch_of_one(generator):
    tokens, index = torch.rand(3, 7, 5, generator=generator), torch.randint(0, 7, (3, 4), generator=generator)
    for source in (tokens, tokens[:1]):
        taken = gather_tokens(source, index)
        for b, k in np.ndindex(3, 4):
            assert torch.equal(taken[b, k], source[min(b, len(source) - 1), index[b, k]])


@pytest.mark.parametrize(("dim", "grid"), [(8, (2, 3)), (768, (14, 14)), (16, (5, 1))])
def test_positions__are_built_from_the_column_then_the_row(dim, grid):
    """The formula of MAE's pos_embed.py, one number at a time."""
    half, quarter = dim // 2, dim // 4
    expected = np.zeros((1 + grid[0] * grid[1], dim))
    omega = [10000.0 ** (-i / quarter) for i in range(quarter)]
    for row, column in np.ndindex(*grid):
        for offset, coordinate in ((0, column), (half, row)):
            for i in range(quarter):
                n = 1 + row * grid[1] + column
                expected[n, offset + i] = np.sin(coordinate * omega[i])
                expected[n, offset + quarter + i] = np.cos(coordinate * omega[i])
    assert np.abs(sincos_positions(dim, grid)[0].numpy() - expected).max() < 1e-5


def test_positions__and_heads_refuse_widths_that_do_not_divide():
    with pytest.raises(ValueError, match="multiple of 4 for sine-cosine positions, got 18"):
        sincos_positions(18, (2, 2))
    with pytest.raises(ValueError, match="num_heads must divide the embedding width, got 5 heads for 32"):
        Encoder(16, 4, embed_dim=32, depth=1, num_heads=5)


def test_embed__is_timms_convolution_and_projects_only_what_is_kept(generator):
    model = Encoder((16, 24), 4, 3, 32, 1, 4)
    model.init_weights()
    images = torch.randn(2, 3, 16, 24, generator=generator)
    timms = PatchEmbed((16, 24), 4, 3, 32)
    timms.load_state_dict(model.patch_embed.state_dict())
    whole = model.embed(patchify(images, 4))
    assert torch.allclose(whole[:, 1:], timms(images) + model.pos_embed[:, 1:], atol=1e-5)
    assert torch.equal(whole[0, 0], model.cls_token[0, 0] + model.pos_embed[0, 0])
    keep = torch.stack([torch.randperm(24, generator=generator)[:5] for _ in range(2)])
    kept = model.embed(patchify(images, 4), keep)
    assert torch.equal(kept[:, 0], whole[:, 0])
    assert torch.allclose(kept[:, 1:], gather_tokens(whole[:, 1:], keep), atol=1e-5)


@pytest.mark.parametrize(("pool", "timms"), [("cls", "token"), ("mean", "avg")])
def test_encoder__is_timms_vit_tiny(pool, timms, generator):
    torch.manual_seed(0)
    model = Encoder(32, 16, embed_dim=192, depth=12, num_heads=3).eval()
    model.init_weights()
    torch.nn.init.normal_(model.norm.weight)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, global_pool=timms, fc_norm=False)
    vit.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    with torch.no_grad():
        assert torch.allclose(vit.eval()(images), model.features(images, pool), atol=1e-5)


def test_features__an_unknown_pool_is_named():
    with pytest.raises(ValueError, match="pool must be one of cls, mean, got 'max'"):
        Encoder(8, 4, embed_dim=8, depth=1, num_heads=1).features(torch.rand(1, 3, 8, 8), "max")
