"""Sums over the processes of a run that read different rows of the same step; with one process nothing happens."""

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn


def several() -> bool:
    """Whether the step is shared with other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, the same in each."""
    if several():
        values = values.clone()
        dist.all_reduce(values)
    return values


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Every process gets the gradients of the whole step; one that had nothing to say to a parameter counts as 0."""
    if several():
        for parameter in parameters:
            parameter.grad = total(
                parameter.grad if parameter.grad is not None else parameter.new_zeros(parameter.shape)
            )
