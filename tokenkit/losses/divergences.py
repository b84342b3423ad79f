"""Divergences between two next-token distributions over one vocabulary, from logits; used by several losses.

Natural logarithms; P is the teacher, Q the student. Entries that are impossible on a side (logit -inf) contribute
nothing to what would be infinite there. KL: Hinton+ 2015, 1503.02531; skewed: Ko+ 2024, 2402.03898; adaptive: Wu+
2024, 2404.02657.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tokenkit.quantities import at_least_float32

Logits = Float[Tensor, "*N V"]
Rows = Float[Tensor, "*N"]
NOTHING = -1e4  # the logarithm of a probability whose exponential is 0 in every type, and whose gradient is finite
Divergence = Literal["kl", "reverse_kl", "skewed_kl", "skewed_reverse_kl", "adaptive_kl", "js"]


def divergence(
    kind: Divergence, teacher: Logits, student: Logits, *, skew: float = 0.1, adaptive_alpha: float = 0.5
) -> Rows:
    """The divergence of each row, in nats; `skew` and `adaptive_alpha` matter to the kinds of that name."""
    p, q = at_least_float32(teacher).log_softmax(-1), at_least_float32(student).log_softmax(-1)
    if kind == "js":  # finite whatever is impossible on one side
        return _js(p.clamp_min(NOTHING), q.clamp_min(NOTHING))
    shown = (p > -torch.inf) & (q > -torch.inf)
    gap = (p.exp() - q.exp()).abs().detach()
    p, q = p.masked_fill(~shown, NOTHING), q.masked_fill(~shown, NOTHING)
    if kind == "skewed_kl":
        return kl_of_logs(p, mixture(p, q, skew))
    if kind == "skewed_reverse_kl":
        return kl_of_logs(q, mixture(q, p, skew))
    if kind == "adaptive_kl":
        return _adaptive(p, q, gap, adaptive_alpha)
    return PLAIN[kind](p, q)


def kl_of_logs(p: Logits, q: Logits) -> Rows:
    """KL(p || q) of log-probabilities, in nats; of masses that do not sum to 1, the same sum."""
    return (p.exp() * (p - q)).sum(-1)


def mixture(p: Logits, q: Logits, share: float) -> Logits:
    """log(share p + (1 - share) q)."""
    return torch.logaddexp(p + math.log(share), q + math.log1p(-share))


def _adaptive(p: Tensor, q: Tensor, gap: Tensor, alpha: float) -> Tensor:
    """Forward KL weighed by the gap in the tokens that hold most of the mass, reverse KL by the gap in the rest.

    The tail is what is reached first, from the smallest probability up, while the sum stays below alpha.
    """
    with torch.no_grad():
        rising, order = p.exp().sort(-1)
        gap = gap.gather(-1, order)
        tail = rising.cumsum(-1) < alpha
        tail_gap = torch.where(tail, gap, 0).sum(-1)
        head_gap = torch.where(tail, 0, gap).sum(-1)
        total = head_gap + tail_gap
        head_share = torch.where(total > 0, head_gap / total.clamp_min(torch.finfo(total.dtype).tiny), 0.5)
    return head_share * kl_of_logs(p, q) + (1 - head_share) * kl_of_logs(q, p)


def _js(p: Tensor, q: Tensor) -> Tensor:
    mixed = mixture(p, q, 0.5)
    return (kl_of_logs(p, mixed) + kl_of_logs(q, mixed)) / 2


PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"kl": kl_of_logs, "reverse_kl": lambda p, q: kl_of_logs(q, p)}
