"""Masking strategies, one a file.

A strategy is a small frozen object that is its own configuration. Called with scores_BN it draws a `PatchPlan`; all
randomness comes in as an argument. Its contract (`tests/core/test_masking_contract.py` checks every file here):

- ``needs_scores``: whether the scores matter; a strategy without that need is never given a refresh.
- ``counts(num_patches)``: the exact `Counts`, constant over images, raising ValueError where they are impossible.
- ``__call__(scores_BN, generator=None, noise_BN=None)``: scores are finite and >= 0 in any scale; noise_BN is uniform
  in (0, 1) and decides everything, so equal noise gives equal plans; without it, noise is drawn from ``generator``.
"""

from typing import Protocol

import torch
from torch import Tensor

from amt_ray.core.plan import Counts, PatchPlan


class MaskingStrategy(Protocol):
    """What the loop asks of a strategy."""

    needs_scores: bool

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
