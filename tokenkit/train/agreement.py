"""Balances that look at how the gradients of all losses lie to each other before they are added up."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tokenkit.train import policies
from tokenkit.train.gradients import LossGradients, backward_into, products
from tokenkit.train.passes import (
    ZERO,
    Balance,
    Forward,
    Shared,
    add_values,
    counted,
    inverse,
    look_first,
    plain,
    sum_backward,
)

STEPS, OWNERS = "(steps)", "(owners)"  # beside the losses in a balance's state; no loss can be called so


class Agreement(Balance):
    """Factors that a policy finds from the inner products of all gradients, at every `every`-th step.

    They act on what several losses train. What one loss alone trains, such as its projector, gets that loss's own
    weighted gradient. Where no factor differs from 1 the step is the plain sum, bit for bit.
    """

    def __init__(
        self, parameters: list[nn.Parameter], names: Sequence[str], policy: policies.Policy, main: int, every: int
    ):
        super().__init__()
        self.parameters, self.names, self.policy, self.main, self.every = parameters, names, policy, main, every
        self.state = {name: {"factor": 1.0} for name in names} | {STEPS: {"count": 0.0}, OWNERS: {}}

    def backward(self, forwards: Sequence[Forward], weights: Mapping[str, float]) -> Shared:
        if self.state[STEPS]["count"] % self.every == 0:
            gradients = LossGradients(self.parameters)
            forwards = look_first(forwards, lambda shares: gradients.add(counted(shares, weights)))
            gradients.gather(self.names)
            self._look(gradients, weights)
        self.state[STEPS]["count"] += 1
        factors = {name: weight * self.state[name]["factor"] for name, weight in weights.items()}
        if factors == weights:
            return Shared(sum_backward(forwards, weights), factors)
        return Shared(self._sum_apart(forwards, factors, weights), factors)

    def _look(self, gradients: LossGradients, weights: Mapping[str, float]) -> None:
        owners = gradients.owners(self.names)
        if all(name in gradients.found for name, weight in weights.items() if weight):  # else some only seem alone
            self.state[OWNERS] = {str(number): float(owner) for number, owner in owners.items()}
        shared = [n for n in range(len(self.parameters)) if str(n) not in self.state[OWNERS]]
        names = [name for name in self.names if name in gradients.found]
        gram = products(gradients.found, names, shared)
        felt = [i for i, name in enumerate(names) if not gram[i, i] * weights[name] ** 2 <= ZERO**2]
        names, gram = [names[i] for i in felt], gram[felt][:, felt]
        if self.names[self.main] in names or (names and not self.needs_main):
            for name, factor in zip(names, self._factors(names, gram, weights), strict=True):
                self.state[name]["factor"] = factor

    @property
    def needs_main(self) -> bool:
        """Whether nothing can be said in a step without the main loss."""
        return self.main >= 0

    def _factors(self, names: list[str], gram: policies.Gram, weights: Mapping[str, float]) -> list[float]:
        if not np.isfinite(gram).all():
            return [math.nan] * len(names)  # stops the run
        scale = np.array([weights[name] for name in names])
        main = names.index(self.names[self.main]) if self.needs_main else -1
        return self.policy(gram * scale * scale[:, None], main)

    def _sum_apart(
        self, forwards: Sequence[Forward], factors: Mapping[str, float], weights: Mapping[str, float]
    ) -> dict[str, float]:
        """Backward passes of the factored sum into what is shared, and of each weighted loss into what is its own."""
        own: dict[str, list[nn.Parameter]] = {}
        for number, owner in self.state[OWNERS].items():
            own.setdefault(self.names[int(owner)], []).append(self.parameters[int(number)])
        shared = [p for number, p in enumerate(self.parameters) if str(number) not in self.state[OWNERS]]
        sums: dict[str, Tensor] = {}
        for forward in forwards:
            shares = forward()
            for name, share in counted(shares, weights).items():
                if name in own:
                    backward_into(weights[name] * share, own[name], self.parameters, retain_graph=True)
            weighted = [factors[name] * share for name, share in shares.items() if factors[name]]
            if weighted:
                backward_into(torch.stack(weighted).sum(), shared, self.parameters)
            add_values(sums, shares)
        return plain(sums)


class FixedRatio(Agreement):
    """Every loss's gradient as long as the main one's, times the ratio of their weights, by running lengths."""

    def __init__(self, parameters: list[nn.Parameter], names: Sequence[str], alpha: float, main: int, every: int):
        super().__init__(parameters, names, policies.project_aux, main, every)
        self.alpha = alpha

    def _factors(self, names: list[str], gram: policies.Gram, weights: Mapping[str, float]) -> list[float]:
        for number, name in enumerate(names):
            length, entry = math.sqrt(gram[number, number]), self.state[name]
            entry["length"] = self.alpha * entry.get("length", length) + (1 - self.alpha) * length
        main = self.state[self.names[self.main]]["length"]
        return [main * inverse(self.state[name]["length"]) for name in names]
