"""Logits or probabilities matched entry by entry. Ba & Caruana 2014, 1312.6184; log-sum: Miles & Mikolajczyk 2024,
2303.11098.

Over one vocabulary. What is impossible on a side (logit -inf) is left out of all of them.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from tokenkit.losses import loss
from tokenkit.losses.distances import cosine_distance, log_sum
from tokenkit.losses.divergences import Temperature, both_possible
from tokenkit.quantities import at_least_float32

Logits = Float[Tensor, "B T V"]


@loss(per="token")
def logits_mse(student_logits: Logits, teacher_logits: Logits) -> Float[Tensor, "B T"]:
    """Squared difference of the logits, averaged over the vocabulary."""
    student, teacher, shown = _shown(student_logits, teacher_logits)
    return (student - teacher).square().sum(-1) / shown.sum(-1).clamp_min(1)


@loss(per="token")
def probability_mse(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    sum_over_vocabulary: bool = False,
    temperature: Temperature = 1.0,
) -> Float[Tensor, "B T"]:
    """Squared difference of the probabilities, averaged over the vocabulary (tiny where that is large) or summed."""
    p, q = ((at_least_float32(x) / temperature).softmax(-1) for x in (teacher_logits, student_logits))
    squares = (p - q).square()
    return squares.sum(-1) if sum_over_vocabulary else squares.mean(-1)


@loss(per="token")
def logits_cosine(student_logits: Logits, teacher_logits: Logits) -> Float[Tensor, "B T"]:
    """1 - cosine of the angle between the logits, in [0, 2]; it sees no factor, but a shift of all logits."""
    student, teacher, _ = _shown(student_logits, teacher_logits)
    return cosine_distance(student, teacher)


@loss(per="token")
def logsum(
    student_logits: Logits, teacher_logits: Logits, *, alpha: float = 4.0, delta: float = 1e-6
) -> Float[Tensor, "B T"]:
    """log(delta + sum of |difference of the logits|^alpha): the largest differences matter; log(delta) at equality."""
    student, teacher, _ = _shown(student_logits, teacher_logits)
    return log_sum(student - teacher, alpha, delta)


def _shown(student: Logits, teacher: Logits) -> tuple[Tensor, Tensor, Tensor]:
    """Both in float32 at least, with 0 for what is impossible on a side, and where that is not so."""
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    shown = both_possible(teacher, student)
    return torch.where(shown, student, 0), torch.where(shown, teacher, 0), shown
