"""What protocols that train a copy of the encoder share: the copy, its layer-wise learning rates, the epochs."""

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.layers import DropPath
from timm.optim import param_groups_layer_decay
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from amt_ray.core.checkpoint import random_states, restore_random_states
from amt_ray.core.encoder import Encoder
from amt_ray.core.finite import NotFiniteError, not_finite
from amt_ray.core.noise import Purpose, bits, permutation
from amt_ray.core.ports import Checkpoints, Ranks
from amt_ray.core.probing import Progress, resume, save, sum_gradients
from amt_ray.core.sampling import MicroBatch, epoch_steps, steps_per_epoch

BETAS = (0.9, 0.999)
FITTED = 0.95  # what of the progress is done by the end of training
UNDECAYED = ("cls_token", "pos_embed", "relative_position_bias_table")


@contextlib.contextmanager
def own_random_numbers() -> Iterator[None]:
    """Whatever is drawn inside, the generators outside go on as if nothing had been."""
    states = random_states()
    try:
        yield
    finally:
        restore_random_states(states)


def seed_epoch(seed: int, epoch: int, rank: int) -> torch.Generator:
    """Give all generators the state of this epoch, so that a resumed run goes on as one that did not stop.

    Returns:
        A generator of its own, on the CPU.
    """
    words = bits(seed, epoch, torch.tensor([rank]), Purpose.ORDER, 4)[0].tolist()
    torch.manual_seed(words[0])
    np.random.seed(words[1])
    random.seed(words[2])
    return torch.Generator().manual_seed(words[3])


def tuned_copy(encoder: Encoder, drop_path: float) -> Encoder:
    """A copy of an encoder to train as a whole, fixed positions too.

    Args:
        encoder: Is not changed.
        drop_path: Rate of stochastic depth in the last block, rising linearly from 0 in the first.
    """
    tuned = copy.deepcopy(encoder)
    tuned.requires_grad_(True)
    for depth, block in enumerate(tuned.blocks):
        rate = drop_path * depth / max(encoder.depth - 1, 1)
        block.drop_path1 = DropPath(rate) if rate else nn.Identity()
        block.drop_path2 = DropPath(rate) if rate else nn.Identity()
    return tuned


class Tuned(nn.Module):
    """A model with an ``encoder`` somewhere inside, and layer-wise learning rates."""

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's description of the layers: the stem, each block, and all the rest on top."""
        inside = r"^(?:.*\.)?encoder\."
        return {"stem": inside + r"(?:cls_token|pos_embed|patch_embed)", "blocks": inside + r"blocks\.(\d+)"}

    def parameter_groups(self, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
        """Groups for the optimizer: learning rates fall by ``layer_decay`` a layer from the top down.

        The weights of biases, norms, [CLS] and positions are not decayed.
        """
        undecayed = [name for name, _ in self.named_parameters() if name.endswith(UNDECAYED)]
        groups: list[dict[str, Any]] = param_groups_layer_decay(
            self, weight_decay, no_weight_decay_list=undecayed, layer_decay=layer_decay
        )
        return groups


def freeze_unused(module: nn.Module, output: Tensor) -> None:
    """Take out of training the parameters that ``output`` does not depend on: a decoder, say, beside an encoder."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    reached = torch.autograd.grad(output.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, reached, strict=True):
        parameter.requires_grad_(gradient is not None)


def start_alike(module: nn.Module, ranks: Ranks) -> None:
    """Give all ranks the first one's weights to train."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad and ranks.size > 1:
                parameter.copy_(ranks.sum(parameter.detach() * float(ranks.rank == 0)))


@dataclass(frozen=True)
class Fit:
    """Epochs of steps shared by all ranks.

    Attributes:
        model: What is trained.
        optimizer: Of the model's parameters.
        schedule: timm's, a pure function of the step.
        loss_of: Loss of a micro-batch in an epoch, such that it adds up over micro-batches and ranks to the step's.
        index_n: Images to learn from.
        batch_size: Images a step, over all ranks.
        epochs: Passes over the images.
        accumulate: Micro-batches a step.
        clip_grad: Largest norm of the gradient, or None.
        seed: Of the order of images and of what the model draws.
        what: What is trained, for messages.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    loss_of: Callable[[MicroBatch, int], Tensor]
    index_n: Tensor
    batch_size: int
    epochs: int
    accumulate: int
    clip_grad: float | None
    seed: int
    what: str

    def run(self, ranks: Ranks, protocol: str, progress: Progress, checkpoints: Checkpoints | None) -> None:
        """All epochs that the newest checkpoint leaves to do.

        Raises:
            NotFiniteError: If the mean loss of an epoch, or a weight at its end, is not finite.
        """
        start_alike(self.model, ranks)
        for epoch in range(resume(checkpoints, protocol, self.model, self.optimizer), self.epochs):
            self.train_epoch(epoch, ranks, progress)
            save(checkpoints, protocol, epoch + 1, self.model, self.optimizer)

    def train_epoch(self, epoch: int, ranks: Ranks, progress: Progress) -> None:
        """One pass over the images."""
        seed_epoch(self.seed, epoch, ranks.rank)
        steps = steps_per_epoch(len(self.index_n), self.batch_size)
        order_n = permutation(self.seed, epoch, self.index_n)
        total = torch.zeros(1, dtype=torch.float64, device=ranks.device)
        self.model.train()
        for step, parts in enumerate(epoch_steps(order_n, self.batch_size, ranks.rank, ranks.size, self.accumulate)):
            self.schedule.step_update(epoch * steps + step)
            for part in parts:
                loss = self.loss_of(part, epoch)
                loss.backward()
                total += loss.detach()
            sum_gradients(self.model, ranks)
            if self.clip_grad is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            progress(FITTED * (epoch * steps + step + 1) / (self.epochs * steps))
        mean = float(ranks.sum(total)) / steps
        if not np.isfinite(mean):
            raise NotFiniteError(f"the loss must stay finite, got {mean} in epoch {epoch + 1} of {self.what}.")
        if broken := not_finite(self.model.state_dict()):  # by the last step, whose loss was of those before
            raise NotFiniteError(f"weights must stay finite, got others in {broken[0]} after epoch {epoch + 1}.")


def warmup_steps_of(asked: int, total_steps: int) -> int:
    """Steps of warm-up: what is asked for, at most a tenth of all."""
    return min(asked, total_steps // 10)
