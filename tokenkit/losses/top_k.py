"""Divergence on the teacher's best tokens and one more for all the others. One vocabulary. Peng+ 2024, 2410.16215.

What a recorded teacher can say of its whole distribution in a few numbers per token.
"""

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from tokenkit.losses import loss
from tokenkit.losses.divergences import kl_of_logs
from tokenkit.quantities import at_least_float32

SMALLEST_TAIL = -100.0  # nats; a tail of no mass at all would be -inf times 0


@loss(per="token")
def top_k_kl(
    student_top_logp: Float[Tensor, "B T K"],
    student_tail_logp: Float[Tensor, "B T"],
    teacher_top_logp: Float[Tensor, "B T K"],
    teacher_tail_logp: Float[Tensor, "B T"],
    *,
    top_k: Annotated[int, Field(ge=1)] = 64,
    tail: Literal["keep", "renormalize", "zero"] = "keep",
) -> Float[Tensor, "B T"]:
    """KL(teacher || student) in nats over the `top_k` best ids and, with tail=keep, the rest as one more.

    `keep` is at most the KL of all ids, and equal to it with all ids. The others are biased: `renormalize` scales both
    sides to sum 1 over the best ids and asks nothing of the mass elsewhere; `zero` leaves the rest's term out, so that
    mass moved from the rest to the best ids is rewarded, even beyond equality, and values may be negative.
    """
    sides = ((teacher_top_logp, teacher_tail_logp), (student_top_logp, student_tail_logp))
    if tail == "keep":
        return kl_of_logs(*(_with_tail(logp, rest, top_k) for logp, rest in sides))
    p, q = (at_least_float32(logp[..., :top_k]) for logp, _ in sides)
    return kl_of_logs(p.log_softmax(-1), q.log_softmax(-1)) if tail == "renormalize" else kl_of_logs(p, q)


def _with_tail(logp: Float[Tensor, "B T K"], tail: Float[Tensor, "B T"], top_k: int) -> Float[Tensor, "B T L"]:
    """The first ids, and the mass of all others: of those beyond `top_k`, too."""
    logp, tail = at_least_float32(logp), at_least_float32(tail)
    rest = torch.cat([logp[..., top_k:], tail.unsqueeze(-1).clamp_min(SMALLEST_TAIL)], -1).logsumexp(-1)
    return torch.cat([logp[..., :top_k], rest.unsqueeze(-1)], -1)
