"""What makes a step faster changes nothing but rounding, and the step never waits for the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from amt_ray.core.blocks import recompute_activations
from amt_ray.core.encoder import transformer
from amt_ray.core.masking.amt import AMT
from amt_ray.core.methods.mae import MAE
from amt_ray.core.ports import Silent, Solo
from amt_ray.core.prefetch import Waits, ahead
from amt_ray.core.sampling import MicroBatch
from amt_ray.runtime import local
from amt_ray.runtime.splits import load_splits
from tests.tiny import tiny

SIZES = {
    "img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2,
    "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2,
}  # fmt: skip


def mae():
    torch.manual_seed(0)
    return MAE(**SIZES)


@pytest.fixture
def images(generator):
    return torch.randn(4, 3, 32, 32, generator=generator)


@pytest.fixture
def plan(generator):
    return AMT()(torch.rand(4, 64, generator=generator), generator=generator)


def loss_and_gradients(model, images, plan, dtype=torch.float32):
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model(images, plan).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


class Seen(TorchDispatchMode):
    """The names of the operations that ran, and those that would make a host wait for its device."""

    SYNC = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "bincount")

    def __init__(self):
        super().__init__()
        self.names, self.waits = [], []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        self.names.append(name)
        by_mask = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else [])
        )
        if by_mask or any(word == name or name.startswith(f"{word}_") for word in self.SYNC):
            self.waits.append(name)
        return operation(*args, **(kwargs or {}))


def test_seen__catches_item_mask_indexing_and_nonzero():
    x = torch.arange(4.0)
    for wait in (lambda: x[0].item(), lambda: x[x > 1], lambda: bool((x > 1).any()), lambda: x.nonzero()):
        with Seen() as seen:
            wait()
        assert seen.waits


@pytest.mark.parametrize("change", [{}, {"optim__clip_grad": 1.0, "train__precision": "bfloat16"}])
def test_step__forward_backward_and_optimizer_wait_for_nothing(change):
    experiment = tiny(**change, train__accumulate=2)
    run = local.build_pretraining(experiment, load_splits(experiment), Solo())
    run.epoch = 1  # after the switch: plans are drawn from scores
    index = run.train_index[:8]
    batches = [run.prepared(local_batch(index)) for _ in range(2)]
    run.train_step(batches)  # the first step makes the optimizer's state
    with Seen() as seen:
        run.train_step(batches)
    assert not seen.waits and "_fused_adamw_" in seen.names


def local_batch(index):
    return MicroBatch(index, torch.full((len(index),), 1 / len(index)))


def test_blocks__use_the_fused_attention_in_float32_and_products_in_bfloat16_on_the_cpu():
    (block,) = transformer(32, 1, 2, 4.0)
    kernels = {}
    for dtype in (torch.float32, torch.bfloat16):
        with Seen() as seen, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            block(torch.randn(2, 9, 32, requires_grad=True)).sum()
        kernels[dtype] = any("scaled_dot_product" in name for name in seen.names)
    assert kernels == {torch.float32: True, torch.bfloat16: False}
    with torch.no_grad(), Seen() as seen, torch.autocast("cpu", torch.bfloat16):
        block(torch.randn(2, 9, 32))
    assert any("scaled_dot_product" in name for name in seen.names)


def test_bfloat16__agrees_with_the_float32_reference(images, plan):
    loss, gradients = loss_and_gradients(mae(), images, plan)
    fast_loss, fast_gradients = loss_and_gradients(mae(), images, plan, torch.bfloat16)
    assert abs(fast_loss - loss) < 0.01 * loss
    assert torch.nn.functional.cosine_similarity(gradients, fast_gradients, dim=0) > 0.995


def test_recomputed_activations__give_the_same_gradients_from_less_memory(images, plan):
    loss, gradients = loss_and_gradients(mae(), images, plan)
    model, kept = mae(), {}
    recompute_activations(model)
    again_loss, again_gradients = loss_and_gradients(model, images, plan)
    assert torch.equal(loss, again_loss) and torch.equal(gradients, again_gradients)
    for name, measured in (("all", mae()), ("inputs", model)):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            measured(images, plan)
        kept[name] = sum(sizes)
    assert kept["inputs"] < 0.5 * kept["all"]


def test_step__is_one_graph_for_the_compiler(images, plan):
    compiled = torch.compile(mae(), backend="aot_eager", fullgraph=True, dynamic=False)
    loss, gradients = loss_and_gradients(mae(), images, plan)
    compiled_loss, compiled_gradients = loss_and_gradients(compiled, images, plan)
    assert torch.allclose(loss, compiled_loss, rtol=1e-5) and torch.allclose(gradients, compiled_gradients, atol=1e-5)


def test_ahead__gives_results_in_order_and_errors_in_their_place():
    assert list(ahead(lambda i: i * i, range(20))) == [i * i for i in range(20)] and list(ahead(str, [])) == []
    results = ahead(lambda i: 1 // (2 - i), range(4))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_run__with_batches_made_ahead_is_the_same_bit_for_bit():
    experiment, weights = tiny(), []
    for prefetch in (False, True):
        run = local.build_pretraining(experiment, load_splits(experiment), Solo())
        run.prefetch, run.epoch = prefetch, 1
        run.refresh_scores()
        metrics = run.train_epoch(Silent())
        assert 0 < metrics["perf/data_wait_share"] < 1
        weights.append(run.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_waits__adds_up_the_time_of_each_item():
    waits = Waits(iter([1, 2]))
    assert list(waits) == [1, 2] and waits.waited_s > 0
