import pytest
import torch

from amt_ray.core.masking.amt import AMT
from amt_ray.core.masking.random import Random
from amt_ray.core.score_store import ScoreStore


def test_score_store__before_the_first_refresh_draws_are_uniform(generator):
    store = ScoreStore(3, (4, 4))
    noise = torch.rand(3, 16, generator=generator)
    scores = store.lookup(torch.arange(3)).flatten(1)
    # a larger uniform number is a larger Gumbel number, so equal weights sort by the noise, downwards
    assert torch.equal(
        AMT(0.5, 0.2)(scores, noise_BN=noise).kinds(), Random(0.5, 0.2)(noise, noise_BN=1 - noise).kinds()
    )
    assert not store.is_fresh and store.refreshed_at_epoch == -1


def filled(store, maps, epoch=0):
    store.write(torch.arange(len(maps)), maps)
    store.complete(epoch)
    return store


def test_score_store__keeps_its_own_copy_and_hands_out_copies(generator):
    store, maps = ScoreStore(4, (2, 3)), torch.rand(4, 2, 3, generator=generator)
    filled(store, maps)
    first = store.lookup(torch.tensor([1]))
    maps.zero_()
    store.lookup(torch.tensor([1])).zero_()
    assert torch.equal(store.lookup(torch.tensor([1])), first) and first.dtype == torch.float32 and store.is_fresh


@pytest.mark.parametrize("shape", [(5, 2, 3), (4, 3, 2), (4, 6), (1, 2, 3)])
def test_score_store__refuses_another_data_set_or_grid_and_keeps_what_it_has(shape):
    store, other = ScoreStore(4, (2, 3)), {"maps": torch.zeros(shape), "refreshed_at_epoch": 9}
    with pytest.raises(ValueError, match=r"scores must be \(4, 2, 3\), got \("):
        store.load_state_dict(other)
    assert not store.is_fresh and store.maps.eq(1).all()


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_score_store__broken_scores_change_nothing(broken):
    store, maps = ScoreStore(4, (2, 3)), torch.rand(4, 2, 3)
    maps[1:3, 0, 0] = broken
    with pytest.raises(ValueError, match="scores must be finite, got 2 of 4 maps that are not"):
        filled(store, maps, 3)
    assert store.maps.eq(1).all() and not store.is_fresh


def test_score_store__state_goes_through_a_file_bit_by_bit(tmp_path, generator):
    store, other = ScoreStore(4, (2, 3)), ScoreStore(4, (2, 3))
    filled(store, torch.rand(4, 2, 3, generator=generator), 40)
    torch.save(store.state_dict(), tmp_path / "scores.pt")
    other.load_state_dict(torch.load(tmp_path / "scores.pt", weights_only=True))
    assert torch.equal(store.maps, other.maps) and other.refreshed_at_epoch == 40
