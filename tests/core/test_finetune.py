import dataclasses
import random

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data.auto_augment import _RAND_INCREASING_TRANSFORMS, NAME_TO_OP
from timm.layers import DropPath

from amt_ray.core.classifier import Classifier
from amt_ray.core.encoder import Encoder
from amt_ray.core.evals import Task
from amt_ray.core.evals.finetune import Finetune, even, labelled_part
from amt_ray.core.images import ImageArray
from amt_ray.core.loop import NotFiniteError
from amt_ray.core.methods.mae import MAE
from amt_ray.core.ports import Solo
from amt_ray.core.randaugment import OPERATIONS, apply, arguments, rand_augment
from amt_ray.core.sampling import MicroBatch
from amt_ray.core.tokens import patchify
from tests.core.probes import MemoryCheckpoints, coloured_images, on_threads, tiny_encoder

PLAIN = Finetune(
    epochs=3, warmup_epochs=1, batch_size=32, base_lr=4e-3, drop_path=0.0, rand_augment=0.0, mixup=0.0, cutmix=0.0,
    erasing=0.0, crop_scale=(0.5, 1.0), test_crop=1.0,
)  # fmt: skip
ALL_IN = dataclasses.replace(Finetune(), epochs=3, warmup_epochs=1, batch_size=32, base_lr=4e-3, clip_grad=5.0)


def task_of(images, learn, test=None):
    return Task(images, torch.arange(learn), torch.arange(learn, len(images)), test, (8, 8))


def digits():
    data = load_digits()
    pixels = np.repeat((data.images * (255 / 16)).round().astype(np.uint8)[:, None], 3, axis=1)
    labels = data.target.astype(np.int64)
    names = tuple(map(str, range(10)))
    parts = [
        ImageArray(pixels[part], labels[part], (0.3,) * 3, (0.38,) * 3, names) for part in (np.s_[:1400], np.s_[1400:])
    ]
    return Task(parts[0], torch.arange(1100), torch.arange(1100, 1400), parts[1], (8, 8))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_finetune__learns_digits_well_above_chance_in_a_few_epochs(pool):
    torch.manual_seed(0)
    encoder = Encoder(8, 2, 3, 32, 2, 4)
    encoder.init_weights()
    finetune = dataclasses.replace(
        PLAIN, epochs=6, base_lr=24e-3, layer_decay=0.9, pool=pool, flip=0.0, crop_scale=(0.8, 1.0)
    )
    found = finetune(encoder, digits(), Solo(), test=True)
    assert set(found) == {f"{split}/finetune_top{top}" for split in ("eval", "test") for top in (1, 5)}
    assert found["eval/finetune_top1"] > 0.7 and found["test/finetune_top1"] > 0.6 and found["test/finetune_top5"] > 0.9


def test_finetune__with_everything_on_it_still_learns(generator):
    task = task_of(coloured_images(500, 6, generator), 400)
    gentle = dataclasses.replace(ALL_IN, epochs=8, layer_decay=0.9, rand_augment=2.0)
    assert gentle(tiny_encoder(), task, Solo())["eval/finetune_top1"] > 0.4


def test_finetune__random_labels_are_guessed_at_chance(generator):
    images = coloured_images(600, 6, generator)
    images.labels_n[:] = torch.randint(0, 6, (600,), generator=generator)
    assert PLAIN(tiny_encoder(), task_of(images, 300), Solo())["eval/finetune_top1"] == pytest.approx(1 / 6, abs=0.09)


@pytest.mark.parametrize("settings", [PLAIN, ALL_IN])
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_finetune__stopped_and_resumed_it_ends_bit_for_bit_the_same(settings, stop_after, generator):
    task = task_of(coloured_images(90, 6, generator), 67)
    straight, broken = MemoryCheckpoints(), MemoryCheckpoints(stop_after)
    expected = settings(tiny_encoder(), task, Solo(), checkpoints=straight)
    with pytest.raises(KeyboardInterrupt):
        settings(tiny_encoder(), task, Solo(), checkpoints=broken)
    broken.stop_after = None
    torch.manual_seed(99)  # whatever state another process starts in
    assert settings(tiny_encoder(), task, Solo(), checkpoints=broken) == expected
    assert straight.epochs == broken.epochs == [1, 2, 3]
    weights, theirs = straight.weights(), broken.weights()
    assert weights.keys() == theirs.keys() and all(torch.equal(weights[name], theirs[name]) for name in weights)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_finetune__any_number_of_ranks_trains_the_same_weights(size, accumulate, generator):
    task = task_of(coloured_images(90, 6, generator), 67)
    alone, kept = MemoryCheckpoints(), [MemoryCheckpoints() for _ in range(size)]
    PLAIN(tiny_encoder(), task, Solo(), checkpoints=alone)
    shared = dataclasses.replace(PLAIN, accumulate=accumulate)
    encoders = [tiny_encoder() for _ in range(size)]
    found = on_threads(size, lambda ranks: shared(encoders[ranks.rank], task, ranks, checkpoints=kept[ranks.rank]))
    assert all(one == found[0] for one in found)
    for each in kept:
        for name, value in each.weights().items():
            assert torch.allclose(value, alone.weights()[name], atol=2e-4), name


@pytest.mark.parametrize(("fraction", "counts"), [(1.0, [100, 50, 7]), (0.1, [10, 5, 1]), (0.01, [1, 1, 1])])
def test_label_fraction__keeps_exactly_its_share_of_every_class(fraction, counts):
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate([100, 50, 7, 20])])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    learn = torch.where(labels != 3)[0]
    kept = labelled_part(labels, learn, fraction)
    assert labels[kept].bincount(minlength=3).tolist() == counts
    assert torch.equal(kept, labelled_part(labels, learn, fraction)) and torch.equal(kept, kept.sort().values)
    assert set(kept.tolist()) <= set(labelled_part(labels, learn, 0.5).tolist()) or fraction == 1


def test_label_fraction__other_labels_are_never_seen(generator):
    """What is not chosen may have any label."""
    images = coloured_images(200, 4, generator)
    task = task_of(images, 160)
    some = dataclasses.replace(PLAIN, label_fraction=0.1)
    kept = labelled_part(images.labels_n, task.train_index, 0.1)
    before = MemoryCheckpoints()
    some(tiny_encoder(), task, Solo(), checkpoints=before)
    order = torch.arange(160)
    left = order[~torch.isin(order, kept)]
    images.pixels_nCYX = images.pixels_nCYX.clone()
    images.pixels_nCYX[left] = 0
    after = MemoryCheckpoints()
    some(tiny_encoder(), task, Solo(), checkpoints=after)
    assert all(torch.equal(value, after.weights()[name]) for name, value in before.weights().items())


def test_layer_decay__is_that_of_mae(generator):
    """Stem 0, block i at i + 1, all above at depth + 1; the scale is decay ** (depth + 1 - layer)."""
    model = Classifier(Encoder(8, 4, 3, 16, 3, 2), 5, "mean", 0.0, 0)
    scales = {}
    for group in model.parameter_groups(0.05, 0.5):
        for parameter in group["params"]:
            name = next(n for n, p in model.named_parameters() if p is parameter)
            scales[name] = (group["lr_scale"], group["weight_decay"])
    assert scales.keys() == dict(model.named_parameters()).keys()
    for name, (scale, decay) in scales.items():
        layer = {"cls_token": 0, "pos_embed": 0, "patch_embed": 0}.get(name.split(".")[1], 4)
        if ".blocks." in name:
            layer = int(name.split(".")[2]) + 1
        assert scale == 0.5 ** (4 - layer), name
        undecayed = name.endswith(("bias", "cls_token", "pos_embed")) or "norm" in name
        assert decay == (0.0 if undecayed else 0.05), name


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_classifier__pools_as_the_papers_do(pool, generator):
    encoder, images = tiny_encoder().eval(), torch.randn(3, 3, 8, 8, generator=generator)
    model = Classifier(encoder, 5, pool, 0.3, 0).eval()
    torch.nn.init.normal_(model.head.weight)
    tokens = encoder.embed(patchify(images, 4))
    for block in encoder.blocks:
        tokens = block(tokens)
    pooled = (
        encoder.norm(tokens)[:, 0] if pool == "cls" else torch.nn.functional.layer_norm(tokens[:, 1:].mean(1), (16,))
    )
    assert torch.allclose(model(images), model.head(pooled), atol=1e-4)


def test_classifier__drop_path_rises_linearly_and_the_encoder_keeps_its_own():
    encoder = Encoder(8, 4, 3, 16, 4, 2)
    model = Classifier(encoder, 5, "cls", 0.3, 0)
    rates = [b.drop_path2.drop_prob if isinstance(b.drop_path2, DropPath) else 0.0 for b in model.encoder.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert not any(isinstance(module, DropPath) for module in encoder.modules())


def test_classifier__a_decoder_that_came_along_is_not_trained(generator):
    model = Classifier(MAE(8, 4, 3, 16, 2, 2, 8, 1, 2), 5, "mean", 0.1, 0)
    model.freeze_unused(torch.randn(3, 8, 8, generator=generator))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and not any("decoder" in name or "mask_token" in name for name in trained)
    assert {"encoder.cls_token", "encoder.pos_embed", "encoder.blocks.1.mlp.fc2.bias", "head.weight"} <= trained


def picture():
    coarse = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (48, 64), mode="bicubic").clamp(0, 1).mul(255).byte()


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("seed", [1, 3])  # each sign
def test_rand_augment__an_operation_is_timms(name, seed):
    images = picture()
    random.seed(seed)
    drawn = arguments(name, 9.0)
    ours = apply(name, images, [10.0, 20.0, 30.0], *drawn)[0].permute(1, 2, 0).int()
    pil = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    theirs = NAME_TO_OP[name](pil, *drawn, fillcolor=(10, 20, 30), resample=Image.BILINEAR)
    difference = (ours - torch.from_numpy(np.array(theirs)).int()).abs().float()
    # the borders of moved images are blended differently
    assert difference.mean() < 2.5 and difference.flatten().quantile(0.95) <= 1


def test_rand_augment__has_the_operations_of_timms_increasing_set():
    assert sorted(OPERATIONS) == sorted(_RAND_INCREASING_TRANSFORMS)


def test_rand_augment__images_of_a_batch_get_operations_of_their_own_and_half_the_layers_apply():
    random.seed(0)
    images = picture().expand(400, -1, -1, -1)
    changed = rand_augment(images, 9.0, [0.0] * 3, torch.Generator().manual_seed(0))
    assert changed.dtype == torch.uint8 and changed.shape == images.shape
    same = (changed == images).flatten(1).all(1).float().mean()
    assert same == pytest.approx(0.25, abs=0.1)  # neither layer, or one that leaves this picture as it is
    assert len({image.numpy().tobytes() for image in changed}) > 60


def test_even__adds_an_image_that_does_not_count():
    part = MicroBatch(torch.tensor([4, 5, 6]), torch.tensor([1.0, 1.0, 0.5]))
    padded = even(part)
    assert padded.index_B.tolist() == [4, 5, 6, 6] and padded.weight_B.tolist() == [1.0, 1.0, 0.5, 0.0]
    assert even(padded) is padded


def test_finetune__a_loss_that_is_no_number_stops(generator):
    images = coloured_images(60, 4, generator)
    encoder = tiny_encoder()
    encoder.norm.weight.data.fill_(3e38)  # finite, but the head's logits are not
    with pytest.raises(NotFiniteError, match="must stay finite, got nan in epoch 1 of fine-tuning"):
        dataclasses.replace(PLAIN, pool="cls")(encoder, task_of(images, 40), Solo())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pool": "max"}, "pool must be one of cls, mean, got 'max'"),
        ({"precision": "half"}, "precision must be one of float32, bfloat16, auto, got 'half'"),
        ({"epochs": 0}, "must be at least 1, .* got 0"),
        ({"warmup_epochs": 101}, "warmup_epochs at most epochs, got .* 101"),
        ({"label_fraction": 0.0}, "label_fraction, test_crop and layer_decay must be above 0"),
        ({"layer_decay": 1.5}, "must be above 0 and at most 1, got .*1.5"),
        ({"rand_augment": 11.0}, r"rand_augment must be in \[0, 10\], got 11.0"),
    ],
)
def test_finetune__bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Finetune(**settings)


def test_finetune__presets_are_the_published_recipes():
    repository, paper = (Finetune.presets[name] for name in ("mae-finetune-100", "mae-finetune-paper-100"))
    simmim = Finetune.presets["simmim-finetune-100"]
    assert (repository.base_lr, repository.layer_decay, repository.erasing, repository.pool) == (
        5e-4,
        0.65,
        0.25,
        "mean",
    )
    assert (paper.base_lr, paper.layer_decay, paper.warmup_epochs, paper.batch_size) == (1e-3, 0.75, 5, 1024)
    assert simmim.base_lr * 2048 / 256 == pytest.approx(1.25e-3 * 2048 / 512)
    assert (simmim.warmup_epochs, simmim.layer_decay, simmim.pool, simmim.clip_grad) == (20, 0.65, "mean", 5.0)
    for recipe in (repository, paper, simmim):
        assert (recipe.epochs, recipe.weight_decay, recipe.drop_path, recipe.label_smoothing) == (100, 0.05, 0.1, 0.1)
        assert (recipe.rand_augment, recipe.mixup, recipe.cutmix) == (9.0, 0.8, 1.0)
    assert dataclasses.replace(repository, label_fraction=0.01).protocol == "mae-finetune-100+label_fraction=0.01"
