import dataclasses

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from timm.optim import Lars

from amt_ray.core.evals import Task
from amt_ray.core.evals.linear_probe import LinearProbe, hold_out_for_choice
from amt_ray.core.geometry import crop_pixels
from amt_ray.core.heads import HeadFit, Probe, Rate, Standardise
from amt_ray.core.optim import cosine_schedule
from amt_ray.core.ports import Solo
from amt_ray.core.probing import centre, pooled, top_hits, up_to
from amt_ray.core.tokens import patchify
from tests.core.probes import MemoryCheckpoints, coloured_images, noise_images, on_threads, tiny_encoder

# LARS moves a head by about a thousandth of its norm times the rate a step: so few steps need large rates
RECIPE = LinearProbe(
    epochs=15, warmup_epochs=2, batch_size=64, base_lrs=(100.0,), crop_scale=(0.5, 1.0), flip=0.0, test_crop=1.0
)
FAST = LinearProbe(
    mode="cached",
    epochs=15,
    warmup_epochs=2,
    batch_size=64,
    base_lrs=(1e-4, 100.0),
    views=2,
    crop_scale=(0.5, 1.0),
    flip=0.0,
    test_crop=1.0,
)


def task_of(images, learn=400, seed=0, test=None):
    return Task(images, torch.arange(learn), torch.arange(learn, len(images)), test, (8, 8), seed)


@pytest.mark.parametrize("probe", [RECIPE, FAST])
@pytest.mark.parametrize("features", ["cls", "mean", "both"])
def test_linear_probe__separable_classes_are_found_and_random_labels_are_not(probe, features, generator):
    probe = dataclasses.replace(probe, features=features)
    coloured = probe(tiny_encoder(), task_of(coloured_images(600, 8, generator)), Solo())
    noise = probe(tiny_encoder(), task_of(noise_images(600, 8, generator)), Solo())
    assert coloured["eval/linear_top1"] > 0.8 and coloured["eval/linear_top5"] > 0.95
    assert noise["eval/linear_top1"] == pytest.approx(1 / 8, abs=0.08)
    assert noise["eval/linear_top5"] == pytest.approx(5 / 8, abs=0.12)


def test_linear_probe__agrees_with_scikit_learns_logistic_regression_on_the_same_features(generator):
    images = coloured_images(700, 8, generator)
    with torch.no_grad():
        features = pooled(tiny_encoder().eval(), images.whole(torch.arange(700), (8, 8)), "cls")[0].numpy()
    labels = images.labels_n.numpy()
    scaled = (features - features[:400].mean(0)) / features[:400].std(0)
    theirs = LogisticRegression(C=10.0, max_iter=500).fit(scaled[:400], labels[:400]).score(scaled[400:], labels[400:])
    fast = dataclasses.replace(FAST, epochs=60, crop_scale=(1.0, 1.0))
    assert fast(tiny_encoder(), task_of(images), Solo())["eval/linear_top1"] == pytest.approx(theirs, abs=0.04)


def test_top_hits__are_those_of_scikit_learn(generator):
    scores, truth = torch.randn(3, 50, 9, generator=generator), torch.randint(0, 9, (50,), generator=generator)
    for head, (top1, top5) in zip(scores, top_hits(scores, truth), strict=True):
        for top, found in ((1, top1), (5, top5)):
            theirs = top_k_accuracy_score(truth.numpy(), head.numpy(), k=top, labels=range(9), normalize=False)
            assert float(found) == theirs


def test_standardise__is_batch_norm_without_scale_in_both_modes(generator):
    ours, theirs = Standardise(6), torch.nn.BatchNorm1d(6, affine=False, eps=1e-6)
    for _ in range(3):
        batch = torch.randn(40, 6, generator=generator) * 3 + 5
        assert torch.allclose(ours(batch, ours.observe(batch, Solo())), theirs(batch), atol=1e-5)
    assert torch.allclose(ours(batch), theirs.eval()(batch), atol=1e-5)


def test_standardise__ranks_and_padding_see_the_global_batch(generator):
    batch = torch.randn(41, 6, generator=generator)
    expected = Standardise(6).observe(batch, Solo())

    def part(ranks):
        mine = batch[ranks.rank :: ranks.size]
        padded = torch.cat([mine, torch.full((2, 6), 99.0)])
        counted = torch.arange(len(padded)) < len(mine)
        return Standardise(6).observe(padded, ranks, counted)

    for moments in on_threads(3, part):
        assert torch.allclose(moments, expected, atol=1e-6)


def test_heads__many_at_once_learn_as_each_alone_by_timms_lars(generator):
    features, labels = torch.randn(32, 5, generator=generator), torch.randint(0, 4, (32,), generator=generator)
    rates = [Rate(0.5, 0.0), Rate(8.0, 1e-2), Rate(2.0, 0.0)]
    probe = Probe(5, 4, 3, seed=1)
    fit = HeadFit(probe.heads, rates, 12, 3, Solo())
    for step in range(10):
        fit.step(step, features, labels, torch.full((32,), 1 / 32))
    for head, rate in enumerate(rates):
        alone = torch.nn.Linear(5, 4)
        with torch.no_grad():
            alone.weight.copy_(Probe(5, 4, 1, seed=1).heads.weights[0])
            alone.bias.zero_()
        optimizer = Lars(
            [
                {"params": [alone.weight], "weight_decay": rate.weight_decay, "always_adapt": True},
                {"params": [alone.bias], "weight_decay": 0.0},
            ],
            lr=rate.lr,
            momentum=0.9,
        )
        schedule = cosine_schedule(optimizer, 12, 3, 0.0)
        for step in range(10):
            schedule.step_update(step)
            torch.nn.functional.cross_entropy(alone(features), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.allclose(probe.heads.weights[head], alone.weight, atol=1e-5)
        assert torch.allclose(probe.heads.biases[head], alone.bias, atol=1e-5)
    assert not torch.allclose(probe.heads.weights[0], probe.heads.weights[1], atol=1e-3)


def test_recipe__has_maes_published_settings():
    mae = LinearProbe.presets["mae-linear-90"]
    assert (mae.mode, mae.features, mae.layer, mae.epochs, mae.warmup_epochs) == ("recipe", "cls", None, 90, 10)
    assert (mae.batch_size, mae.crop_scale, mae.flip, mae.test_crop) == (16384, (0.08, 1.0), 0.5, 224 / 256)
    assert mae.rates(16384) == [Rate(6.4, 0.0)] and mae.rates(500) == [Rate(0.1 * 500 / 256, 0.0)]


def test_fast_presets__go_as_far_as_the_recipe_and_further():
    mae, estimate, fast = (LinearProbe.presets[n] for n in ("mae-linear-90", "mae-linear-fast-1", "linear-fast-1"))
    assert estimate.epochs * estimate.base_lrs[0] == pytest.approx(mae.epochs * mae.base_lrs[0])
    assert fast.base_lrs[0] == estimate.base_lrs[0] == min(fast.base_lrs)
    for setting in ("features", "layer", "crop_scale", "flip", "test_crop", "weight_decays"):
        assert getattr(mae, setting) == getattr(estimate, setting) == getattr(fast, setting)
    assert mae.epochs >= 10 * (1 + fast.views)  # times that every image is encoded


@pytest.mark.parametrize("base_lr", [10.0, 100.0])
def test_fast_mode__at_equal_epochs_and_rate_it_ends_near_the_recipe(base_lr, generator):
    task = task_of(coloured_images(600, 8, generator))
    recipe = dataclasses.replace(RECIPE, base_lrs=(base_lr,))(tiny_encoder(), task, Solo())
    cached = dataclasses.replace(FAST, base_lrs=(base_lr,))(tiny_encoder(), task, Solo())
    assert cached["eval/linear_top1"] == pytest.approx(recipe["eval/linear_top1"], abs=0.08)


def test_recipe__a_batch_larger_than_the_data_is_the_data(generator):
    images = coloured_images(120, 4, generator)
    found = [
        dataclasses.replace(RECIPE, epochs=4, batch_size=size)(tiny_encoder(), task_of(images, 80), Solo())
        for size in (80, 16384)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("probe", [RECIPE, FAST])
@pytest.mark.parametrize("size", [2, 3])
def test_linear_probe__any_number_of_ranks_finds_the_same(probe, size, generator):
    images = coloured_images(151, 6, generator)
    task = task_of(images, 100, test=coloured_images(41, 6, generator))
    probe = dataclasses.replace(probe, epochs=3, batch_size=32, encode_batch=16)
    alone = probe(tiny_encoder(), task, Solo(), test=True)
    encoders = [tiny_encoder() for _ in range(size)]
    for found in on_threads(size, lambda ranks: probe(encoders[ranks.rank], task, ranks, test=True)):
        assert found == pytest.approx(alone, abs=1.01 / 41)


def test_linear_probe__a_rank_without_images_takes_part(generator):
    images = coloured_images(12, 3, generator)
    probe = dataclasses.replace(FAST, epochs=2, batch_size=4)
    alone = probe(tiny_encoder(), task_of(images, 3), Solo())
    encoders = [tiny_encoder() for _ in range(4)]
    for found in on_threads(4, lambda ranks: probe(encoders[ranks.rank], task_of(images, 3), ranks)):
        assert found == pytest.approx(alone, abs=1e-6)


def test_fast_mode__held_out_images_and_test_labels_choose_nothing(generator):
    """Other labels there change what is measured, but not what is chosen."""
    images, test = coloured_images(500, 6, generator), coloured_images(60, 6, generator)
    task = task_of(images, 400, test=test)
    before = FAST(tiny_encoder(), task, Solo(), test=True)
    images.labels_n[400:], test.labels_n[:] = 0, 0
    after = FAST(tiny_encoder(), task, Solo(), test=True)
    for chosen in ("eval/linear_base_lr", "eval/linear_weight_decay"):
        assert after[chosen] == before[chosen]
    assert after["eval/linear_top1"] != before["eval/linear_top1"]
    assert after["test/linear_top1"] != before["test/linear_top1"]


def test_fast_mode__chooses_the_rate_that_learns(generator):
    """A rate of nearly nothing stays at the initial head; the held-out part of train shows it."""
    assert FAST(tiny_encoder(), task_of(coloured_images(500, 6, generator)), Solo())["eval/linear_base_lr"] > 1e-4


def test_fast_mode__the_choosing_part_is_of_train_exact_and_always_the_same():
    index = torch.arange(0, 3000, 3)
    held = hold_out_for_choice(index, 0.1)
    assert held.sum() == 100 and torch.equal(held, hold_out_for_choice(index, 0.1))
    assert hold_out_for_choice(index[:3], 0.1).sum() == 1
    thirds = held.float().reshape(10, 100).mean(1)
    assert thirds.min() > 0 and thirds.max() < 0.25


def test_linear_probe__a_layer_is_that_blocks_output_and_the_last_is_before_the_norm(generator):
    encoder, images = tiny_encoder().eval(), torch.randn(3, 3, 8, 8, generator=generator)
    seen = []
    encoder.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        whole = pooled(encoder, images, "mean")[0]
        first = pooled(up_to(encoder, 0), images, "mean")[0]
        last = up_to(encoder, -1)
        tokens = last.encode(patchify(images, 4))
    assert torch.allclose(first, seen[0][:, 1:].mean(1), atol=1e-6) and not torch.allclose(first, whole, atol=1e-2)
    assert torch.allclose(encoder.norm(tokens)[:, 1:].mean(1), whole, atol=1e-6)
    assert up_to(encoder, None) is encoder and len(encoder.blocks) == 2


@pytest.mark.parametrize("layer", [2, -3])
def test_linear_probe__a_layer_that_does_not_exist_is_refused(layer, generator):
    probe = dataclasses.replace(FAST, layer=layer)
    with pytest.raises(ValueError, match=rf"layer must be in \[-2, 1\] for 2 blocks, got {layer}"):
        probe(tiny_encoder(), task_of(coloured_images(40, 4, generator), 30), Solo())


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_recipe__stopped_and_resumed_it_ends_bit_for_bit_the_same(stop_after, generator):
    task = task_of(coloured_images(150, 6, generator), 100)
    probe = dataclasses.replace(RECIPE, epochs=4)
    straight, broken = MemoryCheckpoints(), MemoryCheckpoints(stop_after)
    expected = probe(tiny_encoder(), task, Solo(), checkpoints=straight)
    with pytest.raises(KeyboardInterrupt):
        probe(tiny_encoder(), task, Solo(), checkpoints=broken)
    broken.stop_after = None
    assert probe(tiny_encoder(), task, Solo(), checkpoints=broken) == expected
    assert straight.epochs == [1, 2, 3, 4] and broken.epochs == [1, 2, 3, 4]
    weights, theirs = straight.weights(), broken.weights()
    assert weights.keys() == theirs.keys() and all(torch.equal(weights[name], theirs[name]) for name in weights)


def test_recipe__a_checkpoint_of_another_protocol_is_refused(generator):
    task, kept = task_of(coloured_images(60, 4, generator), 40), MemoryCheckpoints()
    dataclasses.replace(RECIPE, epochs=2)(tiny_encoder(), task, Solo(), checkpoints=kept)
    with pytest.raises(ValueError, match=r"must be of the protocol .*epochs=3.*, got .*epochs=2"):
        dataclasses.replace(RECIPE, epochs=3)(tiny_encoder(), task, Solo(), checkpoints=kept)


def test_centre__is_the_middle_of_the_image():
    pixels = torch.zeros(1, 1, 16, 16)
    pixels[:, :, 4:12, 4:12] = 1
    assert torch.allclose(crop_pixels(pixels, centre(1, 0.5), (8, 8), "bilinear"), torch.ones(1, 1, 8, 8))
    assert torch.allclose(crop_pixels(pixels, centre(1, 1.0), (16, 16), "bilinear"), pixels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "quick"}, "mode must be one of recipe, cached, got 'quick'"),
        ({"features": "max"}, "features must be one of cls, mean, both, got 'max'"),
        ({"base_lrs": (0.1, 0.2)}, "one learning rate, one weight decay and no cached views, got .*0.2"),
        ({"views": 3}, "no cached views, got .* and 3"),
        ({"mode": "cached", "base_lrs": ()}, "there must be a learning rate"),
        ({"epochs": 0, "warmup_epochs": 0}, "epochs must be at least 1 .* got 0 and 0"),
        ({"epochs": 5, "warmup_epochs": 6}, "warmup_epochs at most epochs, got 5 and 6"),
        ({"held_out": 0.0}, "held_out and test_crop must be in"),
        ({"test_crop": 1.5}, "held_out and test_crop must be in .*1.5"),
        ({"precision": "half"}, "precision must be one of float32, bfloat16, auto, got 'half'"),
    ],
)
def test_linear_probe__bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LinearProbe(**settings)


def test_linear_probe__cost_settings_are_not_in_the_protocols_name():
    assert LinearProbe(encode_batch=7, precision="bfloat16").protocol == "mae-linear-90"
    assert LinearProbe(epochs=10).protocol == "mae-linear-90+epochs=10"
    fast = LinearProbe.presets["linear-fast-1"]
    assert dataclasses.replace(fast, views=1).protocol == "linear-fast-1+views=1"


def test_linear_probe__one_image_is_too_few_to_choose_with(generator):
    with pytest.raises(ValueError, match="needs at least 2 images to learn from, got 1"):
        FAST(tiny_encoder(), task_of(coloured_images(20, 4, generator), 1), Solo())
