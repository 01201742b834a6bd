import numpy as np
import pytest
import torch

from amt_ray.core.attention import Scoring
from amt_ray.core.box_energy import box_energy, covered, energy
from amt_ray.core.datasets import Objects
from amt_ray.core.datasets.shapes import Shapes
from amt_ray.core.decoded import decoded
from amt_ray.core.evals import Task
from amt_ray.core.evals.box_energy import BoxEnergy
from amt_ray.core.images import ImageArray
from amt_ray.core.ports import Solo
from tests.core.probes import on_threads, tiny_encoder


def boxes(*rows, size=(16, 24)):
    return Objects(size, np.array(rows, dtype=np.float32).reshape(-1, 4), np.zeros(len(rows), dtype=np.int64))


@pytest.mark.parametrize(
    ("rows", "patches"),
    [
        ([(0, 0, 4, 4)], {(0, 0): 1}),
        ([(4, 0, 8, 8)], {(0, 1): 1, (1, 1): 1}),
        ([(2, 0, 4, 4)], {(0, 0): 0.5}),
        ([(2, 2, 6, 6)], {(0, 0): 0.25, (0, 1): 0.25, (1, 0): 0.25, (1, 1): 0.25}),
        ([(0, 0, 4, 4), (2, 0, 8, 4)], {(0, 0): 1, (0, 1): 1}),  # what two boxes cover counts once
        ([], {}),
    ],
)
def test_covered__is_the_share_of_each_patch_in_any_box(rows, patches):
    wanted = torch.zeros(4, 6)
    for place, share in patches.items():
        wanted[place] = share
    assert torch.allclose(covered(boxes(*rows), (4, 6)), wanted, atol=1e-6)


def test_energy__is_one_for_constant_maps_and_the_inverse_area_for_maps_inside_the_box(generator):
    inside = torch.zeros(1, 24)
    inside[0, :6] = 1
    maps = torch.stack([torch.ones(24), inside[0], 1 - inside[0], torch.zeros(24)]).unsqueeze(0)
    assert torch.allclose(energy(maps, inside), torch.tensor([[1.0, 4.0, 0.0, 1.0]]))
    random = torch.rand(4000, 1, 24, generator=generator)
    assert abs(energy(random, inside.expand(4000, -1)).mean() - 1) < 0.02


@pytest.fixture(scope="module")
def shapes():
    source = Shapes(count_train=40, count_test=4).split("train")
    array = ImageArray(decoded(source, (8, 8)).pixels, source.labels, Shapes.mean, Shapes.std, source.classes)
    return source, array


def test_box_energy__agrees_with_one_image_at_a_time_and_finds_a_planted_preference(shapes):
    source, array = shapes
    encoder, index = tiny_encoder(), torch.arange(3, 33)
    found = box_energy(encoder, array, index, source.objects, Scoring(0), Solo())
    assert set(found) == {"box_energy", "box_energy_images", "box_energy_layer_00", "box_energy_layer_01"}
    assert found["box_energy"] == pytest.approx(found["box_energy_layer_00"]) and found["box_energy_images"] == 30
    one_by_one = [
        energy(
            Scoring(1)(encoder, array.whole(torch.tensor([i]), (8, 8))).unsqueeze(1),
            covered(source.objects(i), (2, 2)).reshape(1, -1),
        ).item()
        for i in index.tolist()
    ]
    assert found["box_energy_layer_01"] == pytest.approx(sum(one_by_one) / 30, rel=1e-5)

    def looks_at_the_box(model, images):
        return torch.stack([covered(source.objects(i), (2, 2)).flatten() for i in index.tolist()])

    looks_at_the_box.heads, looks_at_the_box.autocast = "mean", Scoring().autocast
    planted = box_energy(encoder, array, index, source.objects, looks_at_the_box, Solo())["box_energy"]
    assert planted > 1.3 > found["box_energy"]


@pytest.mark.parametrize("size", [2, 3])
def test_box_energy__is_the_same_for_any_number_of_ranks(shapes, size):
    source, array = shapes
    index, encoder = torch.arange(31), tiny_encoder().eval()
    alone = box_energy(encoder, array, index, source.objects, Scoring(-1), Solo())
    for found in on_threads(size, lambda ranks: box_energy(encoder, array, index, source.objects, Scoring(-1), ranks)):
        assert found == pytest.approx(alone, rel=1e-5)


def test_box_energy__leaves_out_images_whose_boxes_tell_nothing(shapes):
    _, array = shapes
    told = {0: boxes((0, 0, 12, 8)), 1: boxes((0, 0, 24, 16)), 2: boxes()}
    encoder = tiny_encoder()
    assert box_energy(encoder, array, torch.arange(3), told.get, Scoring(), Solo())["box_energy_images"] == 1
    assert box_energy(encoder, array, torch.arange(1, 3), told.get, Scoring(), Solo()) == {}


def test_protocol__gives_the_energy_of_held_out_and_test_images(shapes):
    source, array = shapes
    encoder, index = tiny_encoder(), torch.arange(30)
    task = Task(array, index, torch.arange(30, 40), array, (8, 8), train_source=source, test_source=source)
    found = BoxEnergy(layers=(0, 1), heads="max")(encoder, task, Solo(), test=True)
    for split, chosen in (("eval", task.val_index), ("test", torch.arange(len(array)))):
        alone = box_energy(encoder, array, chosen, source.objects, Scoring((0, 1), "max"), Solo())
        assert {name: found[f"{split}/{name}"] for name in alone} == pytest.approx(alone)
    assert BoxEnergy(layers="rollout").protocol == "box-energy-1+layers=rollout"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"layers": 2}, r"in \[-2, 1\] for 2 blocks, got 2"), ({"layers": "last"}, "got"), ({"heads": (4,)}, "below 2")],
)
def test_protocol__refuses_layers_and_heads_that_are_not_there(shapes, settings, message):
    source, array = shapes
    task = Task(array, torch.arange(9), torch.arange(9, 12), None, (8, 8), train_source=source)
    with pytest.raises(ValueError, match=message):
        BoxEnergy(**settings)(tiny_encoder(), task, Solo())
