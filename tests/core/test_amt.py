import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from amt_ray.core.masking.amt import AMT, attention_order

WEIGHTS = [0.05, 0.8, 0.4, 0.15, 0.6]
DRAWS = 40_000


def pair_probabilities(weights):
    """Chance of each (first, second) when patch after patch is drawn in proportion to what is left."""
    total = sum(weights)
    return {
        (i, j): weights[i] / total * weights[j] / (total - weights[i])
        for i, j in itertools.permutations(range(len(weights)), 2)
    }


def observed_pairs(order):
    counts = {}
    for i, j in order[:, :2].tolist():
        counts[i, j] = counts.get((i, j), 0) + 1
    return counts


def p_value(order):
    expected, seen = pair_probabilities(WEIGHTS), observed_pairs(order)
    keys = sorted(expected)
    return chisquare([seen.get(k, 0) for k in keys], [expected[k] * len(order) for k in keys]).pvalue


def test_attention_order__follows_its_probabilities(generator):
    noise = torch.rand(DRAWS, len(WEIGHTS), generator=generator).clamp(1e-6, 1 - 1e-6)
    order = attention_order(torch.tensor(WEIGHTS).expand(DRAWS, -1), noise)
    assert p_value(order) > 0.01


def test_the_chi_square__accepts_a_slow_sequential_draw_and_rejects_a_softmax(generator):
    random = np.random.default_rng(0)
    shares = np.array(WEIGHTS) / sum(WEIGHTS)
    slow = np.stack([random.choice(len(WEIGHTS), size=2, replace=False, p=shares) for _ in range(DRAWS // 4)])
    assert p_value(torch.from_numpy(slow)) > 0.01
    noise = torch.rand(DRAWS, len(WEIGHTS), generator=generator).clamp(1e-6, 1 - 1e-6)
    wrong = attention_order(torch.tensor(WEIGHTS).softmax(0).expand(DRAWS, -1), noise)
    assert p_value(wrong) < 1e-6


def test_amt__patches_without_attention_come_last_in_uniform_order(generator):
    weights = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.0]).expand(9000, -1)
    order = attention_order(weights, torch.rand(9000, 5, generator=generator).clamp(1e-6, 1 - 1e-6))
    assert set(order[:, :2].flatten().tolist()) == {1, 3}
    counts = torch.bincount(order[:, 2], minlength=5)[[0, 2, 4]]
    assert chisquare(counts.numpy()).pvalue > 0.01


def test_amt__masks_the_attended_and_keeps_the_ignored(generator):
    scores = torch.linspace(0.01, 1, 64).expand(500, -1)
    plan = AMT(0.45, 0.40)(scores, generator=generator)
    mean = {name: getattr(plan, name).float().mean().item() for name in ("masked", "thrown", "visible")}
    assert mean["masked"] > mean["thrown"] > mean["visible"]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_amt__does_not_care_for_the_scale_of_scores(scale, generator):
    scores, noise = torch.rand(8, 64, generator=generator) + 0.01, torch.rand(8, 64, generator=generator)
    same = AMT()(scores, noise_BN=noise).kinds() == AMT()(scores * scale, noise_BN=noise).kinds()
    assert same.float().mean() > 0.999


def test_amt__order_says_which_end_is_thrown(generator):
    scores = torch.linspace(0.01, 1, 20).expand(2, -1) ** 12
    for order, most, least in [("thrown_masked_visible", 2, 0), ("visible_masked_thrown", 0, 2)]:
        kinds = AMT(0.4, 0.3, order=order, temperature=0.02)(scores, generator=generator).kinds()
        assert kinds[:, -1].eq(most).all() and kinds[:, 0].eq(least).all()


def test_attention_order__a_low_temperature_sorts_and_a_high_one_forgets(generator):
    scores = torch.tensor([0.2, 1.0, 0.0, 0.5]).expand(4000, -1)
    noise = torch.rand(4000, 4, generator=generator).clamp(1e-6, 1 - 1e-6)
    assert torch.equal(attention_order(scores, noise, 0.01), torch.tensor([1, 3, 0, 2]).expand(4000, -1))
    hot = attention_order(scores, noise, 100)
    assert hot[:, 3].eq(2).all()  # without attention: last at any temperature
    assert chisquare(torch.bincount(hot[:, 0], minlength=4)[[0, 1, 3]].numpy()).pvalue > 0.001
