"""AdamW over named parameters, and the learning rate as a function of the step."""

import math
import re
from collections.abc import Mapping

import torch
from torch import nn

from tokenkit.config import UserError
from tokenkit.train.schema import OptimizerConfig

ONE_CYCLE_START, ONE_CYCLE_RISE = 1 / 25, 0.3  # share of the peak it begins at, and of the steps it rises in


def learning_rate_factor(step: int, *, steps: int, config: OptimizerConfig) -> float:
    """Share of the peak learning rate at a step counted from 0; linear warm-up, then the schedule."""
    warmup = config.warmup(steps)
    if config.schedule == "one_cycle":
        return _one_cycle(step, steps, warmup or ONE_CYCLE_RISE * steps, config.lr_min_ratio)
    if step < warmup:
        return (step + 1) / warmup
    left = 1 - min(1.0, (step - warmup) / max(1, steps - warmup))
    return config.lr_min_ratio + (1 - config.lr_min_ratio) * _course(step, steps, warmup, left, config)


def _course(step: int, steps: int, warmup: int, left: float, config: OptimizerConfig) -> float:
    """Where a schedule stands between its end, 0, and its peak, 1; `left` is the share of the steps after warm-up."""
    match config.schedule:
        case "linear":
            return left
        case "cosine":
            return (1 + math.cos(math.pi * (1 - left))) / 2
        case "polynomial":
            return left**config.power
        case "wsd":  # warm-up, stable, decay. Hu+ 2024, 2404.06395
            return min(1.0, max(0.0, (steps - step) / max(1.0, config.decay_share * steps)))
        case "inverse_sqrt":
            return math.sqrt(max(1, warmup) / max(1, warmup, step))
        case _:
            return 1.0


def _one_cycle(step: int, steps: int, rise: float | int, end: float) -> float:
    """From 1/25 of the peak up to it and down to `end`, on half waves of a cosine. Smith and Topin 2017, 1708.07120."""
    top, last = rise - 1, steps - 1
    if step <= top:
        low, high, share = ONE_CYCLE_START, 1.0, step / top if top > 0 else 1.0
    else:
        low, high, share = 1.0, end, min(1.0, (step - top) / max(last - top, 1e-9))
    return low + (high - low) * (1 - math.cos(math.pi * share)) / 2


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
