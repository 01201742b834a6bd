"""Every strategy, found by its file."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amt_ray import plugins

STRATEGIES = plugins.names("masking")


@pytest.fixture(params=STRATEGIES)
def strategy(request):
    kind = plugins.load("masking", request.param)
    return kind(0.4, 0.3 if kind.throws else 0.0)


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
    tied = torch.ones_like(scores)  # where scores alone decide, noise still breaks ties
    other = strategy(tied, noise_BN=torch.rand(4, 64, generator=generator))
    assert torch.equal(first.kinds(), second.kinds())
    assert not torch.equal(strategy(tied, noise_BN=noise).kinds(), other.kinds())


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


def test_strategy__that_throws_nothing_refuses_a_throwing_ratio(strategy):
    if strategy.throws:
        assert strategy.counts(64).thrown == 19
        return
    with pytest.raises(ValueError, match="throw_ratio must be 0 for .*, which throws nothing, got 0.3"):
        type(strategy)(0.4, 0.3)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -0.1])
def test_strategy__refuses_broken_scores_where_it_looks_at_them(strategy, broken):
    scores = torch.rand(2, 64)
    scores[1, 3] = broken
    if not strategy.needs_scores:
        strategy(scores).check()
        return
    with pytest.raises(ValueError, match="scores must be finite and at least 0, got"):
        strategy(scores)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy__partitions_any_grid_at_any_ratio(name, data):
    kind = plugins.load("masking", name)
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 9))
    ratios = data.draw(st.floats(0, 1)), data.draw(st.floats(0, 1)) if kind.throws else 0.0
    where = {"grid": (rows, columns)} if "grid" in {f.name for f in dataclasses.fields(kind)} else {}
    strategy, batch = kind(*ratios, **where), data.draw(st.integers(0, 3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    maps = data.draw(st.sampled_from([torch.rand, torch.zeros, torch.ones]))
    try:
        counts = strategy.counts(rows * columns)
    except ValueError:  # the ratios leave nothing visible, or mask nothing
        total = int(rows * columns * (ratios[0] + ratios[1]))
        assert total >= rows * columns - 9 * 9 * 0.05 - 1 or int(rows * columns * ratios[0]) < 1 or sum(ratios) > 1
        return
    plan = strategy(maps(batch, rows * columns).to(dtype)).check()
    assert (plan.visible.shape[1], plan.masked.shape[1], plan.thrown.shape[1]) == tuple(counts)
    assert min(counts.visible, counts.masked) >= 1 and sum(counts) == rows * columns
