"""X-Token: the student's probabilities through a sparse map onto the teacher's vocabulary. NVIDIA 2026, 2605.21699.

A student token that the teacher has too keeps its probability; another one hands it to the tokens that the teacher
would spell it with, the first of them above all. Chunks of several tokens are compared by their mean distribution.
"""

from typing import Annotated

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from tokenkit.losses import loss
from tokenkit.losses.divergences import Share, Temperature
from tokenkit.losses.uld import columns_of, sorted_distance, without
from tokenkit.quantities import at_least_float32, sum_by_chunk

SMALLEST = 1e-10


@loss(per="chunk")
def p_kl(
    student_logits: Float[Tensor, "B T V"],
    student_chunk: Int[Tensor, "B T"],
    student_chunk_end: Int[Tensor, "B C"],
    teacher_logits: Float[Tensor, "B S W"],
    teacher_chunk: Int[Tensor, "B S"],
    teacher_chunk_end: Int[Tensor, "B C"],
    projection_ids: Int[Tensor, "V K"],
    projection_weights: Float[Tensor, "V K"],
    *,
    top_k: Annotated[int, Field(ge=1)] = 8192,
    temperature: Temperature = 1.0,
) -> Float[Tensor, "B C"]:
    """KL(teacher || projected student) in nats on the teacher's best tokens of each chunk, times squared temperature.

    Both sides are scaled to sum to 1 over those tokens.
    """
    teacher = mean_by_chunk(teacher_logits, teacher_chunk, teacher_chunk_end, temperature)
    student = mean_by_chunk(student_logits, student_chunk, student_chunk_end, temperature)
    projected = project(student, projection_ids, projection_weights, teacher.shape[-1])
    best, ids = teacher.topk(min(top_k, teacher.shape[-1]), -1)
    p, q = (_scaled(best), _scaled(projected.gather(-1, ids)))
    return (p * ((p + SMALLEST).log() - (q + SMALLEST).log())).sum(-1) * temperature**2


@loss(per="chunk")
def h_kl(
    student_logits: Float[Tensor, "B T V"],
    student_chunk: Int[Tensor, "B T"],
    student_chunk_end: Int[Tensor, "B C"],
    teacher_logits: Float[Tensor, "B S W"],
    teacher_chunk: Int[Tensor, "B S"],
    teacher_chunk_end: Int[Tensor, "B C"],
    projection_ids: Int[Tensor, "V K"],
    projection_weights: Float[Tensor, "V K"],
    *,
    match: Share = 0.6,
    top_k: Annotated[int, Field(ge=1)] = 8192,
    temperature: Temperature = 1.0,
) -> Float[Tensor, "B C"]:
    """KL on the tokens that are matched one to one, and L1 of the sorted best others, times squared temperature.

    A student token is matched with the teacher token that gets the most of it, if that is at least `match`.
    """
    teacher = mean_by_chunk(teacher_logits, teacher_chunk, teacher_chunk_end, temperature)
    student = mean_by_chunk(student_logits, student_chunk, student_chunk_end, temperature)
    own, other = relaxed_pairs(projection_ids, projection_weights, match, teacher.shape[-1])
    p, q = columns_of(teacher, other), columns_of(student, own)
    common = (p * ((p + SMALLEST).log() - (q + SMALLEST).log())).sum(-1)
    rest = sorted_distance(_best_others(student, own, top_k), _best_others(teacher, other, top_k))
    return (common + rest) * temperature**2


def mean_by_chunk(
    logits: Float[Tensor, "B T V"], chunk: Int[Tensor, "B T"], chunk_end: Int[Tensor, "B C"], temperature: float
) -> Float[Tensor, "B C V"]:
    """The mean of the distributions that a chunk's tokens were drawn from; 0 for a chunk without any."""
    sums = sum_by_chunk((at_least_float32(logits) / temperature).softmax(-1), chunk, chunk_end.shape[1])
    tokens = sum_by_chunk(torch.ones_like(chunk), chunk, chunk_end.shape[1])
    return sums / tokens.clamp_min(1).unsqueeze(-1)


def project(
    student: Float[Tensor, "B C V"], ids: Int[Tensor, "V K"], weights: Float[Tensor, "V K"], width: int
) -> Float[Tensor, "B C W"]:
    """The student's probabilities, each token's handed on to teacher tokens by weight."""
    found = student.new_zeros(*student.shape[:-1], width)
    for place in range(ids.shape[1]):
        share = student * torch.where(ids[:, place] < 0, 0, weights[:, place]).to(student.dtype)
        found = found.index_add(-1, ids[:, place].clamp_min(0), share)
    return found


@torch.no_grad()
def relaxed_pairs(
    ids: Int[Tensor, "V K"], weights: Float[Tensor, "V K"], match: float, width: int
) -> tuple[Int[Tensor, "P"], Int[Tensor, "P"]]:
    """Student and teacher ids that belong together; of several claims on one the heaviest, then the first."""
    weight, place = weights.max(-1)
    target = ids.gather(1, place.unsqueeze(1)).squeeze(1)
    claims = torch.nonzero((weight >= match) & (target >= 0)).squeeze(1)
    heaviest = weight.new_zeros(width).scatter_reduce(0, target[claims], weight[claims], "amax")
    claims = claims[weight[claims] == heaviest[target[claims]]]
    first = torch.full((width,), len(ids), device=ids.device).scatter_reduce(0, target[claims], claims, "amin")
    claims = claims[claims == first[target[claims]]]
    return claims, target[claims]


def _scaled(values: Tensor) -> Tensor:
    return values / (values.sum(-1, keepdim=True) + SMALLEST)


def _best_others(values: Tensor, columns: Int[Tensor, "P"], top_k: int) -> Tensor:
    rest = without(values, columns)
    return rest.topk(min(top_k, rest.shape[-1]), -1).values
