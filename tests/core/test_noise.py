import pytest
import torch
from scipy.stats import chisquare

from amt_ray.core.noise import Purpose, bits, permutation, uniform

INDEX = torch.arange(1000)
GOLDEN = [[1979216818, 3141895946], [4243531121, 1580729086]]


def test_noise__belongs_to_the_image_not_to_its_place_in_the_batch():
    whole = uniform(3, 7, INDEX, Purpose.PLAN, 16)
    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniform(3, 7, INDEX[shuffled], Purpose.PLAN, 16), whole[shuffled])
    assert torch.equal(uniform(3, 7, INDEX[:1], Purpose.PLAN, 5), whole[:1, :5])


@pytest.mark.parametrize(
    "other", [(4, 7, Purpose.PLAN), (3, 8, Purpose.PLAN), (3, 7, Purpose.CROP), (3 + 2**40, 7, Purpose.PLAN)]
)
def test_noise__differs_by_seed_epoch_and_purpose(other):
    seed, epoch, purpose = other
    same = uniform(3, 7, INDEX, Purpose.PLAN, 16) == uniform(seed, epoch, INDEX, purpose, 16)
    assert same.float().mean() < 1e-3


def test_noise__is_uniform_and_strictly_inside_the_unit_interval():
    noise = uniform(0, 0, torch.arange(5000), Purpose.PLAN, 64)
    assert noise.min() > 0 and noise.max() < 1
    assert chisquare(torch.histc(noise, 100, 0, 1).numpy()).pvalue > 0.001
    per_image = torch.corrcoef(noise[:, :8].T)
    assert (per_image - torch.eye(8)).abs().max() < 0.06
    neighbours = torch.corrcoef(torch.stack([noise[:-1].flatten(), noise[1:].flatten()]))[0, 1]
    assert abs(neighbours) < 0.01


def test_noise__golden_values():
    """A changed hash would silently change every resumed run."""
    assert bits(1, 2, torch.tensor([3, 2**33 + 1]), Purpose.PLAN, 2).tolist() == GOLDEN


def test_permutation__is_one_and_differs_by_epoch():
    first, second = permutation(0, 0, INDEX), permutation(0, 1, INDEX)
    assert torch.equal(first.sort().values, INDEX)
    assert not torch.equal(first, second)
    assert torch.equal(first, permutation(0, 0, INDEX))
