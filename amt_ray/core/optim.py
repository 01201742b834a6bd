"""Optimizer and learning rate, through timm's and torch's own parts."""

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn


def scaled_lr(base_lr: float, global_batch_size: int) -> float:
    """Linear scaling rule (Goyal et al. 2017, https://arxiv.org/abs/1706.02677): base_lr x global batch / 256."""
    return base_lr * global_batch_size / 256


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
