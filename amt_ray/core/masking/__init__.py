"""Masking strategies, one a file.

A strategy is a small frozen object that is its own configuration. Called with scores_BN it draws a `PatchPlan`; all
randomness comes in as an argument. N are the masking units of an image: its patches, or squares of them. The contract
(`tests/core/test_masking_contract.py` checks every file here):

- ``Strategy(mask_ratio, throw_ratio, ...)``: further fields are options with defaults. A field ``grid`` is filled with
  the rows and columns of the units. A strategy that throws nothing has ``throws = False`` and refuses a throwing ratio.
- ``needs_scores``: whether the scores matter; a strategy without that need is never given a refresh.
- ``counts(num_patches)``: the exact `Counts`, constant over images, raising ValueError where they are impossible.
- ``__call__(scores_BN, generator=None, noise_BN=None)``: scores are finite and >= 0 in any scale (else a ValueError on
  the CPU; on an accelerator the look would stop the training step, and the score store has looked already); noise_BN is
  uniform in (0, 1) and decides everything, so equal noise gives equal plans; without it, noise is drawn from
  ``generator``.
"""

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from amt_ray.core.plan import Counts, PatchPlan


class MaskingStrategy(Protocol):
    """What the loop asks of a strategy."""

    needs_scores: ClassVar[bool]
    throws: ClassVar[bool]

    def counts(self, num_patches: int) -> Counts: ...

    def __call__(
        self, scores_BN: Tensor, generator: torch.Generator | None = None, noise_BN: Tensor | None = None
    ) -> PatchPlan: ...


def drawn_noise(scores_BN: Tensor, generator: torch.Generator | None, noise_BN: Tensor | None) -> Tensor:
    """noise_BN if given, else uniform noise in (0, 1) of the scores' shape and device, drawn from ``generator``.

    Raises:
        ValueError: If noise_BN has another shape than the scores.
    """
    if noise_BN is None:
        drawn = torch.rand(scores_BN.shape, generator=generator, device=scores_BN.device)
        return drawn.clamp(2.0**-24, 1 - 2.0**-24)
    if noise_BN.shape != scores_BN.shape:
        raise ValueError(f"noise must have the scores' shape {tuple(scores_BN.shape)}, got {tuple(noise_BN.shape)}.")
    return noise_BN


def checked(scores_BN: Tensor) -> Tensor:
    """The scores as float32.

    Raises:
        ValueError: If they are on the CPU and one is negative or not finite.
    """
    scores_BN = scores_BN.float()
    if scores_BN.device.type == "cpu" and not bool(((scores_BN >= 0) & scores_BN.isfinite()).all()):
        broken = scores_BN[~((scores_BN >= 0) & scores_BN.isfinite())]
        raise ValueError(f"scores must be finite and at least 0, got {float(broken[0])} in {len(broken)} places.")
    return scores_BN


def never_throws(strategy: str, throw_ratio: float) -> None:
    """Refuse a throwing ratio.

    Raises:
        ValueError: If it is not 0.
    """
    if throw_ratio:
        raise ValueError(f"throw_ratio must be 0 for {strategy}, which throws nothing, got {throw_ratio:.4g}.")


def ranked(scores_BN: Tensor, noise_BN: Tensor) -> Tensor:
    """order_BN of the patches from the highest score down; equal scores in random order."""
    shuffled = noise_BN.argsort(dim=1)
    return shuffled.gather(1, scores_BN.gather(1, shuffled).argsort(dim=1, descending=True, stable=True))
