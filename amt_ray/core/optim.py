"""Optimizer and learning rate, through timm's and torch's own parts."""

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn


def scaled_lr(base_lr: float, images_a_step: int) -> float:
    """Linear scaling rule (Goyal et al. 2017, https://arxiv.org/abs/1706.02677): base_lr x images a step / 256.

    Args:
        base_lr: Learning rate for 256 images a step.
        images_a_step: Those that a step has (`amt_ray.core.sampling.images_a_step`), not those asked for.
    """
    return base_lr * images_a_step / 256


def adamw(model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW without weight decay on biases and norms, fused."""
    groups = param_groups_weight_decay(model, weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def cosine_schedule(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int, min_lr: float
) -> CosineLRScheduler:
    """Linear warm-up from 0, then half a cosine down to ``min_lr``: a pure function of the step (`step_update`)."""
    return CosineLRScheduler(
        optimizer,
        t_initial=max(total_steps - warmup_steps, 2),
        lr_min=min_lr,
        warmup_t=warmup_steps,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def peak_share(total_steps: int, warmup_steps: int) -> float:
    """The highest learning rate that `cosine_schedule` reaches within its steps, as a share of the one asked for."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    cosine_schedule(optimizer, total_steps, warmup_steps, 0.0).step_update(min(warmup_steps, total_steps - 1))
    return float(optimizer.param_groups[0]["lr"])
