"""Every strategy, found by its file."""

import dataclasses

import pytest
import torch

from amt_ray import plugins

STRATEGIES = plugins.names("masking")


@pytest.fixture(params=STRATEGIES)
def strategy(request):
    return plugins.load("masking", request.param)(0.4, 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scores", ["random", "zeros", "constant", "sparse"])
def test_strategy__gives_a_partition_with_its_counts(strategy, scores, dtype, generator):
    maps = {
        "random": torch.rand(6, 64, generator=generator),
        "zeros": torch.zeros(6, 64),
        "constant": torch.full((6, 64), 0.3),
        "sparse": torch.eye(64)[:6],
    }[scores].to(dtype)
    plan = strategy(maps, generator=generator).check()
    counts = strategy.counts(64)
    assert (plan.visible.shape[1], plan.masked.shape[1], plan.thrown.shape[1]) == tuple(counts)


def test_strategy__equal_noise_gives_equal_plans_and_other_noise_another(strategy, generator):
    scores, noise = torch.rand(4, 64, generator=generator), torch.rand(4, 64, generator=generator)
    first, second = strategy(scores, noise_BN=noise), strategy(scores, noise_BN=noise)
    other = strategy(scores, noise_BN=torch.rand(4, 64, generator=generator))
    assert torch.equal(first.kinds(), second.kinds())
    assert not torch.equal(first.kinds(), other.kinds())


def test_strategy__rows_do_not_depend_on_each_other(strategy, generator):
    scores, noise = torch.rand(4, 64, generator=generator), torch.rand(4, 64, generator=generator)
    together, alone = strategy(scores, noise_BN=noise), strategy(scores[2:3], noise_BN=noise[2:3])
    assert torch.equal(together.kinds()[2:3], alone.kinds())


def test_strategy__is_its_own_frozen_configuration(strategy):
    with pytest.raises(dataclasses.FrozenInstanceError):
        strategy.mask_ratio = 0.1


def test_strategy__refuses_noise_of_another_shape(strategy):
    with pytest.raises(ValueError, match="noise must have the scores' shape"):
        strategy(torch.rand(2, 64), noise_BN=torch.rand(2, 63))
