import inspect
from pathlib import Path

import pytest
import torch

from amt_ray import plugins
from amt_ray.core.checkpoint import random_states, write_checkpoint
from amt_ray.core.cost import (
    Cost,
    Course,
    _Steps,
    checkpoint_bytes,
    score_cost,
    score_store_bytes,
    step_cost,
)
from amt_ray.core.masking.amt import AMT
from amt_ray.core.masking.attention import Attention
from amt_ray.core.masking.random import Random
from amt_ray.core.methods.mae import MAE
from amt_ray.core.methods.simmim import SimMIM
from amt_ray.core.optim import adamw
from amt_ray.core.plan import Counts, plan_counts
from amt_ray.core.schedule import Ramp, Schedule
from amt_ray.core.score_store import ScoreStore

SIZES = {
    "img_size": (16, 24), "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4,
    "decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2,
}  # fmt: skip
N, P = 24, 48


def on_meta(kind, **sizes):
    with torch.device("meta"):
        return kind(**{k: v for k, v in (SIZES | sizes).items() if k in inspect.signature(kind).parameters})


def blocks(depth, tokens, width, mlp_ratio=4):
    """Multiplications of the forward pass: queries, keys, values and their projection, the MLP, and attention."""
    return depth * (4 * tokens * width**2 + 2 * mlp_ratio * tokens * width**2 + 2 * tokens**2 * width)


FORWARD_AND_BACKWARD = 2 * 3  # two operations a multiplication; the gradients of input and weight cost one forward each
FORWARD_AND_WEIGHT = 2 * 2  # pixels get no gradient
FORWARD = 2


def test_step_cost__mae_costs_what_its_matrices_say():
    counts = Counts(visible=5, masked=9, thrown=10)
    inner = blocks(3, 1 + 5, 32) + (1 + 5) * 32 * 16 + blocks(2, 1 + 5 + 9, 16) + 9 * 16 * P
    assert step_cost(on_meta(MAE), counts) == Cost(5, FORWARD_AND_BACKWARD * inner + FORWARD_AND_WEIGHT * 5 * P * 32)


def test_step_cost__simmim_encodes_mask_tokens_too():
    counts = Counts(visible=8, masked=12, thrown=4)
    inner = blocks(3, 1 + 8 + 12, 32) + 12 * 32 * P
    assert step_cost(on_meta(SimMIM), counts) == Cost(8, FORWARD_AND_BACKWARD * inner + FORWARD_AND_WEIGHT * 8 * P * 32)


@pytest.mark.parametrize(("layers", "whole", "rows"), [(-1, 2, 1), (0, 0, 1), ((0, 1), 1, 2), (1, 1, 1)])
def test_score_cost__layers_above_are_not_run_and_only_the_row_of_cls_is_made(layers, whole, rows):
    tokens = 1 + N
    row = 32**2 + tokens * 32**2 + tokens * 32  # the query of [CLS], the keys, their products
    expected = N * P * 32 + blocks(whole, tokens, 32) + rows * row
    assert score_cost(on_meta(MAE), layers) == Cost(0, FORWARD * expected)


def test_score_cost__rollout_costs_more_than_the_last_layer():
    method = on_meta(MAE)
    assert score_cost(method, "rollout").flops > score_cost(method, -1).flops


def test_score_cost__of_vit_base_is_near_its_published_forward_pass():
    with torch.device("meta"):
        method = MAE()
    # 17.58 billion multiplications for a whole forward pass: ViT-B/16 in timm's results (github.com/huggingface/
    # pytorch-image-models, results/benchmark-infer); the last block needs its keys only
    assert 0.91 < score_cost(method, -1).flops / (2 * 17.58e9) < 0.95


@pytest.mark.parametrize("name", plugins.names("methods"))
def test_step_cost__predicted_flops_are_those_of_a_run(name):
    method = on_meta(plugins.load("methods", name), depth=1, decoder_depth=1)
    steps = _Steps(method)
    plans = [plan_counts(N, mask / 10, throw / 10) for mask in (1, 4, 7) for throw in (0, 1, 2)]
    found = [steps.flops(counts) for counts in plans]
    assert steps.is_quadratic and len(steps.known) == 7
    assert found == [steps._counted(counts) for counts in plans]


def test_step_cost__a_method_that_is_not_quadratic_is_run_every_time():
    class Cubic(MAE):
        def decode(self, encoded, plan):
            for _ in range(plan.masked.shape[1] ** 2 // 9):
                encoded = encoded @ self.blocks[0].attn.proj.weight
            return super().decode(encoded, plan)

    steps = _Steps(on_meta(Cubic, depth=1, decoder_depth=1))
    plans = [Counts(24 - masked, masked, 0) for masked in range(2, 12, 2)]
    assert [steps.flops(counts) for counts in plans] == [steps._counted(counts) for counts in plans]
    assert steps.is_quadratic is False


def course(strategy_at, **more):
    return Course(on_meta(MAE), Schedule(10, 3, 2), Random(0.75, 0.0), strategy_at, **more)


def test_course__adds_up_warm_up_switch_refreshes_and_epochs():
    amt = course(lambda progress: AMT(0.45, 0.40), layers=-2)
    warmup, after = Counts(6, 18, 0), Counts(24 - 20, 10, 10)
    assert amt.plans == {warmup: 3, after: 7} and amt.refreshes == 4  # before the epochs 3, 5, 7, 9
    by_hand = step_cost(amt.method, warmup) * 3 + step_cost(amt.method, after) * 7 + score_cost(amt.method, -2) * 4
    assert amt.cost() == by_hand and by_hand.visible_tokens == 3 * 6 + 7 * 4
    assert amt.cost(stop=4) + amt.cost(start=4) == by_hand
    assert amt.epoch_cost(3) == step_cost(amt.method, after) + score_cost(amt.method, -2)


def test_course__a_strategy_without_scores_is_never_charged_for_them():
    assert course(lambda progress: Random(0.45, 0.40)).refreshes == 0
    assert course(lambda progress: Attention(0.75, 0.0)).refreshes == 4


def test_course__a_ratio_that_moves_is_charged_epoch_by_epoch():
    ramp = Ramp(0.3, 0.9)
    moving = course(lambda progress: Random(ramp.at(progress), 0.0))
    assert [moving.counts(e).visible for e in range(10)] == [6] * 3 + [24 - int(24 * (0.3 + 0.1 * i)) for i in range(7)]
    assert moving.cost().visible_tokens == sum(moving.counts(e).visible for e in range(10))


def test_course__units_of_patches_are_counted_as_patches():
    units = Course(on_meta(SimMIM), Schedule(2, 0), Random(0.5), lambda progress: Random(0.5, 0.2), unit=2)
    assert units.counts(0) == Counts(2 * 4, 3 * 4, 1 * 4)


def test_checkpoint_bytes__are_those_of_the_files(tmp_path: Path):
    method = MAE(**SIZES)
    optimizer = adamw(method, 1e-3, 0.05, (0.9, 0.95))
    plan = Random(0.5)(torch.ones(2, N), generator=torch.Generator().manual_seed(0))
    method(torch.randn(2, 3, 16, 24), plan).loss.backward()
    optimizer.step()
    scores = ScoreStore(5000, method.grid)
    state = {"optimizer": optimizer.state_dict(), "scores": scores.state_dict(), "random_states": [random_states()]}
    write_checkpoint(tmp_path, method.state_dict(), state, {})
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert scores.maps.numel() * scores.maps.element_size() == score_store_bytes(method, 5000)
    assert 0 < size - checkpoint_bytes(on_meta(MAE), 5000) < 150_000  # names, headers and random states
