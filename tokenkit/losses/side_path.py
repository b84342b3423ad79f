"""Next-token probabilities of tokens that both vocabularies have, after the same text. Part of ALM's code, 2503.20083.

Over a list of pairs of ids, at the end of every chunk. The authors report no gain from it.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokenkit.losses import loss
from tokenkit.losses.divergences import kl_of_logs
from tokenkit.losses.uld import columns_of
from tokenkit.quantities import at_least_float32

SMALLEST_REST = 1e-8
Distance = Literal["kl", "reverse_kl", "kl_subset", "reverse_kl_subset", "log_abs", "abs"]


def side_path_reads(options: Mapping[str, Any]) -> dict[str, str]:
    """Which pairs of ids are compared."""
    return {"exact_pairs": f"{options['mapping']}_pairs"}


@loss(per="chunk", reads=side_path_reads)
def side_path(
    student_chunk_logits: Float[Tensor, "B C V"],
    teacher_chunk_logits: Float[Tensor, "B C W"],
    exact_pairs: Int[Tensor, "P 2"],
    *,
    mapping: Literal["exact", "mined", "unbiased"] = "exact",
    distance: Distance = "kl",
) -> Float[Tensor, "B C"]:
    """Distance of the pairs' probabilities: with the rest as one more token, within the pairs alone, or pair by pair.

    `log_abs` is the mean over pairs, `abs` the sum.
    """
    q = columns_of(at_least_float32(student_chunk_logits).log_softmax(-1), exact_pairs[:, 0])
    p = columns_of(at_least_float32(teacher_chunk_logits).log_softmax(-1), exact_pairs[:, 1])
    if distance == "log_abs":
        return (p - q).abs().mean(-1)
    if distance == "abs":
        return (p.exp() - q.exp()).abs().sum(-1)
    p, q = (x.log_softmax(-1) if distance.endswith("subset") else _with_rest(x) for x in (p, q))
    if distance.startswith("reverse"):
        p, q = q, p
    return kl_of_logs(p, q)


def _with_rest(logp: Float[Tensor, "B C P"]) -> Float[Tensor, "B C Q"]:
    """One more entry for all other tokens."""
    rest = (1 - logp.exp().sum(-1, keepdim=True)).clamp_min(SMALLEST_REST).log()
    return torch.cat([logp, rest], -1)
