"""Drawn shapes: what is said to be in an image is what was drawn."""

import math

import numpy as np
import pytest

from amt_ray.core.datasets.shapes import CLASSES, NOISE_SPAN, Shapes


def pixels(source, i):
    return np.asarray(source.open(i))


def test_shapes__an_image_is_a_function_of_seed_split_and_index_alone():
    small, large = Shapes(count_train=3, count_test=2).split("train"), Shapes(count_train=9).split("train")
    for i in (2, 0, 1):
        assert np.array_equal(pixels(small, i), pixels(large, i)) and small.labels[i] == large.labels[i]
        assert np.array_equal(small.objects(i).masks, large.objects(i).masks)
    others = [Shapes(count_test=3).split("test"), Shapes(count_train=3, seed=1).split("train")]
    assert not any(np.array_equal(pixels(small, 0), pixels(other, 0)) for other in others)


def test_shapes__every_option_that_changes_images_changes_the_fingerprint():
    options = [{}, {"seed": 1}, {"size_px": 32}, {"max_objects": 2}, {"count_train": 5}]
    prints = [Shapes(**{"count_train": 4, "count_test": 1, **option}).split("train").fingerprint for option in options]
    assert len(set(prints)) == len(options)


def test_shapes__masks_are_apart_and_the_label_is_the_class_of_the_largest():
    source = Shapes(count_train=200, count_test=1, max_objects=12).split("train")
    counts = set()
    for i in range(source.count):
        found = source.objects(i)
        areas = [int(mask.sum()) for mask in found.masks]
        assert min(areas) > 0 and found.masks.sum(0).max() == 1
        assert source.labels[i] == found.labels[areas.index(max(areas))]
        counts.add(len(areas))
    assert counts >= {1, 2, 3, 4, 5, 6} and set(source.labels.tolist()) == set(range(len(CLASSES)))


def spread(image, mask):
    """Greatest range of a channel inside a mask, in shares of the scale."""
    return np.ptp(image[mask].astype(float), axis=0).max() / 255


def test_shapes__a_mask_holds_its_shape_to_the_pixel():
    source = Shapes(count_train=60, count_test=1, max_objects=6).split("train")
    outside = []
    for i in range(source.count):
        image = pixels(source, i)
        for mask in source.objects(i).masks:
            assert spread(image, mask) <= NOISE_SPAN + 1 / 255
            outside.append(spread(image, mask | np.roll(mask, 1, 0)) > NOISE_SPAN + 1 / 255)
    assert np.mean(outside) > 0.9  # one row more, and there is another colour in it


# area / (distance of the farthest point from the centre of mass) ** 2, and whether the shape is convex
FORMS = {
    "circle": (math.pi, True),
    "square": (2.0, True),
    "triangle": (3 * math.sqrt(3) / 4, True),
    "star": (10 * 0.5 * 0.45 * math.sin(math.pi / 5), False),
    "cross": (4 * 0.32 * (2 * math.sqrt(1 - 0.32**2) - 0.32), False),
}


def test_shapes__each_class_has_its_own_form():
    source = Shapes(count_train=40, count_test=1, size_px=256, max_objects=1).split("train")
    random, seen = np.random.default_rng(0), set()
    for i in range(source.count):
        (mask,), name = source.objects(i).masks, CLASSES[source.labels[i]]
        points = np.argwhere(mask)
        farthest = np.linalg.norm(points - points.mean(0), axis=1).max()
        area, convex = FORMS[name]
        assert len(points) / farthest**2 == pytest.approx(area, rel=0.08), name
        middles = (points[random.integers(len(points), size=(2, 2000))].sum(0) // 2).T
        gaps = 1 - mask[middles[0], middles[1]].mean()
        assert (gaps < 0.005) if convex else (gaps > 0.02), name
        seen.add(name)
    assert seen == set(FORMS) == set(CLASSES)


def test_shapes__mean_and_deviation_are_those_of_the_images():
    source = Shapes(count_train=300, count_test=1).split("train")
    values = np.stack([pixels(source, i) for i in range(source.count)]) / 255
    assert values.mean((0, 1, 2)) == pytest.approx(Shapes.mean, abs=0.03)
    assert values.std((0, 1, 2)) == pytest.approx(Shapes.std, abs=0.03)


@pytest.mark.parametrize(
    "option", [{"count_train": 0}, {"count_test": 0}, {"max_objects": 0}, {"size_px": 8}, {"seed": -1}]
)
def test_shapes__numbers_too_small_to_draw_with_are_refused(option):
    with pytest.raises(ValueError, match="shapes must have counts and max_objects of 1 or more, .* got "):
        Shapes(**option)


def test_shapes__the_least_numbers_draw():
    source = Shapes(count_train=1, count_test=1, size_px=16, max_objects=1).split("train")
    assert source.open(0).size == (16, 16) and len(source.objects(0).labels) == 1
