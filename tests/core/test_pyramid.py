import pytest
import torch
from torch.nn.functional import conv2d, layer_norm

from amt_ray.core.encoder import Encoder
from amt_ray.core.methods.mae import MAE
from amt_ray.core.pyramid import PyramidBackbone, SimplePyramid, check_grid, token_maps
from amt_ray.core.tokens import patchify
from tests.core.scenes import scene_encoder


@pytest.mark.parametrize("options", [{}, {"relative_positions": True, "positions": "none"}])
def test_token_maps__are_the_blocks_outputs_laid_out_as_the_image(options, generator):
    torch.manual_seed(0)
    encoder = Encoder((16, 24), 8, 3, 16, 3, 2, **options).eval()
    encoder.init_weights()
    images = torch.randn(2, 3, 16, 24, generator=generator)
    maps = token_maps(encoder, images, (0, -1, 2))
    assert [tuple(map_.shape) for map_ in maps] == [(2, 16, 2, 3)] * 3
    assert torch.equal(maps[1], maps[2]) and not torch.allclose(maps[0], maps[1])
    tokens = encoder.encode(patchify(images, 8))
    for row in range(2):
        for column in range(3):
            normed = encoder.norm(maps[1][:, :, row, column])
            assert torch.allclose(normed, tokens[:, 1 + row * 3 + column], atol=1e-5)


def test_pyramid__has_the_papers_strides_and_names():
    backbone = PyramidBackbone(scene_encoder(64, 8), 12)
    maps = backbone(torch.randn(2, 3, 64, 64))
    assert list(maps) == ["0", "1", "2", "3", "pool"] and backbone.out_channels == 12
    assert [tuple(map_.shape[1:]) for map_ in maps.values()] == [(12, 64 // s, 64 // s) for s in (2, 4, 8, 16, 32)]


def test_pyramid__the_map_of_the_patches_stride_is_two_convolutions_with_norms_over_channels(generator):
    pyramid = SimplePyramid(16, 12)
    given = torch.randn(2, 16, 4, 6, generator=generator)

    def norm(map_):
        return layer_norm(map_.movedim(1, 3), (12,), eps=1e-6).movedim(3, 1)

    first, _, second, _ = pyramid.project[2]
    expected = norm(conv2d(norm(conv2d(given, first.weight)), second.weight, padding=1))
    assert torch.allclose(pyramid([given] * 4)[2], expected, atol=1e-5)


def test_pyramid__a_place_in_the_image_is_the_same_place_in_all_maps():
    """With tokens that are zero but in one patch, the maps change around that patch alone."""
    pyramid = SimplePyramid(16, 12)
    given, marked = torch.zeros(1, 16, 8, 8), torch.zeros(1, 16, 8, 8)
    marked[:, :, 6, 1] = torch.arange(16.0)
    for plain, changed in zip(pyramid([given] * 4), pyramid([marked] * 4), strict=True):
        y, x = torch.nonzero((plain - changed).abs().sum((0, 1)) > 1e-6).float().add(0.5).mean(0) / plain.shape[2]
        assert y == pytest.approx(6.5 / 8, abs=0.1) and x == pytest.approx(1.5 / 8, abs=0.1)


def test_pyramid__leaves_the_encoder_alone_and_trains_a_copy():
    encoder = MAE(16, 4, 3, 16, 2, 2, 8, 1, 2)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    backbone = PyramidBackbone(encoder, 8, drop_path=0.2)
    assert all(parameter.requires_grad for parameter in backbone.encoder.parameters())
    backbone(torch.randn(2, 3, 16, 16))["0"].square().sum().backward()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter -= 0.1 * (parameter.grad if parameter.grad is not None else 0)
    assert not torch.equal(backbone.encoder.blocks[0].mlp.fc1.weight, encoder.blocks[0].mlp.fc1.weight)
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("size", "patch", "message"),
    [
        (12, 2, "power of two of at least 4 .* got 2"),
        (28, 14, "power of two of at least 4 .* got 14"),
        ((8, 12), 4, r"even sides .* got \(2, 3\)"),
    ],
)
def test_pyramid__grids_that_take_none_are_refused(size, patch, message):
    with pytest.raises(ValueError, match=message):
        check_grid(Encoder(size, patch, 3, 16, 1, 2))
