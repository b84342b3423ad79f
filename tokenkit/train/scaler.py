"""The type of the forward pass, and what keeps a step whose numbers are not finite away from the weights.

Half of float16's range is below what a gradient of a mean over many tokens is made of. Losses are therefore multiplied
before the backward pass, and gradients divided after it (Micikevicius+ 2018, 1710.03740). The factor is halved by a
step that overflows, which is left out, and doubled after many that did not.

All of it stays on the device: the host is told when it looks, not at every step.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tokenkit.train.optimizer_classes import honours_found_inf
from tokenkit.train.parallel import total

Precision = Literal["float32", "bfloat16", "float16"]
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
FIRST_SCALE, GROWTH, SHRINKAGE, GROWN_AFTER = 2.0**16, 2.0, 0.5, 2000
MOST_SKIPPED = 50  # steps in a row that float16 may overflow in, before it is no longer a matter of scale
KEPT = ("scale", "good", "in_a_row", "skipped")


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager:
    """A forward pass whose products are of this type; weights and what autocast holds to be delicate stay float32.

    A weight that was converted is not remembered: each is read once a pass, and with activation checkpointing, or a
    model spread over processes, a second model in 16 bits would lie whole in every process until the pass ends.
    """
    return torch.autocast(device.type, HALVES.get(precision), enabled=precision in HALVES, cache_enabled=False)


@dataclass(frozen=True)
class Bad:
    """The first step, counted from 0, whose numbers were not finite, or the first of too many."""

    step: int
    loss: float
    norm: float
    in_a_row: int
    """Steps up to now without an update."""


class Guard:
    """Lets the optimizer move only on finite numbers and, where it scales, finds the factor that gradients stand.

    Without scaling a step that is not finite leaves every weight as it was, and the next `look` tells of it. With
    scaling such steps are part of the search, and only `MOST_SKIPPED` of them in a row are told.
    """

    def __init__(self, device: torch.device, *, scaling: bool, grown_after: int = GROWN_AFTER):
        self.scaling, self.grown_after = scaling, grown_after
        self.scale = torch.tensor(FIRST_SCALE if scaling else 1.0, device=device)
        self.good = torch.tensor(0, device=device)
        self.in_a_row, self.skipped = torch.tensor(0, device=device), torch.tensor(0, device=device)
        self._bad = torch.full((3,), -1.0, dtype=torch.float64, device=device)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss itself, whose gradient is multiplied with the factor; what reads its value sees no factor."""
        return _Scaled.apply(loss, self.scale) if self.scaling else loss

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divides the gradients by the factor again, in place; before anything measures or clips them."""
        if self.scaling:
            inverse = self.scale.double().reciprocal().float()
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(inverse)

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, step: int, loss: Tensor | float, norm: Tensor) -> None:
        """A step of the optimizer if loss and gradient norm are finite, in every process; then the next factor.

        An optimizer without a flag for it makes the host wait for the answer.
        """
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        numbers = torch.stack([torch.as_tensor(n, dtype=torch.float64).to(self.scale.device) for n in (loss, norm)])
        overflowed = total((~numbers.isfinite().all()).float()) > 0
        if honours_found_inf(optimizer):
            optimizer.found_inf = overflowed.float()  # pyrefly: ignore [missing-attribute] (torch reads it so)
            optimizer.step()
        elif not overflowed.item():
            optimizer.step()
        self._count(overflowed, torch.cat([numbers.new_tensor([float(step)]), numbers]))

    def _count(self, overflowed: Tensor, said: Tensor) -> None:
        first = overflowed & (self.in_a_row == 0 if self.scaling else self._bad[0] < 0)
        self._bad = torch.where(first, said, self._bad)
        self.skipped = self.skipped + overflowed
        self.in_a_row = torch.where(overflowed, self.in_a_row + 1, 0)
        if self.scaling:
            good = torch.where(overflowed, 0, self.good + 1)
            grown = self.scale * GROWTH
            due = good >= self.grown_after
            larger = torch.where(due & grown.isfinite(), grown, self.scale)
            self.scale = torch.where(overflowed, self.scale * SHRINKAGE, larger)
            self.good = torch.where(due, 0, good)

    def look(self) -> Bad | None:
        """What the run has to stop for, if anything; the host waits for the device here."""
        step, loss, norm = self._bad.tolist()
        in_a_row = int(self.in_a_row)
        stop = in_a_row >= MOST_SKIPPED if self.scaling else step >= 0
        return Bad(int(step), loss, norm, in_a_row) if stop else None

    def values(self) -> dict[str, float | int]:
        """For a line of metrics: the factor, and steps left out since the run began; nothing without scaling."""
        return {"loss_scale": self.scale.item(), "skipped_steps": int(self.skipped)} if self.scaling else {}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold."""
        return {name: vars(self)[name] for name in KEPT} if self.scaling else {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts it back."""
        for name in KEPT if self.scaling else ():
            setattr(self, name, tensors[name].to(self.scale.device))


class _Scaled(torch.autograd.Function):
    """The identity, backwards a multiplication."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return gradients[0] * scale, None
