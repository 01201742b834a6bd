import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amt_ray.core.sampling import epoch_steps, hold_out, rank_share, steps_per_epoch

GOLDEN_OF_20 = [6, 7, 8, 12, 16]


def images_of_steps(order, batch, ranks, accumulate=1):
    """The images of each step that count, in order, over all ranks."""
    shares = [list(epoch_steps(order, batch, rank, ranks, accumulate)) for rank in range(ranks)]
    return [
        [i for micros in step for micro in micros for i in micro.index_B[micro.weight_B > 0].tolist()]
        for step in zip(*shares, strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 200), ranks=st.integers(1, 5), accumulate=st.integers(1, 3), per=st.integers(1, 9))
def test_sampling__every_image_counts_once_for_any_shape(n, ranks, accumulate, per):
    order, batch = torch.randperm(n, generator=torch.Generator().manual_seed(n)), per * ranks * accumulate
    steps = images_of_steps(order, batch, ranks, accumulate)
    assert [i for step in steps for i in step] == order.tolist()
    sizes = [len(step) for step in steps]
    assert max(sizes) <= batch and max(sizes) - min(sizes) <= 1 and len(sizes) == steps_per_epoch(n, batch)
    for step in zip(*(epoch_steps(order, batch, rank, ranks, accumulate) for rank in range(ranks)), strict=True):
        micros = [micro for share in step for micro in share]
        assert len({micro.index_B.shape for micro in micros}) == 1 and all(len(s) == accumulate for s in step)
        assert float(sum(m.weight_B.sum() for m in micros)) == pytest.approx(ranks)


@pytest.mark.parametrize("n", [5, 96, 97, 120])
@pytest.mark.parametrize(("ranks", "accumulate"), [(2, 1), (3, 1), (1, 2), (2, 3), (6, 2)])
def test_sampling__a_step_holds_the_same_images_for_any_ranks_and_accumulation(n, ranks, accumulate):
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    assert images_of_steps(order, 12, ranks, accumulate) == images_of_steps(order, 12, 1)


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (2, 1), (3, 2)])
def test_sampling__the_mean_over_ranks_of_weighted_sums_is_the_mean_over_the_step(ranks, accumulate):
    order, loss_of = torch.arange(50), torch.rand(50, generator=torch.Generator().manual_seed(0))
    shares = [list(epoch_steps(order, 12, rank, ranks, accumulate)) for rank in range(ranks)]
    for images, step in zip(images_of_steps(order, 12, 1), zip(*shares, strict=True), strict=True):
        summed = sum((loss_of[m.index_B] * m.weight_B).sum() for micros in step for m in micros)
        assert torch.allclose(summed / ranks, loss_of[images].mean())


@pytest.mark.parametrize(
    ("n", "fraction", "held"), [(100, 0.0, 0), (1438, 0.1, 143), (10, 0.29, 2), (7, 0.5, 3), (3, 0.1, 0)]
)
def test_hold_out__has_its_exact_size_and_overlaps_with_nothing(n, fraction, held):
    train, out = hold_out(n, fraction)
    assert len(out) == held and sorted(train.tolist() + out.tolist()) == list(range(n))
    assert train.tolist() == sorted(train.tolist()) and out.tolist() == sorted(out.tolist())


def test_hold_out__is_frozen_and_nested():
    """Runs compare only if the same images stay held out; a smaller fraction holds out fewer of them."""
    assert hold_out(20, 0.25)[1].tolist() == GOLDEN_OF_20
    assert set(hold_out(1000, 0.05)[1].tolist()) < set(hold_out(1000, 0.1)[1].tolist())


def test_hold_out__of_fewer_train_images_are_a_part_of_more_and_hold_out_the_same():
    everything, held = hold_out(1000, 0.1)
    (few, held_by_few), (more, held_by_more) = hold_out(1000, 0.1, 50), hold_out(1000, 0.1, 400)
    assert (len(few), len(more)) == (50, 400) and set(few.tolist()) < set(more.tolist()) < set(everything.tolist())
    assert torch.equal(held, held_by_few) and torch.equal(held, held_by_more)
    assert torch.equal(hold_out(1000, 0.1, 5000)[0], everything)


@pytest.mark.parametrize(("n", "size"), [(0, 2), (1, 3), (10, 3), (9, 3)])
def test_rank_share__partitions_the_indices(n, size):
    shares = [rank_share(torch.arange(n), rank, size).tolist() for rank in range(size)]
    assert (
        sorted(i for share in shares for i in share) == list(range(n))
        and max(map(len, shares)) - min(map(len, shares)) <= 1
    )
