"""Divergences between two next-token distributions over one vocabulary, from logits; used by several losses.

Natural logarithms; P is the teacher, Q the student. Entries that are impossible on a side (logit -inf) contribute
nothing to what would be infinite there. KL: Hinton+ 2015, 1503.02531; skewed: Ko+ 2024, 2402.03898; adaptive: Wu+
2024, 2404.02657; generalised Jensen-Shannon: Agarwal+ 2024, 2306.13649.
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenkit.config import UserError
from tokenkit.quantities import at_least_float32

Logits = Float[Tensor, "*N V"]
Rows = Float[Tensor, "*N"]
NOTHING = -1e4  # the logarithm of a probability whose exponential is 0 in every type, and whose gradient is finite
AT_ONCE = {"cpu": 2**16, "cuda": 2**26}  # entries that are worked on at one time: a cache, or 256 MiB
Divergence = Literal["kl", "reverse_kl", "skewed_kl", "skewed_reverse_kl", "adaptive_kl", "js"]
Temperature = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def divergence(
    kind: Divergence, teacher: Logits, student: Logits, *, skew: float = 0.1, adaptive_alpha: float = 0.5
) -> Rows:
    """The divergence of each row, in nats; `skew` and `adaptive_alpha` matter to the kinds of that name."""
    p, q = at_least_float32(teacher).log_softmax(-1), at_least_float32(student).log_softmax(-1)
    if kind == "js":  # finite whatever is impossible on one side
        return jensen_shannon(p, q, 0.5)
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


def log_probabilities(teacher: Logits, student: Logits, temperature: float) -> tuple[Logits, Logits]:
    """Both sides' log-probabilities at a temperature, in float32 at least."""
    p, q = (at_least_float32(logits) for logits in (teacher, student))
    if temperature != 1:
        p, q = p / temperature, q / temperature
    return p.log_softmax(-1), q.log_softmax(-1)


def kl_of_logs(p: Logits, q: Logits) -> Rows:
    """KL(p || q) of log-probabilities, in nats; of masses that do not sum to 1, the same sum."""
    # the difference is masked, not the product: 0 times infinity would be NaN in the value and in the gradient
    return (p.exp() * torch.where(both_possible(p, q), p - q, 0)).sum(-1)


def both_possible(p: Logits, q: Logits) -> Bool[Tensor, "*N V"]:
    """Entries that are above -inf on both sides."""
    return (p > -torch.inf) & (q > -torch.inf)


def mixture(p: Logits, q: Logits, share: float) -> Logits:
    """log(share p + (1 - share) q)."""
    if share in (0, 1):
        return p if share else q
    return torch.logaddexp(p + math.log(share), q + math.log1p(-share))


def jensen_shannon(p: Logits, q: Logits, beta: float) -> Rows:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q; at most ln 2, reached at beta 1/2.

    At beta 0 and 1, where that is 0, it is KL(p || q) and KL(q || p): what it goes to when divided by beta or 1 - beta.
    """
    if beta in (0, 1):
        return kl_of_logs(q, p) if beta else kl_of_logs(p, q)
    return _JensenShannon.apply(p, q, beta)


class _JensenShannon(torch.autograd.Function):
    """A cache full of rows at a time; the gradient at a logarithm is its share, its mass and its gap to the mixture."""

    @staticmethod
    def forward(ctx, p, q, beta):
        needed = ctx.needs_input_grad[:2]
        flat = [x.reshape(-1, p.shape[-1]) for x in (p, q)]
        found = [torch.empty_like(x) if n else None for x, n in zip(flat, needed)]
        values, size = p.new_empty(len(flat[0])), max(1, AT_ONCE[p.device.type] // max(1, p.shape[-1]))
        for start in range(0, len(values), size):
            rows = slice(start, start + size)
            parts = _js_parts(flat[0][rows], flat[1][rows], beta)
            torch.sum(parts[0] + parts[1], -1, out=values[rows])
            for whole, part in zip(found, parts):
                if whole is not None:
                    whole[rows] = part
        ctx.save_for_backward(*found)
        ctx.shape = p.shape
        return values.view(p.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # pyrefly: ignore [bad-override] (a decorator hides the signature)
        outer = gradients[0].reshape(-1, 1)
        return *(None if x is None else (x * outer).reshape(ctx.shape) for x in ctx.saved_tensors), None


def _js_parts(p: Tensor, q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The terms of both sides, which are the gradients at their logarithms too: all other terms of those cancel."""
    p_mass, q_mass = p.exp(), q.exp()
    mixed = torch.lerp(q_mass, p_mass, beta).clamp_min_(torch.finfo(p.dtype).tiny).log_()
    p_gap, q_gap = p.clamp_min(NOTHING).sub_(mixed), q.clamp_min(NOTHING).sub_(mixed)
    return p_mass.mul_(p_gap).mul_(beta), q_mass.mul_(q_gap).mul_(1 - beta)


def log_mixture(logits: Sequence[Logits], weights: Sequence[float]) -> Logits:
    """Log of the weighted mean of several models' probabilities, which may stand for the logits of one teacher.

    Of one model, its log-probabilities. Weights are shares of their sum; what is impossible for all stays so.
    """
    if len(logits) != len(weights) or not weights or min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise UserError(
            f"weights of a mixture: {list(weights)} for {len(logits)} teachers; write one number from 0 up for each, "
            "and not all 0"
        )
    total: Tensor | None = None
    for one, weight in zip(logits, weights):
        if weight > 0:
            part = at_least_float32(one).log_softmax(-1) + math.log(weight / sum(weights))
            total = part if total is None else torch.logaddexp(total, part)
    assert total is not None, "some weight is above 0"
    return total


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


PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"kl": kl_of_logs, "reverse_kl": lambda p, q: kl_of_logs(q, p)}
