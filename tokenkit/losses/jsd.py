"""Generalised Jensen-Shannon divergence: between forward and reverse KL, bounded. Agarwal+ 2024, 2306.13649 (GKD)."""

from jaxtyping import Float
from torch import Tensor

from tokenkit.losses import loss
from tokenkit.losses.divergences import Share, Temperature, jensen_shannon, log_probabilities


@loss(per="token")
def jsd(
    student_logits: Float[Tensor, "B T V"],
    teacher_logits: Float[Tensor, "B T V"],
    *,
    beta: Share = 0.5,
    temperature: Temperature = 1.0,
    temperature_squared: bool = True,
) -> Float[Tensor, "B T"]:
    """beta KL(p || m) + (1 - beta) KL(q || m) in nats, m = beta p + (1 - beta) q, p the teacher; at most ln 2.

    `beta` 0 is KL(p || q) and 1 is KL(q || p). By default times the squared temperature.
    """
    p, q = log_probabilities(teacher_logits, student_logits, temperature)
    return jensen_shannon(p, q, beta) * (temperature**2 if temperature_squared else 1)
