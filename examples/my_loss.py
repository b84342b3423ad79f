"""Chunks of text by the Huber distance of their log-probabilities, and tokens by the Jensen-Shannon divergence."""

import math

from jaxtyping import Float
from torch import Tensor

from tokenkit.losses import loss


@loss(per="chunk")
def chunk_huber(
    student_chunk_logp: Float[Tensor, "B C"], teacher_chunk_logp: Float[Tensor, "B C"], *, delta: float = 2.0
) -> Float[Tensor, "B C"]:
    """Squared gap in nats up to `delta`, linear beyond: a chunk that the student finds absurd pulls no harder."""
    gap = (student_chunk_logp - teacher_chunk_logp).abs()
    near = gap.clamp_max(delta)
    return near * (gap - near / 2)


@loss(per="token")
def jensen_shannon(
    student_logits: Float[Tensor, "B T V"], teacher_logits: Float[Tensor, "B T V"], *, temperature: float = 1.0
) -> Float[Tensor, "B T"]:
    """Mean divergence from the mixture of both distributions, in nats: between 0 and log 2."""
    student = (student_logits / temperature).log_softmax(-1)
    teacher = (teacher_logits / temperature).log_softmax(-1)
    mixture = student.logaddexp(teacher) - math.log(2)
    to_mixture = student.exp() * (student - mixture) + teacher.exp() * (teacher - mixture)
    return to_mixture.sum(-1) / 2
