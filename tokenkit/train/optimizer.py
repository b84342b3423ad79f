"""AdamW over named parameters, and the learning rate as a function of the step."""

import math
import re
from collections.abc import Mapping

import torch
from torch import nn

from tokenkit.config import UserError
from tokenkit.train.schema import OptimizerConfig


def learning_rate_factor(step: int, *, steps: int, config: OptimizerConfig) -> float:
    """Share of the peak learning rate at a step counted from 0; linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    course = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return config.lr_min_ratio + (1 - config.lr_min_ratio) * course[config.schedule]


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with one group per (weight decay, learning-rate scale); vectors are never decayed."""
    for group in config.param_groups:
        if not any(re.search(group.pattern, name) for name in parameters):
            raise UserError(f"optimizer.param_groups: {group.pattern!r} matches none of the trained parameters")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        own = config.projector_lr_scale if name.startswith("projectors.") else 1.0
        scale = next((g.lr_scale for g in config.param_groups if re.search(g.pattern, name)), own)
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((decay, scale), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": ps, "weight_decay": decay, "lr_scale": scale} for (decay, scale), ps in groups.items()],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets every group's learning rate: the value times the group's scale."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["lr_scale"]
