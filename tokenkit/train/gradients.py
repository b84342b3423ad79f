"""Gradients of each loss by itself: collected over the microbatches of a step, and made to agree.

Conflicting gradients are projected as in gradient surgery (Yu+ 2020, 2001.06782).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tokenkit.train.parallel import full, several, total
from tokenkit.train.parallel import norm as whole_norm

Gradients = dict[str, dict[int, Tensor]]  # loss -> number of the parameter -> its gradient, absent where none arrives


def backward_into(
    value: Tensor, parameters: Sequence[nn.Parameter], trained: Sequence[nn.Parameter], *, retain_graph: bool = False
) -> None:
    """Adds the gradients of a value to some parameters and to no other of those that are trained.

    Those of parameters that are spread over processes arrive by a whole backward pass alone.
    """
    if not any(isinstance(parameter, DTensor) for parameter in trained):
        torch.autograd.backward(value, inputs=list(parameters), retain_graph=retain_graph)
        return
    wanted = {id(parameter) for parameter in parameters}
    others = [parameter for parameter in trained if id(parameter) not in wanted]
    before = [parameter.grad for parameter in others]
    for parameter in others:
        parameter.grad = None
    value.backward(retain_graph=retain_graph)
    for parameter, gradient in zip(others, before, strict=True):
        parameter.grad = gradient


def gradients_of(
    value: Tensor, parameters: Sequence[nn.Parameter], trained: Sequence[nn.Parameter]
) -> list[Tensor | None]:
    """The gradients of a value at some parameters; its graph stays, and what the parameters have gathered too."""
    if not any(isinstance(parameter, DTensor) for parameter in trained):
        return list(torch.autograd.grad(value, list(parameters), retain_graph=True, allow_unused=True))
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    backward_into(value, parameters, trained, retain_graph=True)
    found = [parameter.grad for parameter in parameters]
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad = gradient
    return found


class LossGradients:
    """Adds up, loss by loss, the gradients that the microbatches of a step send to some parameters."""

    def __init__(self, parameters: list[nn.Parameter], trained: Sequence[nn.Parameter] | None = None):
        """`trained` are all parameters that the losses reach; None: these."""
        self.parameters = parameters
        self.trained = parameters if trained is None else trained
        self.found: Gradients = {}

    def add(self, shares: Mapping[str, Tensor]) -> None:
        """The gradients of one microbatch; its graph stays for another backward pass."""
        for name, share in shares.items():
            own = self.found.setdefault(name, {})
            gradients = gradients_of(share, self.parameters, self.trained)
            for number, gradient in enumerate(gradients):
                if gradient is not None:
                    own[number] = own[number] + gradient if number in own else gradient

    def divide(self, by: Tensor) -> None:
        """Divides all of them."""
        for own in self.found.values():
            for number, gradient in own.items():
                own[number] = gradient / by

    def merge(self, other: "LossGradients") -> None:
        """Adds what another one has collected from the same parameters."""
        for name, theirs in other.found.items():
            own = self.found.setdefault(name, {})
            for number, gradient in theirs.items():
                own[number] = own[number] + gradient if number in own else gradient

    def gather(self, names: Sequence[str]) -> None:
        """With several processes: adds up what each has of every gradient; `names` are all losses, alike in each."""
        if not several():
            return
        empty: dict[int, Tensor] = {}
        gathered: Gradients = {}
        for name in names:
            own = self.found.get(name, empty)
            there = total(torch.tensor([number in own for number in range(len(self.parameters))], dtype=torch.int64))
            for number in there.nonzero().flatten().tolist():
                gradient = own[number] if number in own else torch.zeros_like(self.parameters[number])
                added = isinstance(gradient, DTensor)  # in the backward pass
                gathered.setdefault(name, {})[number] = gradient if added else total(gradient)
        self.found = gathered

    def owners(self, names: Sequence[str]) -> dict[int, int]:
        """Number of each parameter that one loss alone sends a gradient to → number of that loss."""
        owners: dict[int, int] = {}
        for number in range(len(self.parameters)):
            senders = [i for i, name in enumerate(names) if number in self.found.get(name, {})]
            if len(senders) == 1:
                owners[number] = senders[0]
        return owners

    def norms(self) -> dict[str, float]:
        """Norm of each loss's gradient over all these parameters together."""
        return {name: norm(own.values()) for name, own in self.found.items()}


def products(gradients: Gradients, names: Sequence[str], numbers: Sequence[int]) -> NDArray[np.float64]:
    """Inner products of the gradients of some losses, over the parameters of these numbers."""
    if not names:
        return np.zeros((0, 0))
    rows = []
    for one in names:
        for other in names:
            mine, theirs = gradients[one], gradients[other]
            both = [full((mine[n] * theirs[n]).sum()).double() for n in numbers if n in mine and n in theirs]
            rows.append(torch.stack(both).sum() if both else torch.zeros((), dtype=torch.float64))
    return torch.stack([row.cpu() for row in rows]).reshape(len(names), len(names)).numpy()


def norm(gradients: Iterable[Tensor]) -> float:
    """L2 norm of tensors taken as one vector."""
    return whole_norm(gradients).item()


def identity(gradients: Gradients, weights: Mapping[str, float], value: float) -> Gradients:
    """Every gradient as it is."""
    return gradients


def gradmag(gradients: Gradients, weights: Mapping[str, float], value: float) -> Gradients:
    """Every gradient with its weight as its norm; `value` keeps one that is nearly zero from becoming noise."""
    return {name: _scaled(own, weights[name] / (norm(own.values()) + value)) for name, own in gradients.items()}


def gradclip(gradients: Gradients, weights: Mapping[str, float], value: float) -> Gradients:
    """Every gradient with a norm of at most `value`."""
    norms = {name: norm(own.values()) for name, own in gradients.items()}
    return {name: own if norms[name] <= value else _scaled(own, value / norms[name]) for name, own in gradients.items()}


def pcgrad(gradients: Gradients, weights: Mapping[str, float], value: float) -> Gradients:
    """Every gradient without what it has against another one, parameter by parameter.

    All products are taken between gradients as they came, so that the order of the losses decides nothing.
    """
    changed: Gradients = {}
    for name, own in gradients.items():
        changed[name] = {}
        for number, gradient in own.items():
            result = gradient
            for other in (theirs[number] for key, theirs in gradients.items() if key != name and number in theirs):
                against = (gradient * other).sum().clamp_max(0)
                result = result - against / other.square().sum().clamp_min(1e-30) * other
            changed[name][number] = result
    return changed


LINKS: dict[str, Callable[[Gradients, Mapping[str, float], float], Gradients]] = {
    "identity": identity,
    "pcgrad": pcgrad,
    "gradmag": gradmag,
    "gradclip": gradclip,
}


def combined(
    gradients: Gradients, weights: Mapping[str, float], chain: Iterable[tuple[str, float]]
) -> dict[int, Tensor]:
    """The sum of the weighted gradients after every link of a chain, by parameter."""
    gradients = {name: _scaled(own, weights[name]) for name, own in gradients.items()}
    for link, value in chain:
        gradients = LINKS[link](gradients, weights, value)
    total: dict[int, Tensor] = {}
    for own in gradients.values():
        for number, gradient in own.items():
            total[number] = total[number] + gradient if number in total else gradient
    return total


def _scaled(gradients: dict[int, Tensor], factor: float) -> dict[int, Tensor]:
    return {number: factor * gradient for number, gradient in gradients.items()}
