import pytest
import torch

from amt_ray.core.attention import cls_attention, normalise_heads, resolve_layers
from amt_ray.core.encoder import Encoder


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    model = Encoder(16, 4, 3, 32, 4, 4)
    model.init_weights()
    return model.eval()


@pytest.fixture
def images(generator):
    return torch.randn(3, 3, 16, 16, generator=generator)


def slow_scores(model, images, layer):
    """The whole attention matrix of one layer, formed the long way; its first row, head by head."""
    x = model.patch_embed(images) + model.pos_embed[:, 1:]
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
    for block in model.blocks[:layer]:
        x = block(x)
    block = model.blocks[layer]
    q, k, _ = block.attn.qkv(block.norm1(x)).chunk(3, -1)
    heads = []
    for head in range(4):
        part = slice(head * 8, head * 8 + 8)
        row = (q[:, :, part] @ k[:, :, part].mT / 8**0.5).softmax(-1)[:, 0, 1:]
        low, high = row.min(1, keepdim=True).values, row.max(1, keepdim=True).values
        heads.append((row - low) / (high - low))
    return torch.stack(heads).mean(0)


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_cls_attention__is_the_first_row_of_the_whole_matrix(encoder, images, layer):
    with torch.no_grad():
        expected = slow_scores(encoder, images, layer)
    for index in (layer, layer - 4):
        scores = cls_attention(encoder, images, (index,))
        assert torch.allclose(scores, expected, atol=1e-5)
        assert scores.min() >= 0 and scores.max() <= 1


def test_cls_attention__averages_layers(encoder, images):
    both = cls_attention(encoder, images, (0, -1))
    alone = [cls_attention(encoder, images, layer) for layer in (0, 3)]
    assert torch.allclose(both, sum(alone) / 2, atol=1e-6)


def test_cls_attention__runs_no_layer_above_the_scored_one_and_restores_the_mode(encoder, images):
    encoder.blocks[2] = encoder.blocks[3] = torch.nn.Identity()
    encoder.blocks[2].forward = None
    encoder.train()
    cls_attention(encoder, images, (1,))
    assert encoder.training


def test_normalise_heads__a_constant_map_becomes_zeros():
    assert not normalise_heads(torch.full((2, 3, 5), 0.2)).any()


@pytest.mark.parametrize("layers", [4, -5, (0, 9), ()])
def test_resolve_layers__refuses_what_the_encoder_does_not_have(layers):
    with pytest.raises(ValueError, match=r"attention.layers must be in \[-4, 3\] for 4 blocks"):
        resolve_layers(layers, 4)
