"""Divergences between next-token distributions over one vocabulary. Hinton+ 2015, 1503.02531."""

import torch
from jaxtyping import Float
from torch import Tensor

from tokenkit.losses import loss
from tokenkit.losses.divergences import Temperature, both_possible, kl_of_logs, log_probabilities
from tokenkit.quantities import at_least_float32


@loss(per="token")
def forward_kl(
    student_logits: Float[Tensor, "B T V"],
    teacher_logits: Float[Tensor, "B T V"],
    *,
    temperature: Temperature = 1.0,
    temperature_squared: bool = True,
) -> Float[Tensor, "B T"]:
    """KL(teacher || student) in nats; by default times the squared temperature, so that gradients keep their size."""
    p, q = log_probabilities(teacher_logits, student_logits, temperature)
    return kl_of_logs(p, q) * (temperature**2 if temperature_squared else 1)


@loss(per="token")
def reverse_kl(
    student_logits: Float[Tensor, "B T V"],
    teacher_logits: Float[Tensor, "B T V"],
    *,
    temperature: Temperature = 1.0,
    temperature_squared: bool = True,
) -> Float[Tensor, "B T"]:
    """KL(student || teacher) in nats, lowered by leaving out what the student cannot do. Gu+ 2024, 2306.08543."""
    p, q = log_probabilities(teacher_logits, student_logits, temperature)
    return kl_of_logs(q, p) * (temperature**2 if temperature_squared else 1)


@loss(per="token")
def soft_cross_entropy(
    student_logits: Float[Tensor, "B T V"],
    teacher_logits: Float[Tensor, "B T V"],
    *,
    temperature: Temperature = 1.0,
    temperature_squared: bool = True,
) -> Float[Tensor, "B T"]:
    """Cross-entropy of the student under the teacher's distribution in nats: `forward_kl` and the teacher's entropy."""
    p, q = log_probabilities(teacher_logits, student_logits, temperature)
    found = -(p.exp() * torch.where(both_possible(p, q), q, 0)).sum(-1)
    return found * (temperature**2 if temperature_squared else 1)


@loss(per="token")
def total_variation(
    student_logits: Float[Tensor, "B T V"], teacher_logits: Float[Tensor, "B T V"], *, temperature: Temperature = 1.0
) -> Float[Tensor, "B T"]:
    """Half the L1 distance, in [0, 1]. Wen+ 2023, 2307.15190."""
    p = (at_least_float32(teacher_logits) / temperature).softmax(-1)
    q = (at_least_float32(student_logits) / temperature).softmax(-1)
    return (p - q).abs().sum(-1) / 2
