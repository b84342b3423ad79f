"""GOLD's hybrid: tokens of both vocabularies by identity, the others by rank. Hugging Face TRL, 2025.

A chunk of several tokens is one step: the distribution its last token was drawn from, times the probability of the
tokens before it, which is the chain rule. (TRL's default multiplies the distribution of the first with later ones.)
"""

from typing import Annotated

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from tokenkit.losses import loss
from tokenkit.losses.divergences import Share, Temperature, jensen_shannon
from tokenkit.losses.uld import columns_of, sorted_distance, without
from tokenkit.quantities import at_chunk_ends, at_least_float32, sum_by_chunk
from tokenkit.scores import token_scores_of_logits

SMALLEST = 1e-8
Weight = Annotated[float, Field(ge=0)]


@loss(per="chunk")
def gold(
    student_logits: Float[Tensor, "B T V"],
    student_labels: Int[Tensor, "B T"],
    student_chunk: Int[Tensor, "B T"],
    student_chunk_end: Int[Tensor, "B C"],
    teacher_logits: Float[Tensor, "B S W"],
    teacher_labels: Int[Tensor, "B S"],
    teacher_chunk: Int[Tensor, "B S"],
    teacher_chunk_end: Int[Tensor, "B C"],
    exact_pairs: Int[Tensor, "P 2"],
    *,
    beta: Share = 0.5,
    temperature: Temperature = 1.0,
    matched_weight: Weight | None = None,
    unmatched_weight: Weight | None = None,
) -> Float[Tensor, "B C"]:
    """Generalised Jensen-Shannon divergence of the matched tokens and L1 of the sorted others, weighed and added.

    Without weights: the share of the teacher's vocabulary that is matched, and the rest. `beta` 0 is forward KL, 1
    reverse.
    """
    student = chain_logp(student_logits, student_labels, student_chunk, student_chunk_end, temperature)
    teacher = chain_logp(teacher_logits, teacher_labels, teacher_chunk, teacher_chunk_end, temperature)
    overlap = len(exact_pairs) / teacher.shape[-1]
    matched = overlap if matched_weight is None else matched_weight
    unmatched = 1 - overlap if unmatched_weight is None else unmatched_weight
    q, p = (x.clamp_min(torch.tensor(SMALLEST).log().item()) for x in _of_pairs(student, teacher, exact_pairs))
    rest = sorted_distance(without(student.exp(), exact_pairs[:, 0]), without(teacher.exp(), exact_pairs[:, 1]))
    return matched * jensen_shannon(p, q, beta) + unmatched * rest


def chain_logp(
    logits: Float[Tensor, "B T V"],
    labels: Int[Tensor, "B T"],
    chunk: Int[Tensor, "B T"],
    chunk_end: Int[Tensor, "B C"],
    temperature: float,
) -> Float[Tensor, "B C V"]:
    """Log-probability that a chunk is its own tokens up to the last, which is each token of the vocabulary in turn."""
    logits = at_least_float32(logits) / temperature
    label_logp = token_scores_of_logits(logits, labels.masked_fill(chunk < 0, -1))[0]
    last = (chunk_end - 1).clamp_min(0)  # the position that predicts the chunk's last token
    whole = sum_by_chunk(label_logp, chunk, chunk_end.shape[1])
    scored = chunk.gather(1, last) == torch.arange(chunk_end.shape[1], device=chunk.device)
    before = torch.where(scored, whole - label_logp.gather(1, last), 0.0).clamp_max(0)
    return at_chunk_ends(logits, last).log_softmax(-1) + before.unsqueeze(-1)


def _of_pairs(student: Tensor, teacher: Tensor, pairs: Int[Tensor, "P 2"]) -> tuple[Tensor, Tensor]:
    return columns_of(student, pairs[:, 0]), columns_of(teacher, pairs[:, 1])
