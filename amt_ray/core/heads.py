"""Linear heads on standardised features: several, each with its own learning rate, trained at once as one product.

Each head is what MAE's linear probe trains: batch normalisation without learned scale, then a linear map, by LARS
(You et al. 2017, https://arxiv.org/abs/1708.03888) whose rate is adapted for weights and not for biases.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor, nn

from amt_ray.core.optim import cosine_schedule
from amt_ray.core.ports import Ranks
from amt_ray.core.probing import sum_gradients

EPS = 1e-6
MOMENTUM = 0.1
INIT_STD = 0.01
CHUNK = 16384  # rows widened to float64 at once


class Rate(NamedTuple):
    """What one head is trained with."""

    lr: float
    weight_decay: float


class Standardise(nn.Module):
    """Batch normalisation without learned scale, its statistics those of the global batch over all ranks.

    In train mode a batch is normalised by its own mean and variance, which running ones follow; in eval mode by the
    running ones. On one rank and without padding it is ``BatchNorm1d(affine=False, eps=1e-6)``.

    Args:
        width: Number of features.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def observe(
        self, features_BD: Tensor, ranks: Ranks, counted_B: Tensor | None = None, momentum: float = MOMENTUM
    ) -> Tensor:
        """Let the running statistics follow a batch.

        Args:
            features_BD: This rank's part of the batch.
            ranks: The processes that share the batch.
            counted_B: bool, false for padding; None where there is none.
            momentum: Weight of the new statistics; 1 forgets the old ones.

        Returns:
            Mean and (biased) variance of the global batch, [2, D].
        """
        chosen_BD = features_BD if counted_B is None else features_BD[counted_B]
        sums_3D = torch.zeros(3, features_BD.shape[1], dtype=torch.float64, device=features_BD.device)
        for part_BD in chosen_BD.split(CHUNK):
            wide_BD = part_BD.double()
            sums_3D += torch.stack([torch.ones_like(wide_BD), wide_BD, wide_BD.square()]).sum(dim=1)
        count, total, squares = ranks.sum(sums_3D)
        mean = total / count
        variance = (squares / count - mean.square()).clamp_min(0)
        self.mean.lerp_(mean.float(), momentum)
        self.variance.lerp_((variance * count / (count - 1).clamp_min(1)).float(), momentum)
        return torch.stack([mean, variance]).float()

    def forward(self, features_BD: Tensor, moments_2D: Tensor | None = None) -> Tensor:
        """Features with the given mean and variance taken out, or with the running ones."""
        mean, variance = (self.mean, self.variance) if moments_2D is None else moments_2D
        return (features_BD - mean) * (variance + EPS).rsqrt()


class Heads(nn.Module):
    """Independent linear heads on the same features.

    Args:
        width: Number of features.
        classes: Number of classes.
        count: Number of heads; all start alike.
        seed: Seed of the initial weights.
    """

    def __init__(self, width: int, classes: int, count: int, seed: int) -> None:
        super().__init__()
        weight = torch.empty(classes, width)
        nn.init.trunc_normal_(weight, std=INIT_STD, generator=torch.Generator().manual_seed(seed))
        self.weights = nn.ParameterList(weight.clone() for _ in range(count))
        self.biases = nn.ParameterList(torch.zeros(classes) for _ in range(count))

    def forward(self, features_BD: Tensor) -> Tensor:
        """Logits [heads, B, classes], by one matrix product."""
        logits = F.linear(features_BD, torch.cat(list(self.weights)), torch.cat(list(self.biases)))
        by_head: Tensor = logits.unflatten(1, (len(self.weights), -1)).transpose(0, 1)
        return by_head

    def optimizer(self, rates: Sequence[Rate]) -> Lars:
        """LARS with each head's own rate; biases are neither decayed nor adapted."""
        groups = []
        for weight, bias, (lr, weight_decay) in zip(self.weights, self.biases, rates, strict=True):
            groups.append({"params": [weight], "lr": lr, "weight_decay": weight_decay, "always_adapt": True})
            groups.append({"params": [bias], "lr": lr, "weight_decay": 0.0, "always_adapt": False})
        return Lars(groups, momentum=0.9)


class Probe(nn.Module):
    """Standardised features and heads on them.

    Args:
        width: Number of features.
        classes: Number of classes.
        count: Number of heads.
        seed: Seed of the initial weights.
    """

    def __init__(self, width: int, classes: int, count: int, seed: int) -> None:
        super().__init__()
        self.standardise = Standardise(width)
        self.heads = Heads(width, classes, count, seed)

    def forward(self, features_BD: Tensor) -> Tensor:
        """Logits [heads, B, classes], by the running statistics."""
        logits: Tensor = self.heads(self.standardise(features_BD))
        return logits


class HeadFit:
    """Steps of the heads' optimizer along a schedule with linear warm-up and half a cosine down to 0.

    Args:
        heads: What is trained.
        rates: One for each head.
        total_steps: Length of the schedule.
        warmup_steps: Of these, with rising rate.
        ranks: The processes that share every batch.
    """

    def __init__(self, heads: Heads, rates: Sequence[Rate], total_steps: int, warmup_steps: int, ranks: Ranks) -> None:
        self.heads, self.ranks = heads, ranks
        self.optimizer = heads.optimizer(rates)
        self.schedule = cosine_schedule(self.optimizer, total_steps, warmup_steps, 0.0)

    def step(self, number: int, features_BD: Tensor, labels_B: Tensor, weight_B: Tensor) -> None:
        """One step on this rank's part of a batch.

        Args:
            number: Steps before this one.
            features_BD: Standardised features.
            labels_B: int64 classes.
            weight_B: Weight of each image; over all ranks they sum to 1.
        """
        self.schedule.step_update(number)
        with torch.enable_grad():
            logits = self.heads(features_BD)
            targets = labels_B.expand(len(logits), -1)
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
            (losses * weight_B).sum().backward()
        sum_gradients(self.heads, self.ranks)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
