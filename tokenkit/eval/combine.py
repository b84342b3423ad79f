"""Several next-symbol distributions as one: a mixture, or a product of experts."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tokenkit.config import UserError

How = Literal["mean_prob", "mean_logp"]


class Combination:
    """How members become one distribution; a member of weight 0 is not asked."""

    def __init__(self, how: How, count: int, weights: Sequence[float] | None = None) -> None:
        """Equal weights if none are given; UserError for weights that are no shares of 1."""
        self.how: How = how
        self.weights = [1 / count] * count if weights is None else list(weights)
        if len(self.weights) != count:
            raise UserError(f"weights: {len(self.weights)} of them for {count} models; write one per model")
        if min(self.weights) < 0 or not math.isclose(sum(self.weights), 1, abs_tol=1e-6):
            raise UserError(f"weights: {self.weights} do not sum to 1; write shares of 1, none below 0")

    def __call__(self, logp: "Sequence[Float[Tensor, '*N S']]") -> Float[Tensor, "*N S"]:
        """Natural log-probabilities that sum to 1 over the last axis.

        mean_prob: the weighted mean of probabilities. mean_logp: the weighted mean of log-probabilities, scaled to sum
        to 1 (Hinton 2002, a product of experts); what one member rules out is ruled out.
        """
        members = [(one, weight) for one, weight in zip(logp, self.weights, strict=True) if weight > 0]
        if self.how == "mean_prob":
            return torch.stack([one + math.log(weight) for one, weight in members]).logsumexp(0)
        product = torch.stack([weight * one for one, weight in members]).sum(0)
        if bool((product == -torch.inf).all(-1).any()):
            raise UserError("combine: mean_logp, but the models agree on no symbol at some place; write mean_prob")
        return product.log_softmax(-1)
