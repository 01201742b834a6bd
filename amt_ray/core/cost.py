"""What a training costs, without running it: visible tokens and FLOPs, from the method on the meta device.

A FLOP is one multiplication or one addition of a matrix product; norms, activations and the optimizer's update are not
counted, as is usual. All is for one image, so it holds for any batch, any number of workers and any machine.
"""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from amt_ray.core.attention import Layers, cls_attention
from amt_ray.core.masking import MaskingStrategy
from amt_ray.core.methods import Method
from amt_ray.core.plan import Counts, PatchPlan
from amt_ray.core.schedule import Schedule


@dataclass(frozen=True)
class Cost:
    """What is spent; costs add up, and go by the number of images.

    Attributes:
        visible_tokens: Visible patches that the encoder has seen while it learned.
        flops: Floating point operations of forward and backward passes, and of the passes that make scores.
    """

    visible_tokens: float = 0
    flops: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.visible_tokens + other.visible_tokens, self.flops + other.flops)

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.visible_tokens * times, self.flops * times)


@functools.lru_cache(maxsize=4096)
def step_cost(method: Method, counts: Counts) -> Cost:
    """Forward and backward pass of one image.

    Args:
        method: Any method, made on the meta device: it is run there, which takes no memory.
        counts: How many of its patches are visible, masked and thrown.
    """
    return Cost(counts.visible, _steps(method).flops(counts))


@functools.lru_cache(maxsize=256)
def score_cost(method: Method, layers: Layers = -1) -> Cost:
    """One image's scores, from the attention of these layers; no tokens are counted, as nothing is learned.

    Args:
        method: Any method, made on the meta device.
        layers: One index, a tuple of them, or ``rollout``.
    """
    with FlopCounterMode(display=False) as counter:
        cls_attention(method, _image(method), layers)
    return Cost(0, counter.get_total_flops())


@dataclass(frozen=True)
class Course:
    """How a training runs, as far as its cost goes: the same parts as `amt_ray.core.loop.Pretraining`'s.

    Args:
        method: On the meta device.
        schedule: When what happens.
        warmup_strategy: Masking strategy before the switch.
        strategy_at: The one after it, given how far the epoch is on the way from the switch (0) to the end (1).
        unit: Side of a masking unit in patches.
        layers: Layers that are scored.
    """

    method: Method
    schedule: Schedule
    warmup_strategy: MaskingStrategy
    strategy_at: Callable[[float], MaskingStrategy]
    unit: int = 1
    layers: Layers = -1

    def strategy(self, epoch: int) -> MaskingStrategy:
        """The masking strategy of an epoch."""
        if self.schedule.in_warmup(epoch):
            return self.warmup_strategy
        return self.strategy_at(self.schedule.progress(epoch))

    def counts(self, epoch: int) -> Counts:
        """Patches of an image that are visible, masked and thrown in an epoch."""
        area = self.unit**2
        return Counts(*(area * count for count in self.strategy(epoch).counts(self.method.num_patches // area)))

    def is_scored(self, epoch: int) -> bool:
        """Whether all images are scored before an epoch."""
        return self.strategy(epoch).needs_scores and self.schedule.refresh_due(epoch)

    @property
    def plans(self) -> Counter[Counts]:
        """The epochs of each distinct plan, by its counts."""
        return Counter(self.counts(epoch) for epoch in range(self.schedule.epochs))

    @property
    def refreshes(self) -> int:
        """How often all images are scored."""
        return sum(self.is_scored(epoch) for epoch in range(self.schedule.epochs))

    def epoch_cost(self, epoch: int) -> Cost:
        """What an epoch costs an image, with the scoring before it where that is due."""
        scoring = score_cost(self.method, self.layers) if self.is_scored(epoch) else Cost()
        return step_cost(self.method, self.counts(epoch)) + scoring

    def cost(self, stop: int | None = None, start: int = 0) -> Cost:
        """What the epochs from ``start`` up to ``stop`` (default: all) cost an image."""
        total = Cost()
        for epoch in range(start, self.schedule.epochs if stop is None else stop):
            total = total + self.epoch_cost(epoch)
        return total


def score_store_bytes(method: Method, num_images: int) -> int:
    """Memory of the score maps on a node, and their part of each checkpoint: float16, one value a patch."""
    return 2 * num_images * int(method.num_patches)


def checkpoint_bytes(method: Method, num_images: int) -> int:
    """Size of a checkpoint: weights, AdamW's two moments of each weight that learns, and the score maps."""
    weights: int = sum(t.numel() * t.element_size() for t in method.state_dict().values())
    moments: int = sum(2 * p.numel() * p.element_size() for p in method.parameters() if p.requires_grad)
    return weights + moments + score_store_bytes(method, num_images)


@dataclass
class _Steps:
    """FLOPs of a method's training step for any counts, with few of them counted.

    Linear maps cost so much a token and attention so much a pair of tokens, so FLOPs are a quadratic form of (1, V, M).
    Counts whose monomials are a combination of those already counted therefore need no run: their FLOPs are the same
    combination. The first such prediction is checked by a run; a method that fails it is run for all further counts.
    """

    method: Method
    known: dict[Counts, int] = field(default_factory=dict)
    is_quadratic: bool | None = None

    def flops(self, counts: Counts) -> int:
        if counts not in self.known:
            predicted = None if self.is_quadratic is False else self._predicted(counts)
            if predicted is None or self.is_quadratic is None:
                self.known[counts] = self._counted(counts)
                if predicted is not None:
                    self.is_quadratic = predicted == self.known[counts]
            else:
                return predicted
        return self.known[counts]

    def _predicted(self, counts: Counts) -> int | None:
        if not self.known:
            return None
        wanted, rows = self._monomials(counts), np.stack([self._monomials(c) for c in self.known])
        weights = np.linalg.lstsq(rows.T, wanted, rcond=None)[0]
        if np.abs(rows.T @ weights - wanted).max() > 1e-9:
            return None
        return round(float(weights @ np.array(list(self.known.values()), dtype=np.float64)))

    def _monomials(self, counts: Counts) -> np.ndarray:
        visible, masked = counts.visible / self.method.num_patches, counts.masked / self.method.num_patches
        return np.array([1, visible, masked, visible**2, visible * masked, masked**2])

    def _counted(self, counts: Counts) -> int:
        sets = [torch.empty(1, count, dtype=torch.int64, device="meta") for count in counts]
        with FlopCounterMode(display=False) as counter:
            self.method(_image(self.method), PatchPlan(*sets)).loss.backward()
        self.method.zero_grad()
        return int(counter.get_total_flops())


@functools.lru_cache(maxsize=64)
def _steps(method: Method) -> _Steps:
    return _Steps(method)


def _image(method: Method) -> torch.Tensor:
    assert method.cls_token.is_meta, "the method must be on the meta device"
    return torch.empty(1, method.sizes["in_chans"], *method.sizes["img_size"], device="meta")
