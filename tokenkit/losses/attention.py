"""What positions look at: attention maps. Jiao+ 2020, 1909.10351 (TinyBERT).

One tokenizer. Maps exist only where a model computes attention in the plain way; relations (`attention_relations`) ask
for less and say more.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenkit.config import UserError
from tokenkit.losses import loss
from tokenkit.losses.aligned import Layers
from tokenkit.losses.distances import cosine_distance, weighted_sum
from tokenkit.quantities import at_least_float32

SMALLEST = 1e-12  # an attention that has rounded to 0 where the other side's has not


def looking(
    student_token_mask: Bool[Tensor, "B T"],
    student_label_mask: Bool[Tensor, "B T"],
    *,
    positions: Literal["scored", "all"],
) -> Bool[Tensor, "B T"]:
    """Every token of a row, prompts too, or the scored ones."""
    return student_token_mask if positions == "all" else student_label_mask


@loss(per="token", units=looking)
def attention_maps(
    student_maps: Float[Tensor, "B P H T T"],
    teacher_maps: Float[Tensor, "B P G T T"],
    student_token_mask: Bool[Tensor, "B T"],
    pair_weights: Float[Tensor, "P"],
    *,
    distance: Literal["mse", "kl", "cosine"] = "mse",
    heads: Literal["match", "mean"] = "match",
    positions: Literal["scored", "all"] = "scored",
    layers: Layers = "last",
) -> Float[Tensor, "B T"]:
    """Distance between where both sides look from each position, averaged over heads and pairs of layers.

    `mse` is averaged over the row's tokens, `kl` is KL(teacher || student) in nats, `cosine` 1 - cos. `heads: mean`
    compares the means over heads, whose numbers may differ.
    """
    if heads == "match" and student_maps.shape[2] != teacher_maps.shape[2]:
        raise UserError(
            f"losses.attention_maps.heads=match: the student's layers have {student_maps.shape[2]} heads, "
            f"the teacher's {teacher_maps.shape[2]}; write heads=mean"
        )
    keys = student_token_mask.view(len(student_token_mask), 1, 1, 1, -1)
    q, p = (torch.where(keys, at_least_float32(x), 0) for x in (student_maps, teacher_maps))
    if heads == "mean":
        q, p = q.mean(2, keepdim=True), p.mean(2, keepdim=True)
    if distance == "mse":
        found = (q - p).square().sum(-1) / keys.sum(-1).clamp_min(1)
    elif distance == "cosine":
        found = cosine_distance(q, p)
    else:
        found = (p * (p.clamp_min(SMALLEST).log() - q.clamp_min(SMALLEST).log())).sum(-1)
    return weighted_sum(found.mean(2).transpose(1, 2), pair_weights)
