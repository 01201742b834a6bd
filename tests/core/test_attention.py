import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from amt_ray.core.attention import cls_attention, join_heads, resolve_heads, resolve_layers, score_maps, stretch
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


def test_join_heads__a_constant_map_becomes_zeros():
    assert not join_heads(torch.full((2, 3, 5), 0.2)).any()


@pytest.mark.parametrize("layers", [4, -5, (0, 9), ()])
def test_resolve_layers__refuses_what_the_encoder_does_not_have(layers):
    with pytest.raises(ValueError, match=r"attention.layers must be in \[-4, 3\] for 4 blocks"):
        resolve_layers(layers, 4)


def slow_probabilities(model, images):
    """The whole attention matrices of all layers, [layer][B, H, L, L], formed the long way."""
    x = model.patch_embed(images) + model.pos_embed[:, 1:]
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
    found = []
    for block in model.blocks:
        q, k, _ = block.attn.qkv(block.norm1(x)).reshape(len(x), -1, 3, 4, 8).permute(2, 0, 3, 1, 4)
        found.append((q @ k.mT / 8**0.5).softmax(-1))
        x = block(x)
    return found


@pytest.mark.parametrize("heads", ["mean", "max", (0, 2), (-1,)])
def test_rollout__is_the_cls_row_of_the_product_of_matrices(encoder, images, heads, monkeypatch):
    monkeypatch.setattr("amt_ray.core.attention.QUERY_CHUNK", 5)
    product = torch.eye(17).expand(3, -1, -1)
    with torch.no_grad():
        for matrix in slow_probabilities(encoder, images):
            if heads == "max":
                joined = matrix.amax(1)
                joined = joined / joined.sum(-1, keepdim=True)
            else:
                joined = (matrix if heads == "mean" else matrix[:, list(heads)]).mean(1)
            product = (joined + torch.eye(17)) / 2 @ product
    expected = stretch(product[:, 0, 1:])
    assert torch.allclose(cls_attention(encoder, images, "rollout", heads), expected, atol=1e-4)


def test_score_maps__one_pass_gives_each_layer_in_the_order_asked(encoder, images):
    maps = score_maps(encoder, images, (-1, 1, 0), "max")
    for i, layer in enumerate((3, 1, 0)):
        assert torch.equal(maps[:, i], cls_attention(encoder, images, layer, "max"))


def test_join_heads__means_all_or_some_or_takes_the_greatest(generator):
    rows = torch.rand(2, 4, 9, generator=generator)
    each = stretch(rows)
    assert torch.allclose(join_heads(rows), each.mean(1))
    assert torch.allclose(join_heads(rows, "max"), each.max(1).values)
    assert torch.allclose(join_heads(rows, (0, 3)), (each[:, 0] + each[:, 3]) / 2)


@pytest.mark.parametrize("heads", [(4,), (-5,), (), "median"])
def test_resolve_heads__refuses_what_the_encoder_does_not_have(heads):
    with pytest.raises(ValueError, match="attention.heads must be mean, max, or indices below 4"):
        resolve_heads(heads, 4)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


@pytest.mark.parametrize("layers", [(-1,), (0, 1, 2), "rollout"])
def test_cls_attention__memory_grows_with_the_number_of_patches_not_with_its_square(layers):
    """The encoder is so narrow that a matrix of all pairs of patches would be the largest tensor by far."""
    largest = []
    for side in (64, 128):  # 256 and 1,024 patches
        encoder = Encoder(side, 4, 3, 8, 3, 2)
        with Largest() as seen:
            cls_attention(encoder, torch.zeros(1, 3, side, side), layers)
        largest.append(seen.numbers)
    assert largest[1] < 4.2 * largest[0] < 256**2 * 4.2
