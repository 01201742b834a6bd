"""Noise that belongs to the image, not to the worker.

Every draw is a function of (seed, epoch, image index, purpose, position): a hash of a counter, in batch, the same on
any device and for any number of workers. So nothing has to be stored to draw a crop or a plan again.

The mixing step is the 32-bit finaliser with the constants found by the search at https://github.com/skeeto/hash-prospector
("lowbias32"); it is a bijection of 32 bits with low avalanche bias.
"""

from enum import IntEnum
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", int, Tensor)

_32_BITS = 0xFFFFFFFF
CHUNK = 1 << 18  # indices hashed at a time where there are millions: a third of the time, as all stays in the cache
_GOLDEN = 0x9E3779B9


class Purpose(IntEnum):
    """What a draw is for. The numbers are part of the result: never reuse or renumber one."""

    ORDER = 1
    CROP = 2
    PLAN = 3
    HOLD_OUT = 4
    PREVIEW = 5
    BLOCKS = 6


def _mix(x: T) -> T:
    """Hash 32 bits held in an int or int64; tensor products wrap modulo 2**64, which leaves the low 32 bits exact."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _32_BITS
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _32_BITS
    return x ^ (x >> 16)


def bits(seed: int, epoch: int, index_B: Tensor, purpose: Purpose, count: int) -> Tensor:
    """Random 32-bit integers.

    Args:
        seed: Seed of the run.
        epoch: Epochs completed before this draw.
        index_B: Image indices, int64, on the device on which the result is wanted.
        purpose: Separates draws of the same image in the same epoch.
        count: Draws an image.

    Returns:
        [B, count] int64 in [0, 2**32).
    """
    key = 0
    for word in (seed & _32_BITS, (seed >> 32) & _32_BITS, int(purpose), epoch):
        key = _mix((key + _GOLDEN + word) & _32_BITS)
    key_B = _mix(key ^ (index_B & _32_BITS))
    key_B = _mix((key_B + _GOLDEN + (index_B >> 32)) & _32_BITS)
    position = (torch.arange(1, count + 1, device=index_B.device) * _GOLDEN) & _32_BITS
    return _mix(_mix(key_B.unsqueeze(1) ^ position) ^ key_B.unsqueeze(1))


def uniform(seed: int, epoch: int, index_B: Tensor, purpose: Purpose, count: int) -> Tensor:
    """Uniform noise [B, count], float32, strictly inside (0, 1); arguments as in `bits`.

    23 bits, centred: the largest value, 1 - 2**-24, is a float32 of its own, so log(-log(u)) is always finite.
    """
    return ((bits(seed, epoch, index_B, purpose, count) >> 9).float() + 0.5) * 2.0**-23


def permutation(seed: int, epoch: int, index_n: Tensor) -> Tensor:
    """The given image indices in this epoch's random order, [n] int64: sorted by a 63-bit hash of each."""
    keys = []
    for some in index_n.split(CHUNK):
        high, low = bits(seed, epoch, some, Purpose.ORDER, 2).unbind(1)
        keys.append(((high >> 1) << 32) | low)
    return index_n[torch.argsort(torch.cat(keys), stable=True)]
