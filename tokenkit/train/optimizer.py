"""Named parameters in groups under one optimizer, and the learning rate as a function of the step."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tokenkit.config import UserError
from tokenkit.train.optimizer_classes import make_optimizer
from tokenkit.train.optimizer_schema import OptimizerConfig, ParameterGroup
from tokenkit.train.parameter_kinds import DECAYED, ParameterKind, mesh_of, shape_kind

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
        case "cosine" | "linear_warmup_cosine_decay":
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


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    config: OptimizerConfig,
    kinds: Mapping[str, ParameterKind] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of a run file over named parameters; `kinds` is what `parameter_kinds` says of them.

    Without `kinds` a parameter is told by its shape. The learning rate of a group is `lr_scale` times the run's.
    """
    return make_optimizer(parameter_groups(parameters, config, kinds), config)


def parameter_groups(
    parameters: Mapping[str, nn.Parameter],
    config: OptimizerConfig,
    kinds: Mapping[str, ParameterKind] | None = None,
) -> list[dict[str, Any]]:
    """Parameters of equal weight decay, learning-rate scale and set of processes together, in the order they come.

    Norms, biases and vectors are never decayed; embeddings are, as matrices are. UserError for a pattern without one.
    """
    for group in config.param_groups:
        if not any(re.search(group.pattern, name) for name in parameters):
            raise UserError(
                f"train.optimizer.param_groups: {group.pattern!r} matches none of the trained parameters; write a part "
                f"of a name such as {next(iter(parameters), '')}"
            )
    groups: dict[Any, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        kind = shape_kind(parameter) if kinds is None else kinds[name]
        own = ParameterGroup(pattern="", lr_scale=config.projector_lr_scale if name.startswith("projectors.") else 1.0)
        named = next((group for group in config.param_groups if re.search(group.pattern, name)), own)
        decay = config.weight_decay * named.weight_decay_scale if kind in DECAYED else 0.0
        said: dict[str, Any] = {"weight_decay": decay, "lr_scale": named.lr_scale}
        if config.name == "muon":
            said["hidden"] = kind == "matrix" and parameter.ndim == 2
        key = (*said.values(), mesh_of(parameter))
        groups.setdefault(key, {"params": [], **said})["params"].append(parameter)
    return list(groups.values())


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets every group's learning rate: the value times the group's scale."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["lr_scale"]
