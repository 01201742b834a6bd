"""Which images each rank takes in each step: every image once an epoch, none twice, none left out."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from amt_ray.core.noise import CHUNK, Purpose, bits


class MicroBatch(NamedTuple):
    """One forward and backward pass of one rank.

    Attributes:
        index_B: int64 image indices; always the same number of them.
        weight_B: float32, the weight of each image in the step's mean loss times the number of ranks (so that DDP's
            average over ranks gives the mean over the global batch); 0 for padding, which counts nowhere.
    """

    index_B: Tensor
    weight_B: Tensor


def images_a_step(num_images: int, global_batch_size: int) -> int:
    """Most images that a step has, by which the learning rate is scaled: the global batch, or all images where those
    are fewer.

    There is no last short batch: `epoch_steps` spreads the images evenly over the fewest steps that the batch allows.
    """
    return min(global_batch_size, num_images)


def steps_per_epoch(num_images: int, global_batch_size: int) -> int:
    """ceil(images / global batch); 1 where the batch is larger than the data set."""
    return math.ceil(num_images / global_batch_size)


def step_images(order_n: Tensor, global_batch_size: int, step: int) -> Tensor:
    """The images of a step, over all ranks; the steps of an epoch are as equal as can be."""
    n = len(order_n)
    steps = steps_per_epoch(n, global_batch_size)
    return order_n[step * n // steps : (step + 1) * n // steps]


def epoch_steps(
    order_n: Tensor, global_batch_size: int, rank: int = 0, size: int = 1, accumulate: int = 1
) -> Iterator[list[MicroBatch]]:
    """Split an epoch's order of images into steps, and each step over ranks and micro-batches.

    The steps are as equal as can be (they differ by one image), so no small last batch gets a full-sized update. All
    micro-batches of all ranks have one shape; what a step lacks is filled by images of weight 0.

    Args:
        order_n: The epoch's order of image indices, the same on every rank.
        global_batch_size: Most images a step, over all ranks.
        rank: This rank.
        size: Number of ranks.
        accumulate: Micro-batches a step.

    Yields:
        The rank's micro-batches of a step.
    """
    n = len(order_n)
    steps = steps_per_epoch(n, global_batch_size)
    width = math.ceil(math.ceil(n / steps) / (size * accumulate))
    for step in range(steps):
        chosen = step_images(order_n, global_batch_size, step)
        slots = torch.arange(size * accumulate * width).reshape(size, accumulate, width)[rank]
        weights = (slots < len(chosen)).float() * (size / len(chosen))
        yield [
            MicroBatch(chosen[slot.clamp_max(len(chosen) - 1)], weight)
            for slot, weight in zip(slots, weights, strict=True)
        ]


def hold_out(num_images: int, fraction: float, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Indices of the images to train on and of those held out for choosing between runs, each increasing.

    The choice depends on the index alone, so all runs on a data set hold out the same int(n fraction) images; of the
    others at most ``most`` are trained on, fewer being a part of more.
    """
    everything = torch.arange(num_images)
    hashes = [bits(0, 0, some, Purpose.HOLD_OUT, 1).squeeze(1) for some in everything.split(CHUNK)]
    by_hash = torch.cat(hashes).argsort(stable=True)
    held = int(num_images * fraction)
    kept = by_hash[held:] if most is None else by_hash[held : held + most]
    return _increasing(kept, num_images), _increasing(by_hash[:held], num_images)


def _increasing(chosen: Tensor, num_images: int) -> Tensor:
    """Distinct indices in order; at millions of them faster than a sort."""
    is_chosen = torch.zeros(num_images, dtype=torch.bool)
    is_chosen[chosen] = True
    return is_chosen.nonzero().squeeze(1)


def equal_share(index_n: Tensor, rank: int, size: int) -> Tensor:
    """ceil(n / size) consecutive indices a rank, the last one repeated where they run out.

    The ranks' shares in a row, cut to n, are the indices: so equal shapes can be gathered for any count.
    """
    share = math.ceil(len(index_n) / size)
    return index_n[torch.arange(rank * share, (rank + 1) * share).clamp_max(len(index_n) - 1)]


def rank_share(index_n: Tensor, rank: int, size: int) -> Tensor:
    """Every ``size``-th index from ``rank`` on: the ranks' shares partition the indices for any count."""
    return index_n[rank::size]
