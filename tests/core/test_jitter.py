"""Image, boxes, masks and label map go the same way."""

import dataclasses

import numpy as np
import pytest
import torch
from torchvision.tv_tensors import Image, Mask

from amt_ray.core.datasets import UNKNOWN, Objects
from amt_ray.core.evals.detection import targets_of
from amt_ray.core.jitter import Jitter, Move, moved

SIZE = (48, 64)
MOVES = [
    Move(),
    Move(flip=True),
    Move(2.0, 0.0, 0.0, False),
    Move(2.0, 0.6, 0.4, True),
    Move(0.5, 0.9, 0.9, False),
    Move(0.5, 0.0, 0.0, True),
    Move(1.3, 1.0, 1.0, True),
]


def one_object(size=SIZE):
    """A bright rectangle, and the object that it is."""
    rows, columns = size
    top, left, bottom, right = rows // 4, columns // 4, rows // 2, columns // 2 + columns // 8
    mask = np.zeros((1, *size), dtype=bool)
    mask[0, top:bottom, left:right] = True
    box = np.array([[left, top, right, bottom]], dtype=np.float32)
    return Objects(size, box, np.array([2]), mask)


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("native", [SIZE, (96, 128), (96, 64)])
def test_move__a_bright_object_its_mask_its_box_and_its_label_map_stay_together(move, native):
    image = torch.from_numpy(one_object().masks).float().expand(3, -1, -1)
    objects = one_object(native)
    pixels = moved(Image(image), move, SIZE)
    target = targets_of(objects, move, SIZE)
    labelmap = moved(Mask(torch.from_numpy(objects.masks[0].astype(np.uint8))), move, SIZE, UNKNOWN)
    assert pixels.shape == (3, *SIZE) and target["masks"].shape == (1, *SIZE) and labelmap.shape == SIZE
    bright = pixels[0] > 0.5
    assert (bright != target["masks"][0].bool()).float().mean() < 0.03
    assert torch.equal(labelmap == 1, target["masks"][0].bool())
    y, x = torch.nonzero(bright, as_tuple=True)
    around = [int(v) for v in (x.min(), y.min(), x.max() + 1, y.max() + 1)]
    assert target["boxes"][0].tolist() == pytest.approx(around, abs=1.01)
    bare = targets_of(dataclasses.replace(objects, masks=None), move, SIZE)
    assert torch.allclose(bare["boxes"], target["boxes"], atol=1.01) and target["labels"].tolist() == [2]
    outside = labelmap == UNKNOWN
    assert outside.any() == (move.scale < 1) and (pixels[0][outside] == 0).all()


def test_move__the_flip_alone_mirrors_boxes_exactly():
    objects = one_object()
    (left, top, right, bottom), columns = objects.boxes[0].tolist(), SIZE[1]
    for given in (objects, dataclasses.replace(objects, masks=None)):
        found = targets_of(given, Move(flip=True), SIZE)["boxes"]
        assert found.tolist() == [[columns - right, top, columns - left, bottom]] != objects.boxes.tolist()


def test_targets__leave_out_crowds_and_what_lies_outside():
    one = one_object()
    objects = Objects(SIZE, one.boxes.repeat(2, 0), np.array([2, 1]), one.masks.repeat(2, 0), np.array([False, True]))
    assert targets_of(objects, Move(), SIZE)["labels"].tolist() == [2]
    away = Move(4.0, 1.0, 1.0)
    for given in (objects, dataclasses.replace(objects, masks=None)):
        found = targets_of(given, away, SIZE)
        assert found["boxes"].shape == (0, 4) and found["labels"].shape == (0,)
    assert targets_of(objects, away, SIZE)["masks"].shape == (0, *SIZE)


def test_jitter__is_a_function_of_seed_epoch_and_image_and_keeps_its_ranges():
    jitter, index = Jitter((0.5, 2.0), 0.3), torch.arange(2000)
    moves = jitter.draw(1, 2, index)
    assert moves[7:9] == jitter.draw(1, 2, index[7:9]) and moves != jitter.draw(1, 3, index)
    scales = np.array([move.scale for move in moves])
    assert scales.min() >= 0.5 and scales.max() <= 2.0 and scales.mean() == pytest.approx(1.25, abs=0.05)
    assert np.mean([move.flip for move in moves]) == pytest.approx(0.3, abs=0.05)
    assert np.mean([move.top for move in moves]) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("options", [{"scale": (0.0, 1.0)}, {"scale": (2.0, 1.0)}, {"flip": 1.5}])
def test_jitter__ranges_that_are_none_are_refused(options):
    with pytest.raises(ValueError, match=r"scale must rise from above 0 and flip be in \[0, 1\], got "):
        Jitter(**options)
