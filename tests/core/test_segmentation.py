import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, jaccard_score
from torch.nn.functional import adaptive_avg_pool2d

from amt_ray.core.datasets import UNKNOWN
from amt_ray.core.evals.segmentation import Segmentation, _Run, known_cross_entropy, overlaps
from amt_ray.core.methods.mae import MAE
from amt_ray.core.ports import Solo
from amt_ray.core.probing import Measured
from amt_ray.core.sampling import MicroBatch
from amt_ray.core.segmenter import Segmenter, layers_of
from amt_ray.core.tokens import patchify
from amt_ray.core.upernet import PyramidPooling, UPerNet
from tests.core.probes import MemoryCheckpoints, on_threads
from tests.core.scenes import scene_encoder, scenes

UPERNET = dataclasses.replace(Segmentation.presets["upernet-fast-1"], epochs=2, batch_size=4, channels=8)
LINEAR = dataclasses.replace(Segmentation.presets["linear-seg-fast-1"], epochs=2, batch_size=4)
TUNED = dataclasses.replace(LINEAR, freeze=False, base_lr=1.6e-2)


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        (dataclasses.replace(UPERNET, epochs=6, batch_size=8, channels=32), 0.6),
        (dataclasses.replace(TUNED, epochs=12, batch_size=16), 0.55),
        (dataclasses.replace(LINEAR, epochs=12, batch_size=16, base_lr=0.3), 0.46),
    ],
)
def test_segmentation__tells_shapes_from_the_ground(settings, least):
    task = scenes(200, 60)
    untrained = dataclasses.replace(settings, epochs=1, base_lr=1e-12)
    learned, control = (each(scene_encoder(32, 4), task, Solo()) for each in (settings, untrained))
    assert set(learned) == {"eval/miou", "eval/pixel_accuracy"}
    assert learned["eval/miou"] > least > 0.4 > control["eval/miou"]
    ground = np.mean([(task.train_source.labelmap(i) == 0).mean() for i in range(200, 260)])
    assert learned["eval/pixel_accuracy"] > ground > control["eval/pixel_accuracy"]


def test_segmentation__overlap_is_scikit_learns_on_the_pixels_of_the_original_label_maps():
    """The images are stored at 32 x 32, the label maps are of 48 x 40, in part unknown."""
    task = scenes(3, 20, one_class=False)
    random = np.random.default_rng(0)
    maps = random.integers(0, 5, (23, 48, 40)).astype(np.uint8)  # the class 5 is never there
    maps[random.random(maps.shape) < 0.2] = UNKNOWN
    source = dataclasses.replace(task.train_source, labelmap=lambda i: maps[i])
    run = _Run(LINEAR, scene_encoder(), dataclasses.replace(task, train_source=source), Solo())
    run.model.eval()
    torch.nn.init.normal_(run.model.linear.linear.weight)
    with torch.no_grad():
        run.model.linear.linear.bias[4] -= 100  # and the class 4 never found
        run.model.linear.linear.bias[5] -= 100
        index = torch.arange(3, 23)
        found = overlaps("eval", run.confusion(Measured("eval", task.train, index)))
        logits = run.model(task.train.whole(index, (32, 32)), Solo())[0]
    guesses = torch.nn.functional.interpolate(logits, (48, 40), mode="bilinear").argmax(1).numpy()
    truth, known = maps[3:], maps[3:] != UNKNOWN
    expected = jaccard_score(truth[known], guesses[known], average=None, labels=range(6), zero_division=0)
    assert 5 not in guesses and 5 not in truth[known] and expected[4] == 0 and len(set(guesses.flat)) > 1
    assert found["eval/miou"] == pytest.approx(expected[:5].mean())
    assert found["eval/pixel_accuracy"] == pytest.approx(accuracy_score(truth[known], guesses[known]))


def test_overlaps__of_nothing_known_are_none():
    assert overlaps("test", torch.zeros(3, 3)) == {"test/miou": 0.0, "test/pixel_accuracy": 0.0}


def test_loss__is_the_mean_over_known_pixels_of_each_image(generator):
    logits = torch.randn(3, 4, 5, 6, generator=generator)
    truth = torch.randint(0, 4, (3, 5, 6), generator=generator)
    truth[0, :3], truth[2] = UNKNOWN, UNKNOWN
    expected = []
    for i in range(3):
        losses = [
            -logits[i, :, y, x].log_softmax(0)[truth[i, y, x]]
            for y in range(5) for x in range(6) if truth[i, y, x] != UNKNOWN
        ]  # fmt: skip
        expected.append(float(torch.stack(losses).mean()) if losses else 0.0)
    assert known_cross_entropy(logits, truth).tolist() == pytest.approx(expected, abs=1e-5)
    assert expected[0] > 0 and expected[2] == 0


@pytest.mark.parametrize("settings", [UPERNET, LINEAR, TUNED])
@pytest.mark.parametrize("stop_after", [1, 2])
def test_segmentation__stopped_and_resumed_it_ends_bit_for_bit_the_same(settings, stop_after):
    task, settings = scenes(11, 4), dataclasses.replace(settings, drop_path=0.2, distort=True, auxiliary=True)
    straight, broken = MemoryCheckpoints(), MemoryCheckpoints(stop_after)
    expected = settings(scene_encoder(), task, Solo(), checkpoints=straight)
    with pytest.raises(KeyboardInterrupt):
        settings(scene_encoder(), task, Solo(), checkpoints=broken)
    broken.stop_after = None
    torch.manual_seed(99)
    assert settings(scene_encoder(), task, Solo(), checkpoints=broken) == expected
    weights, theirs = straight.weights(), broken.weights()
    assert all(torch.equal(weights[name], theirs[name]) for name in weights)


@pytest.mark.parametrize("settings", [UPERNET, LINEAR, TUNED])
@pytest.mark.parametrize("size", [2, 3])
def test_segmentation__any_number_of_ranks_has_the_same_gradients(settings, size):
    """Of one step on 5 images, which 2 and 3 ranks share unevenly, with one that counts nowhere."""
    task = scenes(5, 2)
    alone = _Run(settings, scene_encoder(), task, Solo())
    start = {name: value.clone() for name, value in alone.model.state_dict().items()}
    alone.loss(MicroBatch(torch.arange(5), torch.ones(5) / 5), 0).backward()
    expected = {name: p.grad for name, p in alone.model.named_parameters() if p.grad is not None}
    width = 3 if size == 2 else 2
    runs = [_Run(settings, scene_encoder(), task, Solo()) for _ in range(size)]
    for run in runs:
        run.model.load_state_dict(start)

    def work(ranks):
        run = runs[ranks.rank]
        run.ranks = ranks
        slots = torch.arange(ranks.rank * width, (ranks.rank + 1) * width)
        run.loss(MicroBatch(slots.clamp_max(4), (slots < 5).float() * (size / 5)), 0).backward()

    on_threads(size, work)
    assert expected
    for name, gradient in expected.items():
        summed = sum(dict(run.model.named_parameters())[name].grad for run in runs)
        assert torch.allclose(summed, gradient, atol=1e-5), name
    buffers = [dict(run.model.named_buffers()) for run in (alone, *runs)]
    for name, value in buffers[0].items():
        assert all(torch.allclose(each[name], value, atol=1e-5) for each in buffers[1:]), name


@pytest.mark.parametrize("settings", [UPERNET, LINEAR])
def test_segmentation__ranks_end_with_the_same_weights_and_measures(settings):
    task, kept = scenes(11, 5), [MemoryCheckpoints() for _ in range(3)]
    encoders = [scene_encoder() for _ in range(3)]
    found = on_threads(3, lambda ranks: settings(encoders[ranks.rank], task, ranks, checkpoints=kept[ranks.rank]))
    assert all(one == found[0] for one in found)
    first = kept[0].weights()
    for each in kept[1:]:
        assert all(torch.equal(value, first[name]) for name, value in each.weights().items())


@pytest.mark.parametrize("settings", [UPERNET, LINEAR, TUNED])
def test_segmentation__in_half_precision_it_is_the_same_protocol_and_still_runs(settings):
    half, kept = dataclasses.replace(settings, precision="bfloat16"), MemoryCheckpoints()
    assert half.protocol == settings.protocol
    task = scenes(6, 4)
    runs = [_Run(each, scene_encoder(), task, Solo()) for each in (half, settings)]
    near, exact = (run.model.eval()(task.train.whole(torch.arange(4), (32, 32)), Solo())[0] for run in runs)
    assert near.dtype == torch.float32 and torch.allclose(near, exact, atol=0.1) and not torch.equal(near, exact)
    assert half(scene_encoder(), task, Solo(), checkpoints=kept)["eval/pixel_accuracy"] > 0
    assert all(value.dtype == torch.float32 for value in kept.weights().values())


@pytest.mark.parametrize("freeze", [True, False])
def test_segmentation__a_frozen_encoder_stays_and_a_decoder_is_never_trained(freeze):
    task, kept = scenes(6, 2), MemoryCheckpoints()
    torch.manual_seed(0)
    encoder = MAE(32, 8, 3, 32, 2, 4, 8, 1, 2)
    dataclasses.replace(UPERNET, freeze=freeze)(encoder, task, Solo(), checkpoints=kept)
    after, before = kept.weights(), encoder.state_dict()
    trained = {name for name in before if not torch.equal(before[name], after[f"encoder.{name}"])}
    assert ("blocks.0.mlp.fc1.weight" in trained) == (not freeze) and not any("decoder" in name for name in trained)
    assert not freeze or not trained


def test_segmenter__the_linear_head_is_batch_normalisation_and_a_1x1_convolution(generator):
    encoder, images = scene_encoder().eval(), torch.randn(4, 3, 32, 32, generator=generator)
    model = Segmenter(encoder, 5, "linear", frozen=True).train()
    model.linear.linear.weight.data.normal_()
    tokens = encoder.encode(patchify(images, 8))[:, 1:]
    normal = torch.nn.BatchNorm1d(32, eps=1e-6, affine=False)
    expected = model.linear.linear(normal(tokens.flatten(0, 1))).unflatten(0, (4, 4, 4)).movedim(3, 1)
    assert torch.allclose(model(images, Solo(), torch.ones(4, dtype=torch.bool))[0], expected, atol=1e-4)
    model.eval(), normal.eval()
    expected = model.linear.linear(normal(tokens.flatten(0, 1))).unflatten(0, (4, 4, 4)).movedim(3, 1)
    assert torch.allclose(model(images, Solo())[0], expected, atol=1e-4)
    assert not model.encoder.training and not model.train().encoder.training


def test_pooling__sees_the_whole_map_and_keeps_its_shape(generator):
    pooling, given = PyramidPooling(6), torch.randn(2, 6, 5, 7, generator=generator)
    assert pooling(given).shape == given.shape
    assert [part[0].output_size for part in pooling.parts] == [1, 2, 3, 6]
    assert torch.equal(pooling.parts[0][0](given), adaptive_avg_pool2d(given, 1))
    changed = given.clone()
    changed[:, :, 0, 0] += 5
    assert not torch.allclose(pooling(changed)[:, :, -1, -1], pooling(given)[:, :, -1, -1], atol=1e-4)


@pytest.mark.parametrize("level", range(4))
def test_upernet__every_map_reaches_the_finest_logits(level, generator):
    torch.manual_seed(0)
    net, sizes = UPerNet(6, 3).eval(), [(16, 24), (8, 12), (4, 6), (2, 3)]
    maps = [torch.randn(1, 6, *size, generator=generator) for size in sizes]
    logits = net(maps)
    assert logits.shape == (1, 3, 16, 24)
    maps[level] = maps[level] + torch.randn(maps[level].shape, generator=generator)
    assert not torch.allclose(net(maps), logits, atol=1e-4)


def test_layers__are_those_of_the_published_segmentation():
    assert layers_of(12) == [3, 5, 7, 11] and layers_of(24) == [7, 11, 15, 23] and layers_of(1) == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "fcn"}, "head must be one of linear, upernet, got 'fcn'"),
        ({"precision": "half"}, "precision must be one of float32, bfloat16, auto, got 'half'"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"layer_decay": 1.2}, "layer_decay must be above 0 and at most 1, got 1.2"),
        ({"flip": 2.0}, r"flip be in \[0, 1\], got .* 2.0"),
    ],
)
def test_segmentation__bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Segmentation(**settings)


def test_segmentation__images_without_label_maps_are_refused():
    task = scenes(4, 2)
    bare = dataclasses.replace(task, train_source=dataclasses.replace(task.train_source, labelmap=None))
    with pytest.raises(ValueError, match="needs images with label maps .* got images without label maps"):
        LINEAR(scene_encoder(), bare, Solo())


def test_segmentation__the_published_settings_are_maes():
    published = Segmentation.presets["upernet-ade-160k"]
    assert published.epochs == -(-160_000 // (20_210 / 16)) and published.warmup_steps == 1500
    assert published.base_lr * published.batch_size / 256 == pytest.approx(1e-4)
    assert (published.layer_decay, published.weight_decay, published.drop_path) == (0.65, 0.05, 0.1)
    fit = _Run(dataclasses.replace(UPERNET, epochs=50, warmup_steps=4), scene_encoder(), scenes(8, 2), Solo()).fit
    lr = []
    for step in range(100):
        fit.schedule.step_update(step)
        lr.append(max(group["lr"] for group in fit.optimizer.param_groups) / (UPERNET.base_lr * 4 / 256))
    assert lr == pytest.approx([step / 4 for step in range(4)] + [1 - k / 96 for k in range(96)], abs=1e-6)
