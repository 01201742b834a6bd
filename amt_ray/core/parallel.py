"""How a model is spread over ranks: copied (DDP) or cut in shards (FSDP2); outside of training it is always whole."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from amt_ray.core.blocks import TransformerBlock
from amt_ray.core.ports import Ranks

Parallel = Literal["ddp", "fsdp"]


def shard(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Cut a model's parameters, and with them gradients and optimizer state, into a shard a rank, block by block.

    The parameters become new objects, so the optimizer is made afterwards.

    Args:
        model: On the ranks' device, the same on every rank.
        ranks: The processes that train together, more than one.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    for module in model.modules():
        if isinstance(module, TransformerBlock):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on it."""
    return isinstance(model, FSDPModule)


def wrapped(model: nn.Module, ranks: Ranks) -> nn.Module:
    """What training calls: the model, or what averages its gradients over ranks."""
    return model if ranks.size == 1 or is_sharded(model) else DistributedDataParallel(model)


@contextlib.contextmanager
def averaging(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Average gradients over ranks in this backward pass, or leave that to a later one of the same step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
    waits = isinstance(model, DistributedDataParallel) and not wanted
    with model.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
        yield


def whole_state(tree: Any) -> Any:
    """A state dict (of a model or an optimizer) with shards put together; every rank calls it."""
    if isinstance(tree, DTensor):
        return tree.full_tensor()
    if isinstance(tree, Mapping):
        return {key: whole_state(value) for key, value in tree.items()}
    return [whole_state(value) for value in tree] if isinstance(tree, list) else tree


def checksum(model: nn.Module) -> Tensor:
    """The sum of this rank's part of the weights, on their device: finite only where all of them are."""
    parts = [part.to_local() if isinstance(part, DTensor) else part for part in model.parameters()]
    return torch.stack([part.detach().float().sum() for part in parts]).sum()


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a whole state dict into a model, sharded or not."""
    own = model.state_dict()
    model.load_state_dict({name: _like(weight, own.get(name)) for name, weight in weights.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a whole state dict into an optimizer over parameters that are sharded or not."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    cut = {
        i: {name: _like(value, parameters[i]) for name, value in moments.items()}
        for i, moments in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": cut})


def _like(value: Any, parameter: Tensor | None) -> Any:
    """A tensor in shards as a parameter of its shape is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    on_device = value.to(parameter.device)
    # every rank has the whole tensor: each cuts its own part, and nothing is sent
    return distribute_tensor(on_device, parameter.device_mesh, parameter.placements, src_data_rank=None)


class Whole:
    """The model of a training as evaluation and scoring want it: whole, on every rank.

    Args:
        model: Before it is sharded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._without_weights = copy.deepcopy(model)
        for module in self._without_weights.modules():
            for name, parameter in module.named_parameters(recurse=False):
                module.register_parameter(name, nn.Parameter(parameter.to("meta"), parameter.requires_grad))

    def __call__(self, model: nn.Module) -> nn.Module:
        """A copy of a sharded model with all its weights, in eval mode; every rank calls it."""
        found = copy.deepcopy(self._without_weights)
        found.load_state_dict(whole_state(model.state_dict()), assign=True)
        return found.eval()
