import contextlib
import dataclasses
import io

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from amt_ray.core.coco import write_instances
from amt_ray.core.datasets import Objects
from amt_ray.core.detector import Anchors, Detector
from amt_ray.core.encoder import Encoder
from amt_ray.core.evals.detection import Detection, _Run
from amt_ray.core.methods.mae import MAE
from amt_ray.core.ports import Solo
from amt_ray.core.probing import Measured
from tests.core.probes import MemoryCheckpoints, on_threads
from tests.core.scenes import scene_encoder, scenes

QUICK = dataclasses.replace(
    Detection.presets["detection-fast-1"], epochs=2, batch_size=4, channels=8, rois=8, proposals=10
)
LEARNING = dataclasses.replace(
    QUICK, epochs=6, batch_size=2, base_lr=6.4e-2, channels=32, rois=16, proposals=30, scale=(0.8, 1.25)
)


def learned_and_untrained(task, settings):
    untrained = dataclasses.replace(settings, epochs=1, base_lr=1e-12)
    return settings(scene_encoder(32, 4), task, Solo()), untrained(scene_encoder(32, 4), task, Solo())


def test_detection__finds_shapes_by_boxes_alone():
    learned, untrained = learned_and_untrained(scenes(200, 60, max_objects=1, boxes_only=True), LEARNING)
    assert set(learned) == {"eval/box_ap", "eval/box_ap50"}
    assert learned["eval/box_ap50"] > 0.5 and untrained["eval/box_ap50"] < 0.1
    assert learned["eval/box_ap50"] > learned["eval/box_ap"] > 0.15


def test_detection__finds_shapes_and_their_masks():
    settings = dataclasses.replace(LEARNING, base_lr=3.2e-2, batch_size=4)
    learned, untrained = learned_and_untrained(scenes(240, 60), settings)
    assert set(learned) == {f"eval/{what}_{ap}" for what in ("box", "mask") for ap in ("ap", "ap50")}
    assert learned["eval/box_ap50"] > 0.35 and learned["eval/mask_ap50"] > 0.35
    assert untrained["eval/box_ap50"] < 0.1 and untrained["eval/mask_ap50"] < 0.1


class Guesses:
    """A detector that finds the truth, shaken: boxes moved, classes mistaken, some missed and some made up."""

    def __init__(self, source, masks):
        self.source, self.masks, self.random, self.said = source, masks, np.random.default_rng(0), []

    def detect(self, images, sizes):
        found = []
        for _ in sizes:
            objects = self.source.objects(len(self.said))
            k = len(objects.labels)
            kept = np.concatenate([np.flatnonzero(self.random.random(k) > 0.2), self.random.integers(0, k, 2)])
            boxes = objects.boxes[kept] + self.random.normal(0, 1.5, (len(kept), 4)).astype(np.float32)
            boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
            labels = np.where(self.random.random(len(kept)) < 0.8, objects.labels[kept], 0)
            guess = {"boxes": boxes, "labels": labels, "scores": self.random.random(len(kept)).astype(np.float32)}
            if self.masks:
                guess["masks"] = np.roll(objects.masks[kept], 1, 2)
            self.said.append(guess)
            found.append({name: torch.from_numpy(value) for name, value in guess.items()})
        return found


def by_pycocotools(truth, said, kind):
    """AP and AP50 of COCO's own evaluation, through the written file."""
    theirs = COCO()
    theirs.dataset = write_instances(truth, [str(k) for k in range(5)], [str(i) for i in range(len(truth))])
    theirs.createIndex()
    guesses = []
    for number, guess in enumerate(said, 1):
        found = Objects(truth[0].size, guess["boxes"], guess["labels"], guess.get("masks"))
        for entry, score in zip(write_instances([found], [""], [""])["annotations"], guess["scores"], strict=True):
            guesses.append({**entry, "image_id": number, "score": float(score)})
    evaluation = COCOeval(theirs, theirs.loadRes(guesses), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[:2].tolist()


@pytest.mark.parametrize("boxes_only", [True, False])
def test_detection__average_precision_is_pycocotools_own(boxes_only):
    task = scenes(2, 30, max_objects=4, boxes_only=boxes_only, one_class=False)
    crowded = task.train_source.objects

    def objects(i):
        found = crowded(i)
        return dataclasses.replace(found, crowd=np.arange(len(found.labels)) == i % 7)

    source = dataclasses.replace(task.train_source, objects=objects)
    task = dataclasses.replace(task, train_source=source)
    run = _Run(QUICK, scene_encoder(), task, Solo())
    run.model = Guesses(source, not boxes_only)
    found = run.precisions(Measured("eval", task.train, torch.arange(32)))
    truth = [objects(i) for i in range(32)]
    with contextlib.redirect_stdout(io.StringIO()):
        for what, kind in (("box", "bbox"),) if boxes_only else (("box", "bbox"), ("mask", "segm")):
            expected = by_pycocotools(truth, run.model.said, kind)
            assert [found[f"eval/{what}_ap"], found[f"eval/{what}_ap50"]] == pytest.approx(expected, abs=1e-6)
            assert 0.1 < expected[0] < expected[1] < 0.9


@pytest.mark.parametrize("stop_after", [1, 2])
def test_detection__stopped_and_resumed_it_ends_bit_for_bit_the_same(stop_after):
    task = scenes(11, 4)
    settings = dataclasses.replace(QUICK, drop_path=0.2, accumulate=2)
    straight, broken = MemoryCheckpoints(), MemoryCheckpoints(stop_after)
    expected = settings(scene_encoder(), task, Solo(), checkpoints=straight)
    with pytest.raises(KeyboardInterrupt):
        settings(scene_encoder(), task, Solo(), checkpoints=broken)
    broken.stop_after = None
    torch.manual_seed(99)
    assert settings(scene_encoder(), task, Solo(), checkpoints=broken) == expected
    weights, theirs = straight.weights(), broken.weights()
    assert all(torch.equal(weights[name], theirs[name]) for name in weights)


@pytest.mark.parametrize("size", [2, 3])
def test_detection__ranks_end_with_the_same_weights_and_measures(size):
    """11 images in steps of 4 leave a rank of three without an image of its own in some step."""
    task, kept = scenes(11, 5), [MemoryCheckpoints() for _ in range(size)]
    encoders = [scene_encoder() for _ in range(size)]
    found = on_threads(size, lambda ranks: QUICK(encoders[ranks.rank], task, ranks, checkpoints=kept[ranks.rank]))
    assert all(one == found[0] for one in found) and len(found[0]) == 4
    first = kept[0].weights()
    for each in kept[1:]:
        assert all(torch.equal(value, first[name]) for name, value in each.weights().items())


def test_detection__a_decoder_that_came_along_is_not_trained():
    task, kept = scenes(6, 2), MemoryCheckpoints()
    torch.manual_seed(0)
    encoder = MAE(32, 8, 3, 32, 2, 4, 8, 1, 2)
    QUICK(encoder, task, Solo(), checkpoints=kept)
    after, before = kept.weights(), encoder.state_dict()
    trained = {name for name in before if not torch.equal(before[name], after[f"rcnn.backbone.encoder.{name}"])}
    assert "blocks.0.mlp.fc1.weight" in trained and not any("decoder" in name for name in trained)


def test_detector__learning_rates_fall_from_the_heads_down_to_the_stem():
    model = Detector(Encoder(16, 4, 3, 16, 3, 2), (16, 16), 5, True, channels=8, rois=8)
    scales = {}
    for group in model.parameter_groups(0.05, 0.5):
        for parameter in group["params"]:
            name = next(n for n, p in model.named_parameters() if p is parameter)
            scales[name] = (group["lr_scale"], group["weight_decay"])
    assert scales.keys() == dict(model.named_parameters()).keys()
    for name, (scale, decay) in scales.items():
        inside = name.removeprefix("rcnn.backbone.encoder.")
        layer = {"cls_token": 0, "pos_embed": 0, "patch_embed": 0}.get(inside.split(".")[0], 4)
        if inside != name and inside.startswith("blocks."):
            layer = int(inside.split(".")[1]) + 1
        assert scale == 0.5 ** (4 - layer), name
        assert decay == (0.0 if name.endswith(("bias", "cls_token", "pos_embed")) or "norm" in name else 0.05) or (
            decay == 0.0 and dict(model.named_parameters())[name].ndim == 1
        ), name


def test_anchors__of_every_size_have_an_area_and_double_from_level_to_level():
    model = Detector(scene_encoder(32, 4), (32, 32), 1, False, channels=8, rois=8)
    anchors = model.rcnn.rpn.anchor_generator
    assert isinstance(anchors, Anchors) and len(anchors.cell_anchors) == 5
    for level, boxes in enumerate(anchors.cell_anchors):
        width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
        assert (width * height).sqrt().tolist() == pytest.approx([2.0**level] * 3, rel=0.01)
        assert (height / width).tolist() == pytest.approx([0.5, 1.0, 2.0], rel=0.01)


def test_detection__masks_that_some_images_lack_are_refused():
    task = scenes(4, 2)
    whole = task.train_source.objects

    def objects(i):
        return dataclasses.replace(whole(i), masks=None) if i == 2 else whole(i)

    task = dataclasses.replace(task, train_source=dataclasses.replace(task.train_source, objects=objects))
    with pytest.raises(ValueError, match="masks must be known in all images or in none, got none in shapes/train/2"):
        QUICK(scene_encoder(), task, Solo())


def test_detection__in_half_precision_it_is_the_same_protocol_and_nearly_the_same_detector():
    task, kept = scenes(6, 2), MemoryCheckpoints()
    half = dataclasses.replace(QUICK, epochs=1, precision="bfloat16")
    assert half.protocol == dataclasses.replace(QUICK, epochs=1).protocol
    run = _Run(half, scene_encoder(), task, Solo())
    maps = run.model.backbone(task.train.whole(torch.arange(2), (32, 32)))
    run.model.backbone.precision = "float32"
    exact = run.model.backbone(task.train.whole(torch.arange(2), (32, 32)))
    for name, found in maps.items():
        assert found.dtype == torch.float32 and not torch.equal(found, exact[name])
        assert torch.allclose(found, exact[name], atol=0.1)
    half(scene_encoder(), task, Solo(), checkpoints=kept)
    assert all(value.dtype == torch.float32 for value in kept.weights().values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "half"}, "precision must be one of float32, bfloat16, auto, got 'half'"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"rois": 0}, "rois must be at least 1, got 0"),
        ({"layer_decay": 0.0}, "layer_decay must be above 0 and at most 1, drops must rise, got 0.0"),
        ({"drops": (0.9, 0.8)}, r"drops must rise, got .* \(0.9, 0.8\)"),
        ({"scale": (0.0, 1.0)}, "scale must rise from above 0"),
    ],
)
def test_detection__bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Detection(**settings)


def test_detection__images_without_objects_and_grids_without_a_pyramid_are_refused():
    task = scenes(4, 2)
    bare = dataclasses.replace(task, train_source=dataclasses.replace(task.train_source, objects=None))
    with pytest.raises(ValueError, match="needs images with objects .* got images without objects"):
        QUICK(scene_encoder(), bare, Solo())
    with pytest.raises(ValueError, match="must be a power of two of at least 4 .* got 2"):
        QUICK(scene_encoder(32, 2), task, Solo())


def test_detection__the_published_schedule_drops_where_detectron2s_does():
    """184,375 steps with drops at 163,889 and 177,546, warmed up over 250."""
    published = Detection.presets["vitdet-100"]
    assert [round(share * 184375, -3) for share in published.drops] == [164000, 178000]
    assert published.base_lr * published.batch_size / 256 == pytest.approx(1e-4)
    assert (published.epochs, published.warmup_steps, published.weight_decay, published.layer_decay) == (
        100, 250, 0.1, 0.7,
    )  # fmt: skip
    task = scenes(40, 2)
    settings = dataclasses.replace(QUICK, epochs=10, drops=(0.5, 0.9), warmup_steps=4)
    fit = _Run(settings, scene_encoder(), task, Solo()).fit
    lr = []
    for step in range(100):
        fit.schedule.step_update(step)
        lr.append(max(group["lr"] for group in fit.optimizer.param_groups) / (settings.base_lr * 4 / 256))
    assert lr[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert lr[4:50] == pytest.approx([1] * 46) and lr[50:90] == pytest.approx([0.1] * 40)
    assert lr[90:] == pytest.approx([0.01] * 10)
