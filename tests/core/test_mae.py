import numpy as np
import pytest
import timm
import torch

from amt_ray.core.masking.random import Random
from amt_ray.core.methods.mae import MAE
from amt_ray.core.tokens import patchify, sincos_positions, unpatchify


def slow_mae_loss(model, images, plan, normalised):
    """MAE as first written: mask tokens put in place among all tokens, loss over a 0/1 mask, image by image."""
    losses = []
    for image, visible, masked in zip(images, plan.visible, plan.masked, strict=True):
        tokens = model.patch_embed(image[None]) + model.pos_embed[:, 1:]
        cls = model.cls_token + model.pos_embed[:, :1]
        x = torch.cat([cls, torch.stack([tokens[0, i] for i in visible])[None]], 1)
        for block in model.blocks:
            x = block(x)
        x = model.decoder_embed(model.norm(x))
        full = model.mask_token.repeat(1, model.num_patches, 1)
        for place, i in enumerate(visible):
            full[0, i] = x[0, 1 + place]
        full = torch.cat([x[:, :1], full], 1) + model.decoder_pos_embed
        for block in model.decoder_blocks:
            full = block(full)
        pred = model.decoder_pred(model.decoder_norm(full))[0, 1:]
        patch = model.patch_size
        for i in masked.tolist():
            row, column = divmod(i, model.grid[1])
            pixels = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            target = pixels.permute(1, 2, 0).flatten()
            if normalised:
                target = (target - target.mean()) / (target.var() + 1e-6) ** 0.5
            losses.append(((pred[i] - target) ** 2).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("normalised", [False, True])
def test_mae__loss_is_that_of_a_slow_oracle(normalised, generator):
    torch.manual_seed(0)
    model = MAE((16, 24), 4, 3, 32, 2, 4, 16, 2, 2, norm_pix_loss=normalised)
    images = torch.randn(2, 3, 16, 24, generator=generator)
    plan = Random(0.75)(torch.ones(2, 24), generator=generator)
    with torch.no_grad():
        assert torch.allclose(model(images, plan).loss, slow_mae_loss(model, images, plan, normalised), atol=1e-5)


def block_keys(prefix, count, width):
    shapes = {
        "norm1.weight": [width], "norm1.bias": [width], "norm2.weight": [width], "norm2.bias": [width],
        "attn.qkv.weight": [3 * width, width], "attn.qkv.bias": [3 * width],
        "attn.proj.weight": [width, width], "attn.proj.bias": [width],
        "mlp.fc1.weight": [4 * width, width], "mlp.fc1.bias": [4 * width],
        "mlp.fc2.weight": [width, 4 * width], "mlp.fc2.bias": [width],
    }  # fmt: skip
    return {f"{prefix}.{i}.{key}": shape for i in range(count) for key, shape in shapes.items()}


def test_mae__keys_and_shapes_are_those_of_the_public_checkpoints():
    expected = {
        "cls_token": [1, 1, 768], "pos_embed": [1, 197, 768], "mask_token": [1, 1, 512],
        "patch_embed.proj.weight": [768, 3, 16, 16], "patch_embed.proj.bias": [768],
        "norm.weight": [768], "norm.bias": [768], "decoder_embed.weight": [512, 768], "decoder_embed.bias": [512],
        "decoder_pos_embed": [1, 197, 512], "decoder_norm.weight": [512], "decoder_norm.bias": [512],
        "decoder_pred.weight": [768, 512], "decoder_pred.bias": [768],
        **block_keys("blocks", 12, 768), **block_keys("decoder_blocks", 8, 512),
    }  # fmt: skip
    assert {key: list(value.shape) for key, value in MAE().state_dict().items()} == expected


def test_encoder__loads_into_timm_and_gives_the_same_features(generator):
    torch.manual_seed(0)
    model = MAE(32, 8, 3, 48, 3, 4, 16, 1, 2).eval()
    vit = timm.models.VisionTransformer(32, 8, embed_dim=48, depth=3, num_heads=4, num_classes=0).eval()
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(("decoder", "mask_token"))}
    vit.load_state_dict(own, strict=True)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    with torch.no_grad():
        assert torch.allclose(vit(images), model.features(images, "cls"), atol=1e-5)


def test_positions__are_those_of_the_mae_repository():
    def wave(values, width):
        angles = np.outer(values, 1 / 10000 ** (np.arange(width // 2) / (width / 2)))
        return np.concatenate([np.sin(angles), np.cos(angles)], 1)

    rows, columns = np.divmod(np.arange(3 * 5), 5)
    oracle = np.concatenate([wave(columns, 16), wave(rows, 16)], 1)
    ours = sincos_positions(32, (3, 5))[0]
    assert np.allclose(ours[1:].numpy(), oracle, atol=1e-6) and not ours[0].any()


def test_patchify__round_trips_and_places_patch_n_at_its_row_and_column(generator):
    images = torch.randn(2, 3, 12, 20, generator=generator)
    patches = patchify(images, 4)
    assert torch.equal(unpatchify(patches, 4, (3, 5)), images)
    assert torch.equal(patches[1, 7], images[1, :, 4:8, 8:12].permute(1, 2, 0).flatten())
