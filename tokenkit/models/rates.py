"""How fast this machine multiplies, moves bytes, starts operations and scores heads: measured in about a second."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenkit.models.memory import Spent
from tokenkit.scores import token_scores

SIZES = {"cpu": (512, 1 << 24, 512), "cuda": (8192, 1 << 28, 8192)}  # matrix, numbers copied, rows of a head
STARTS, TRIES = 200, 3


@dataclass(frozen=True)
class Rates:
    """Measured speeds of a device."""

    flops: dict[int, float]
    """By the bytes of a number: floating-point operations per second of a large product of matrices."""
    bytes_per_second: float
    starts_per_second: float
    """Operations of next to no size."""
    scored_per_second: float
    """Entries of logits that are made of next to no products, turned into scores and forgotten."""

    def seconds(self, spent: Spent) -> float:
        """What operations take, one after the other: each as long as what bounds it."""
        start = 1 / self.starts_per_second
        total = spent.scored / self.scored_per_second
        for flops, moved, size in spent.operations:
            rate = self.flops.get(size, self.flops[4])
            total += max(flops / rate, moved / self.bytes_per_second, start)
        return total


def measure_rates(device: str, half: torch.dtype | None) -> Rates:
    """The speeds of this device now, with as many threads as torch uses; `half` is the type of 16 bits to measure."""
    kind = torch.device(device).type
    size, numbers, rows = SIZES[kind]
    flops = {4: _products(device, size, torch.float32)}
    if half is not None:
        flops[2] = _products(device, size, half)
    source = torch.ones(numbers, device=device)
    target = torch.empty_like(source)
    copied = _seconds(lambda: target.copy_(source), device)
    one = torch.zeros(16, device=device)
    started = _seconds(lambda: _start(one), device)
    hidden = torch.randn(rows, 16, device=device, requires_grad=True)
    head, labels = torch.randn(8192, 16, device=device), torch.zeros(rows, dtype=torch.long, device=device)
    scored = _seconds(lambda: token_scores(hidden, head, labels)[0].sum().backward(), device)
    return Rates(flops, 8 * numbers / copied, STARTS / started, 2 * rows * len(head) / scored)


def _products(device: str, size: int, dtype: torch.dtype) -> float:
    """As a linear layer makes them, forwards and backwards: of 16 bits a CPU makes them at very different speeds."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 6 * size**3 / _seconds(lambda: (a @ a.T, a @ a, a.T @ a), device)


def _start(tensor: Tensor) -> None:
    for _ in range(STARTS):
        tensor.add_(1)


def _seconds(action: Callable[[], object], device: str) -> float:
    """The least of a few tries, after one that is not counted."""
    action()
    taken = []
    for _ in range(TRIES):
        _wait(device)
        began = time.perf_counter()
        action()
        _wait(device)
        taken.append(time.perf_counter() - began)
    return min(taken)


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
