"""Passes over the microbatches of a step, as balances make them, and the balance that does nothing.

Everything is decided by the whole step, never by a microbatch, so that cutting a step in another way changes nothing.
Where a factor depends on the step itself and there are several microbatches, the student reads them twice.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenkit.train.parallel import total

Forward = Callable[[], dict[str, Tensor]]  # a microbatch's share of each loss's mean over the step; no units, no entry
ZERO = 1e-8  # a norm or a loss below this is rounding noise: it gets weight 0, not 1/noise


@dataclass(frozen=True)
class Shared:
    """Mean of each loss that had units, and what its gradient was multiplied with."""

    means: dict[str, float]
    weights: dict[str, float]


class Balance:
    """The plain sum of weighted losses. `state` is what has to survive a stop: numbers by loss."""

    def __init__(self) -> None:
        self.state: dict[str, dict[str, float]] = {}

    def backward(self, forwards: Sequence[Forward], weights: Mapping[str, float]) -> Shared:
        """Adds the gradients of a step to the parameters; `weights` are the run file's, at this step."""
        return Shared(sum_backward(forwards, weights), dict(weights))


def sum_backward(
    forwards: Sequence[Forward], factors: Mapping[str, float], look: Callable[[dict[str, Tensor]], None] | None = None
) -> dict[str, float]:
    """Backward passes of the factored sum, microbatch by microbatch; the mean of each loss over the step."""
    sums: dict[str, Tensor] = {}
    for forward in forwards:
        shares = forward()
        if look is not None:
            look(shares)
        weighted = [factors[name] * share for name, share in shares.items() if factors[name]]
        if weighted:
            torch.stack(weighted).sum().backward()
        add_values(sums, shares)
    return plain(sums)


def look_first(forwards: Sequence[Forward], look: Callable[[dict[str, Tensor]], None]) -> Sequence[Forward]:
    """Looks at all microbatches, and returns them for the pass that follows: a single one is not computed again."""
    if len(forwards) == 1:
        shares = forwards[0]()
        look(shares)
        return [lambda: shares]
    for forward in forwards:
        look(forward())
    return forwards


def values_first(forwards: Sequence[Forward]) -> tuple[Sequence[Forward], dict[str, float]]:
    """The mean of each loss over the step, and the microbatches for the pass that follows."""
    sums: dict[str, Tensor] = {}
    with torch.set_grad_enabled(len(forwards) == 1):
        forwards = look_first(forwards, lambda shares: add_values(sums, shares))
    return forwards, plain(sums)


def add_values(sums: dict[str, Tensor], shares: Mapping[str, Tensor]) -> None:
    """Adds a microbatch's shares, where they are: reading numbers off a GPU would stop it after every microbatch."""
    for name, share in shares.items():
        value = share.detach().double()
        sums[name] = sums[name] + value if name in sums else value


def plain(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The sums as numbers, over all processes that read rows of the step."""
    return dict(zip(sums, total(torch.stack([*sums.values()])).tolist())) if sums else {}


def counted(shares: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The losses that a schedule has not switched off."""
    return {name: share for name, share in shares.items() if weights[name]}


def inverse(size: float) -> float:
    """1 / size; 0 for what is no more than rounding noise; NaN, which stops the run, for what is not finite."""
    if not math.isfinite(size):
        return math.nan
    return 1 / size if size > ZERO else 0.0
