"""Relations of queries, of keys and of values. Wang+ 2021, 2012.15828 (MiniLMv2); for ternary students: 2510.13998.

How similar each position's vector is to those of all others, as a distribution. Vectors are regrouped into as many
relation heads on both sides, so neither widths nor numbers of heads need to be equal, nor those of queries and keys.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from tokenkit.config import UserError
from tokenkit.losses import loss
from tokenkit.losses.aligned import Layers
from tokenkit.losses.attention import looking
from tokenkit.losses.distances import directions, weighted_sum
from tokenkit.losses.divergences import kl_of_logs
from tokenkit.quantities import at_least_float32

MOST_HEADS, LEAST_WIDTH = 32, 8  # what `heads: 0` chooses between
Kind = Literal["queries", "keys", "values"]
Kinds = Annotated[tuple[Kind, ...], Field(min_length=1)]


def relation_reads(options: Mapping[str, Any]) -> dict[str, str]:
    """What is not compared stands for nothing that would have to be computed."""
    first, kinds = options["of"][0], ("queries", "keys", "values")
    unread = [kind for kind in kinds if kind not in options["of"]]
    return {f"{side}_{kind}": f"{side}_{first}" for side in ("student", "teacher") for kind in unread}


@loss(per="token", units=looking, reads=relation_reads)
def attention_relations(
    student_queries: Float[Tensor, "B T P DQ"],
    student_keys: Float[Tensor, "B T P DK"],
    student_values: Float[Tensor, "B T P DV"],
    teacher_queries: Float[Tensor, "B T P EQ"],
    teacher_keys: Float[Tensor, "B T P EK"],
    teacher_values: Float[Tensor, "B T P EV"],
    student_token_mask: Bool[Tensor, "B T"],
    pair_weights: Float[Tensor, "P"],
    *,
    of: Kinds = ("queries", "keys", "values"),
    heads: Annotated[int, Field(ge=0)] = 0,
    normalize: bool = False,
    causal: bool = False,
    positions: Literal["scored", "all"] = "scored",
    layers: Layers = "last",
) -> Float[Tensor, "B T"]:
    """KL(teacher || student) in nats of each position's relations, summed over kinds, averaged over heads and pairs.

    A relation is softmax(A A^T / sqrt(width of a head)); with `normalize` of cosines, at temperature 1. It is to every
    token of the row, or with `causal` to those up to the position. `heads` 0: for each kind the largest number up to 32
    that divides both widths and leaves 8 channels to a head, else 1.
    """
    sides = {
        "queries": (student_queries, teacher_queries),
        "keys": (student_keys, teacher_keys),
        "values": (student_values, teacher_values),
    }
    total: Tensor | None = None
    for kind in dict.fromkeys(of):
        own, other = sides[kind]
        count = heads or relation_heads(own.shape[-1], other.shape[-1])
        q, p = (_relations(x, kind, count, student_token_mask, normalize, causal) for x in (own, other))
        found = kl_of_logs(p, q).mean(2).transpose(1, 2)
        total = found if total is None else total + found
    assert total is not None, "at least one kind is compared"
    return weighted_sum(total, pair_weights)


def relation_heads(student_width: int, teacher_width: int) -> int:
    """The largest number up to 32 that divides both widths and leaves 8 channels to a head; 1 without one."""
    shared = math.gcd(student_width, teacher_width)
    most = min(MOST_HEADS, min(student_width, teacher_width) // LEAST_WIDTH)
    return max((n for n in range(1, most + 1) if shared % n == 0), default=1)


def _relations(
    vectors: Float[Tensor, "B T P D"],
    kind: Kind,
    heads: int,
    present: Bool[Tensor, "B T"],
    normalize: bool,
    causal: bool,
) -> Float[Tensor, "B P R T T"]:
    """Log-probabilities of each position's relations; of what a row does not have, -inf."""
    if vectors.shape[-1] % heads:
        raise UserError(
            f"losses.attention_relations.heads={heads}: does not divide {vectors.shape[-1]}, the width of a model's "
            f"{kind}; write a common divisor of the widths of both models, or 0"
        )
    split = at_least_float32(vectors).unflatten(-1, (heads, -1)).permute(0, 2, 3, 1, 4)
    split = torch.where(present.view(len(present), 1, 1, -1, 1), split, 0)
    split = directions(split) if normalize else split * split.shape[-1] ** -0.25
    length = present.shape[1]
    own = torch.eye(length, dtype=torch.bool, device=present.device)
    seen = present.unsqueeze(1) | own  # a position that is not there sees itself, so that no sum is empty
    seen = seen.tril() if causal else seen
    return (split @ split.mT).masked_fill(~seen.view(len(present), 1, 1, length, length), -torch.inf).log_softmax(-1)
