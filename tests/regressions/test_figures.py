"""Figures against the code that published ones come from: numpy's votes, COCOeval, MAE's probe and pictures.

COCOeval's -1: https://github.com/cocodataset/cocoapi/blob/master/PythonAPI/pycocotools/cocoeval.py (summarize).
MAE's LARS and probe: https://github.com/facebookresearch/mae/blob/main/util/lars.py and main_linprobe.py.
"""

import contextlib
import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import stats
from torch import nn

from amt_ray.config import ConfigError
from amt_ray.core.datasets.coco import Coco
from amt_ray.core.evals import Task
from amt_ray.core.evals.detection import Detection, _Run
from amt_ray.core.evals.knn import KNN
from amt_ray.core.heads import HeadFit, Probe, Rate
from amt_ray.core.images import ImageArray
from amt_ray.core.masking.random import Random
from amt_ray.core.methods.mae import MAE
from amt_ray.core.ports import Solo
from amt_ray.core.preview import PlanOf, preview
from amt_ray.core.probing import measured, objectless, pooled
from amt_ray.core.tokens import patchify, unpatchify
from amt_ray.report.statistics import Paired, Summary
from amt_ray.runtime import local
from amt_ray.runtime.splits import load_splits
from tests.core.probes import noise_images, tiny_encoder
from tests.core.scenes import scene_encoder
from tests.tiny import tiny

QUICK = dataclasses.replace(
    Detection.presets["detection-fast-1"], epochs=1, batch_size=4, channels=8, rois=8, proposals=10
)
SIZE = (32, 32)


# nearest neighbours


def numpy_accuracies(vectors, labels, bank, queries, k, temperature, top):
    """The share of queries whose class is among the ``top`` most voted, by plain numpy."""
    hits = 0
    for i in queries:
        cosines = vectors[bank] @ vectors[i]
        near = np.argsort(-cosines)[:k]
        votes = {}
        for j in near:
            label = labels[bank[j]]
            votes[label] = votes.get(label, 0.0) + np.exp(cosines[j] / temperature)
        hits += labels[i] in sorted(votes, key=lambda label: -votes[label])[:top]
    return hits / len(queries)


@pytest.mark.parametrize(("k", "classes"), [(1, 10), (3, 7), (4, 20), (25, 10)])
def test_knn__top1_and_top5_are_numpys_votes(k, classes, generator):
    images, bank, queries = noise_images(400, classes, generator), np.arange(250), np.arange(250, 400)
    encoder = tiny_encoder().eval()
    with torch.no_grad():
        vectors = nn.functional.normalize(
            pooled(encoder, images.whole(torch.arange(400), (8, 8)), "cls")[0].double(), dim=1
        ).numpy()
    task = Task(images, torch.from_numpy(bank), torch.from_numpy(queries), None, (8, 8))
    found = KNN(k=(k,))(encoder, task, Solo())
    for top in (1, 5):
        expected = numpy_accuracies(vectors, images.labels_n.numpy(), bank, queries, k, 0.07, top)
        assert found[f"eval/knn_top{top}"] == pytest.approx(expected, abs=1 / 150 + 1e-9)  # a tie of two votes
    if k == 1:
        assert found["eval/knn_top5"] == found["eval/knn_top1"]


def test_knn__a_vote_too_small_to_count_is_still_one(generator):
    """At a tiny temperature the second neighbour's weight is 0 in float32: its class is second all the same."""
    images = noise_images(60, 10, generator)
    task = Task(images, torch.arange(40), torch.arange(40, 60), None, (8, 8))
    found = KNN(k=(5,), temperature=1e-6)(tiny_encoder(), task, Solo())
    like = KNN(k=(5,), temperature=0.07)(tiny_encoder(), task, Solo())
    assert found["eval/knn_top5"] == like["eval/knn_top5"]


# average precision


BORDER = [[-6.0, 4.0, 16.0, 12.0], [20.0, 22.0, 30.0, 18.0], [2.0, -5.0, 9.0, 14.0], [25.0, 3.0, 12.0, 8.0]]


def write(root, split, annotations, count=10):
    """A data set in COCO's layout: ids with gaps, every third image without objects."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / f"{split}2017").mkdir(exist_ok=True)
    images = []
    for k in range(count):
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (*SIZE, 3), np.uint8)).save(
            root / f"{split}2017" / f"{k}.png"
        )
        images.append({"id": 7 + 11 * k, "file_name": f"{k}.png", "height": SIZE[0], "width": SIZE[1]})
    content = {
        "images": images,
        "annotations": [
            {"id": 3 * n + 5, "iscrowd": 0, "area": a["bbox"][2] * a["bbox"][3], **a} for n, a in enumerate(annotations)
        ],
        "categories": [{"id": 90, "name": "far"}, {"id": 4, "name": "near"}],
    }
    path = root / "annotations" / f"instances_{split}2017.json"
    path.write_text(json.dumps(content))
    return path


def boxes_of(seed, kind, count=10):
    """Annotations of random boxes, some of the given kind."""
    random = np.random.default_rng(seed)
    found = []
    for k in range(count):
        for n in range(0 if k % 3 == 1 else 3):
            left, top = random.uniform(0, 14, 2)
            bbox = [round(float(v), 2) for v in (left, top, *random.uniform(6, 16, 2))]
            extra = {}
            if kind == "border" and n == 0:
                bbox = BORDER[k % len(BORDER)]
            if kind == "flat" and n == 0:
                bbox = [bbox[0], bbox[1], 0.0, bbox[3]]
            if kind == "crowd" and n == 0:
                extra = {"iscrowd": 1}
            found.append({"image_id": 7 + 11 * k, "category_id": (4, 90)[n % 2], "bbox": bbox, **extra})
    return found


class Shaken:
    """A detector that finds about what is there, inside of the image as torchvision's heads cut it."""

    def __init__(self, path):
        self.coco, self.random, self.said = json.loads(path.read_text()), np.random.default_rng(1), []
        self.images = iter(sorted(image["id"] for image in self.coco["images"]))

    def detect(self, images, sizes):
        return [self._found(next(self.images)) for _ in sizes]

    def _found(self, image_id):
        there = [a for a in self.coco["annotations"] if a["image_id"] == image_id]
        boxes, labels = [], []
        for a in there:
            left, top, width, height = a["bbox"]
            box = np.array([left, top, left + width, top + height]) + self.random.normal(0, 1.2, 4)
            box = np.clip(box, 0, [*SIZE[::-1], *SIZE[::-1]])
            box[2:] = np.maximum(box[2:], box[:2] + 0.5)
            boxes.append(box)
            labels.append((4, 90).index(a["category_id"]))
        scores = self.random.random(len(there))
        for box, label, score in zip(boxes, labels, scores):
            left, top, right, bottom = np.float32(box).tolist()
            self.said.append({
                "image_id": image_id, "category_id": (4, 90)[label], "score": float(np.float32(score)),
                "bbox": [left, top, right - left, bottom - top],
            })  # fmt: skip
        return {
            "boxes": torch.tensor(np.array(boxes, np.float32).reshape(-1, 4)),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "scores": torch.tensor(scores, dtype=torch.float32),
        }


def coco_eval(path, said):
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO(str(path))
        evaluation = COCOeval(theirs, theirs.loadRes(said), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:2].tolist()


def task_of(root, measured_count=10):
    train = Coco(str(root)).split("train")
    test = Coco(str(root)).split("test")
    arrays = [ImageArray(np.zeros((s.count, 3, *SIZE), np.uint8), None, (0.5,) * 3, (0.5,) * 3) for s in (train, test)]
    index = torch.arange(train.count)
    return Task(arrays[0], index, index[:0], arrays[1], SIZE, 0, train, test)


@pytest.mark.parametrize("kind", ["plain", "crowd", "border", "flat"])
def test_ap__is_coco_evals_on_the_file_as_it_stands(tmp_path, kind):
    """With crowds, gaps in ids, images without objects, boxes over the border and boxes without area."""
    write(tmp_path, "train", boxes_of(0, "plain"))
    path = write(tmp_path, "val", boxes_of(1, kind))
    task = task_of(tmp_path)
    run = _Run(QUICK, scene_encoder(), task, Solo())
    run.model = Shaken(path)
    found = run.precisions(measured(task, True)[0])
    expected = coco_eval(path, run.model.said)
    assert [found["test/box_ap"], found["test/box_ap50"]] == pytest.approx(expected, abs=1e-6)
    assert 0.05 < expected[0] < expected[1] <= 1


def test_ap__boxes_that_are_otherwise_measured_than_learned_from_are_said(tmp_path):
    write(tmp_path, "train", [*boxes_of(0, "plain"), *({**a, "image_id": 7} for a in boxes_of(1, "flat")[:4])])
    write(tmp_path, "val", boxes_of(1, "border"))
    data = Coco(str(tmp_path))
    (flat,), (over,) = data.split("train").notes, data.split("test").notes
    assert "2 boxes of " in flat and "have no area in the image: not learned from, measured as not found" in flat
    assert "7 boxes of " in over and "reach over the border: learned from inside of it, measured as they stand" in over
    learned = data.split("test").objects(0).boxes
    assert learned.min() >= 0 and learned.max() <= 32 and len(data.split("train").objects(0).boxes) == 5


def test_ap__of_images_without_objects_is_not_given_and_said(tmp_path):
    write(tmp_path, "train", boxes_of(0, "plain"))
    write(tmp_path, "val", [{**a, "iscrowd": 1} for a in boxes_of(1, "plain")])
    task = task_of(tmp_path)
    assert QUICK(scene_encoder(), task, Solo(), test=True) == {}
    assert [split.prefix for split in objectless(task, True)] == ["test"] and objectless(task, False) == []
    experiment = tiny(
        data__name="coco", data__root=str(tmp_path), data__image_size=32, model__patch_size=8,
        eval__protocols=["detection-fast-1"],
    )  # fmt: skip
    splits = load_splits(experiment)
    (said,) = local.figures_left_out(experiment, splits.task)
    assert said == "no test/box_ap, test/mask_ap: none of these 10 images has an object"
    ranked = experiment.override(
        {"sweep": {"metric": "test/box_ap", "force": True, "space": {"masking.mask_ratio": {"grid": [0.4, 0.5]}}}}
    )
    with pytest.raises(ConfigError, match="sweep.metric must be a figure that there will be, got test/box_ap"):
        local.figures_left_out(ranked, splits.task)


@pytest.mark.parametrize(("change", "message"), [
    ({"bbox": None}, r"a bbox must be left, top, width and height, got None"),
    ({"bbox": [1, 2, 3]}, r"a bbox must be .* got \[1, 2, 3\]"),
    ({"bbox": [1, 2, 3, float("nan")]}, r"a bbox must be .*nan\]"),
    ({"segmentation": [[1, 2]]}, r"a polygon must have x and y of 3 points or more, got \[1, 2\]"),
    ({"segmentation": [[1, 2, 5, 6]]}, r"a polygon must have x and y of 3 points or more, got \[1, 2, 5, 6\]"),
    ({"segmentation": [[1, 2, 5, 6, 9, 9], []]}, r"a polygon must have .* got \[\]"),
    ({"segmentation": {"size": [9, 9], "counts": [81]}}, r"a segmentation must have its .*32\], got \[9, 9\]"),
    ({"segmentation": {"size": [32, 32], "counts": [5]}}, r"counts must add up to 1024 pixels, got \[5\]"),
    ({"segmentation": "here"}, r"a segmentation must be polygons or counts, got here"),
])  # fmt: skip
def test_annotations__that_cannot_be_measured_are_one_line_before_anything_starts(tmp_path, change, message):
    write(tmp_path, "train", boxes_of(0, "plain"))
    path = write(tmp_path, "val", boxes_of(1, "plain"))
    content = json.loads(path.read_text())
    content["annotations"][3].update(change)
    if content["annotations"][3]["bbox"] is None:
        del content["annotations"][3]["bbox"]
    path.write_text(json.dumps(content))
    experiment = tiny(data__name="coco", data__root=str(tmp_path), eval__protocols=["box-energy-1"])
    with pytest.raises(ConfigError, match=f"^{message} in annotation 14 of {path}.$"):
        load_splits(experiment)


def test_annotations__in_a_file_that_was_cut_off_are_one_line_with_the_file(tmp_path):
    write(tmp_path, "train", boxes_of(0, "plain"))
    path = write(tmp_path, "val", boxes_of(1, "plain"))
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match=rf"^COCO instances must be whole JSON, got [^\n]* in {path}.$"):
        Coco(str(tmp_path)).split("test")


def test_annotations__with_masks_of_some_objects_only_are_refused_before_detection_starts(tmp_path):
    square = [[4, 4, 12, 4, 12, 12, 4, 12]]
    masked = [{**a, "segmentation": square} for a in boxes_of(0, "plain")]
    for broken in (False, True):
        write(tmp_path, "train", masked)
        path = write(tmp_path, "val", [masked[0], boxes_of(1, "plain")[1]] if broken else boxes_of(1, "plain"))
        name = f"annotation 8 of {path}" if broken else "masks of one of them"
        with pytest.raises(ValueError, match=f"masks must be known .*{name}"):
            QUICK.check(scene_encoder(), task_of(tmp_path))


# MAE's linear probe


class MaesLars(torch.optim.Optimizer):
    """facebookresearch/mae, util/lars.py, line by line."""

    def __init__(self, params, lr=0, weight_decay=0, momentum=0.9, trust_coefficient=0.001):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust_coefficient}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for g in self.param_groups:
            for p in g["params"]:
                dp = p.grad
                if p.ndim > 1:
                    dp = dp.add(p, alpha=g["weight_decay"])
                    param_norm, update_norm = torch.norm(p), torch.norm(dp)
                    one = torch.ones_like(param_norm)
                    q = torch.where(
                        param_norm > 0.0, torch.where(update_norm > 0, g["trust"] * param_norm / update_norm, one), one
                    )
                    dp = dp.mul(q)
                state = self.state[p]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(p)
                mu = state["mu"]
                mu.mul_(g["momentum"]).add_(dp)
                p.add_(mu, alpha=-g["lr"])


def test_linear_probe__its_recipe_is_maes_lars_on_batch_norm(generator):
    """MAE's head: BatchNorm1d(affine=False, eps=1e-6) and a linear layer, its rate warmed up and then half a cosine."""
    steps, warmup, rate = 20, 4, 3.2
    features, labels = (
        torch.randn(400, 16, generator=generator) * 3 + 1,
        torch.randint(0, 7, (400,), generator=generator),
    )
    probe = Probe(16, 7, 1, seed=4)
    fit = HeadFit(probe.heads, [Rate(rate, 0.0)], steps, warmup, Solo())
    norm, linear = nn.BatchNorm1d(16, affine=False, eps=1e-6), nn.Linear(16, 7)
    with torch.no_grad():
        linear.weight.copy_(probe.heads.weights[0])
        linear.bias.zero_()
    optimizer = MaesLars(linear.parameters())
    for step in range(steps):
        chosen = torch.arange(32) + 32 * (step % 12)
        moments = probe.standardise.observe(features[chosen], Solo())
        standard = probe.standardise(features[chosen], moments)
        fit.step(step, standard, labels[chosen], torch.full((32,), 1 / 32))
        after = (step - warmup) / (steps - warmup)
        share = step / warmup if step < warmup else 0.5 * (1 + np.cos(np.pi * after))
        optimizer.param_groups[0]["lr"] = rate * share
        optimizer.zero_grad()
        nn.functional.cross_entropy(linear(norm(features[chosen])), labels[chosen]).backward()
        optimizer.step()
        assert (probe.standardise.mean - norm.running_mean).abs().max() < 1e-6
    assert (probe.heads.weights[0] - linear.weight).abs().max() < 2e-9
    with torch.no_grad():
        theirs = linear(norm.eval()(features))
        assert torch.allclose(probe(features)[0], theirs, atol=1e-5)


# pictures


def test_pictures__of_normalised_pixels_are_maes_arithmetic(generator):
    """mae_visualize.ipynb: the prediction times the patch's deviation plus its mean, pasted where it was masked."""
    torch.manual_seed(3)
    model = MAE(16, 4, 3, 16, 2, 2, 16, 1, 2, norm_pix_loss=True).eval()
    images = noise_images(5, 2, generator)
    images = ImageArray(
        images.pixels_nCYX.repeat_interleave(2, 2).repeat_interleave(2, 3).numpy(), None, images.mean, images.std
    )
    index = torch.tensor([0, 3])
    shown = preview(model, images, index, PlanOf(Random(0.5), tiny().scoring), seed=0)
    batch = images.whole(index, (16, 16))
    with torch.no_grad():
        pred = model(batch, shown.plan).pred
    patches = patchify(batch, 4)
    for b in range(2):
        for place, n in enumerate(shown.plan.masked[b].tolist()):
            target = patches[b, n]
            patches[b, n] = pred[b, place] * (target.var() + 1e-6) ** 0.5 + target.mean()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (images.mean, images.std))
    expected = torch.clip((unpatchify(patches, 4, (4, 4)) * std + mean) * 255, 0, 255) / 255
    assert torch.allclose(shown.reconstruction, expected, atol=1e-6)


# statistics


def test_statistics__mean_interval_and_t_are_scipys(generator):
    ours, theirs = torch.rand(2, 6, generator=generator).double().tolist()
    summary = Summary(tuple(ours))
    low, high = stats.t.interval(0.95, 5, loc=np.mean(ours), scale=stats.sem(ours))
    assert (summary.mean, *summary.interval) == pytest.approx((np.mean(ours), low, high), abs=1e-12)
    paired = Paired(Summary(tuple(a - b for a, b in zip(ours, theirs))))
    assert paired.p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue, abs=1e-12)
