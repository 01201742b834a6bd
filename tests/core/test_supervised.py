"""Probes of features that say nothing of the classes, and of those of a timm ViT that was taught them."""

import dataclasses

import numpy as np
import pytest
import torch
from timm.models import VisionTransformer

from amt_ray.core.datasets.digits import Digits
from amt_ray.core.encoder import Encoder
from amt_ray.core.evals import Task
from amt_ray.core.images import ImageArray
from amt_ray.core.ports import Solo
from amt_ray.core.weights import load_encoder
from amt_ray.protocols import protocol

SIZES = {"img_size": 8, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}
PROBES = [
    protocol("knn"),
    protocol(
        "linear-fast-1", {"epochs": 10, "batch_size": 64, "views": 1, "crop_scale": [0.8, 1], "flip": 0, "test_crop": 1}
    ),
    protocol(
        "mae-linear-90",
        {"epochs": 10, "warmup_epochs": 1, "batch_size": 64, "base_lrs": 30, "crop_scale": [0.8, 1], "flip": 0}
        | {"test_crop": 1},
    ),
]


def digits(split):
    source = Digits().split(split)
    pixels = np.stack([np.asarray(source.open(i)) for i in range(source.count)]).transpose(0, 3, 1, 2)
    return ImageArray(pixels, source.labels, Digits.mean, Digits.std, source.classes)


@pytest.fixture(scope="module")
def task():
    return Task(digits("train"), torch.arange(1200), torch.arange(1200, 1438), digits("test"), (8, 8))


@pytest.fixture(scope="module")
def encoder(task):
    """Learnt as timm's own model, without anything of ours."""
    torch.manual_seed(0)
    model = VisionTransformer(**SIZES, num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=16 * 24)
    order = torch.cat([torch.randperm(1200) for _ in range(16)])
    for index in order.split(50):
        logits = model(task.train.whole(index, (8, 8)))
        torch.nn.functional.cross_entropy(logits, task.train.labels_n[index]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    ours = Encoder(**SIZES)
    load_encoder(ours, model.state_dict())
    return ours


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.protocol.partition("+")[0])
def test_probe__random_features_are_at_chance_and_taught_ones_far_above(probe, encoder, task):
    taught = probe(encoder, task, Solo(), test=True)
    random = np.random.default_rng(0)
    noise = [
        ImageArray(random.integers(0, 256, images.pixels_nCYX.shape, np.uint8), images.labels_n.numpy(), images.mean,
                   images.std, images.classes) for images in (task.train, task.test)
    ]  # fmt: skip
    untaught = probe(encoder, dataclasses.replace(task, train=noise[0], test=noise[1]), Solo(), test=True)
    for split in ("eval", "test"):
        name = next(key for key in taught if key.startswith(split) and key.endswith("top1"))
        assert taught[name] > 0.7, taught
        assert untaught[name] == pytest.approx(0.1, abs=0.07), untaught
