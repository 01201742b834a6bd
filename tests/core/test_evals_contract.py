"""Every evaluation protocol, found by its file, in a small setting of its own defaults."""

import dataclasses
import inspect

import pytest
import torch

from amt_ray import plugins
from amt_ray.core.checkpoint import random_states
from amt_ray.core.evals import Evaluation, Task
from amt_ray.core.images import ImageArray
from amt_ray.core.ports import Solo
from tests.core.probes import coloured_images, source_of, tiny_encoder

SMALL = {"epochs": 1, "warmup_epochs": 0, "batch_size": 32, "channels": 8, "rois": 8, "proposals": 8}
OTHER_CLASSES = coloured_images(8, 4, torch.Generator())
UNLABELLED = ImageArray(torch.zeros(60, 3, 8, 8).byte(), None, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(params=plugins.names("evals"))
def protocol(request):
    return plugins.load("evals", request.param)


def small(protocol):
    return protocol(**{f.name: SMALL[f.name] for f in dataclasses.fields(protocol) if f.name in SMALL})


class Untouchable(ImageArray):
    """Images that nobody may read."""

    def load(self, *args, **kwargs):
        raise AssertionError("the test split was read")


def task_of(generator, test_kind=ImageArray):
    train, test = coloured_images(60, 6, generator), coloured_images(20, 6, generator)
    sources = source_of(train), source_of(test)
    test.__class__ = test_kind
    return Task(train, torch.arange(0, 40), torch.arange(40, 60), test, (8, 8), 0, *sources)


def test_protocol__is_a_frozen_object_whose_presets_carry_their_own_names(protocol):
    assert dataclasses.is_dataclass(protocol) and protocol.__dataclass_params__.frozen
    assert protocol.presets
    for name, settings in protocol.presets.items():
        assert isinstance(settings, protocol) and settings.protocol == name
    assert len(set(map(repr, protocol.presets.values()))) == len(protocol.presets)


def test_protocol__every_setting_is_documented_and_takes_the_contracts_arguments(protocol):
    documentation = inspect.getdoc(protocol)
    assert all(f"    {f.name}: " in documentation for f in dataclasses.fields(protocol))
    assert list(inspect.signature(protocol.__call__).parameters) == list(
        inspect.signature(Evaluation.__call__).parameters
    )


@pytest.mark.parametrize("training", [True, False])
def test_protocol__leaves_encoder_modes_and_random_numbers_as_they_were(protocol, training, generator):
    encoder = tiny_encoder().train(training)
    encoder.blocks[0].train(not training)
    weights = {name: value.clone() for name, value in encoder.state_dict().items()}
    modes = [module.training for module in encoder.modules()]
    states = random_states()
    small(protocol)(encoder, task_of(generator), Solo(), test=True)
    assert str(random_states()) == str(states) and torch.equal(random_states()["torch"], states["torch"])
    assert all(torch.equal(weights[name], value) for name, value in encoder.state_dict().items())
    assert [module.training for module in encoder.modules()] == modes
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_protocol__reads_the_test_split_only_when_told_to(protocol, generator):
    found = small(protocol)(tiny_encoder(), task_of(generator, Untouchable), Solo())
    assert found and all(name.startswith("eval/") for name in found)
    with pytest.raises(AssertionError, match="the test split was read"):
        small(protocol)(tiny_encoder(), task_of(generator, Untouchable), Solo(), test=True)


def test_protocol__measures_the_same_of_both_splits_and_twice_the_same(protocol, generator):
    task, shares = task_of(generator), []
    found = small(protocol)(tiny_encoder(), task, Solo(), test=True, progress=shares.append)
    names = {name.partition("/")[2] for name in found}
    assert set(found) == {f"{split}/{name}" for split in ("eval", "test") for name in names}
    assert all(name.startswith(protocol.measures) for name in names)
    assert all(value >= 0 and (value <= 1 or "energy" in name) for name, value in found.items())
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] == 1
    assert small(protocol)(tiny_encoder(), task, Solo(), test=True) == found


def test_protocol__without_a_test_split_or_held_out_images_it_gives_what_there_is(protocol, generator):
    task = dataclasses.replace(task_of(generator), test=None)
    assert all(name.startswith("eval/") for name in small(protocol)(tiny_encoder(), task, Solo(), test=True))
    task = dataclasses.replace(task_of(generator), val_index=torch.arange(0))
    assert all(name.startswith("test/") for name in small(protocol)(tiny_encoder(), task, Solo(), test=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_index": torch.arange(0)}, "must have at least 1 image to learn from, got 0"),
        ({"test": OTHER_CLASSES, "test_source": source_of(OTHER_CLASSES)}, "must have the same classes, got 6 and 4"),
        ({"size": (8, 12)}, r"the encoder was made for, \(8, 8\), got \(8, 12\)"),
        (
            {"train": UNLABELLED, "train_source": None},
            "got images without (labels|objects|label maps)",
        ),
    ],
)
def test_protocol__images_that_cannot_be_probed_are_refused(protocol, change, message, generator):
    with pytest.raises(ValueError, match=message):
        small(protocol)(tiny_encoder(), dataclasses.replace(task_of(generator), **change), Solo(), test=True)
