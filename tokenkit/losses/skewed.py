"""KL against a mixture of both distributions, whose gradient stays bounded. Ko+ 2024, 2402.03898 (DistiLLM)."""

from jaxtyping import Float
from torch import Tensor

from tokenkit.losses import loss
from tokenkit.losses.divergences import Share, Temperature, divergence


@loss(per="token")
def skewed_kl(
    student_logits: Float[Tensor, "B T V"],
    teacher_logits: Float[Tensor, "B T V"],
    *,
    skew: Share = 0.1,
    temperature: Temperature = 1.0,
    temperature_squared: bool = True,
) -> Float[Tensor, "B T"]:
    """KL(p || skew p + (1 - skew) q) in nats, p the teacher; at skew 0 forward KL. Times the squared temperature."""
    found = divergence("skewed_kl", teacher_logits / temperature, student_logits / temperature, skew=skew)
    return found * (temperature**2 if temperature_squared else 1)


@loss(per="token")
def skewed_reverse_kl(
    student_logits: Float[Tensor, "B T V"],
    teacher_logits: Float[Tensor, "B T V"],
    *,
    skew: Share = 0.1,
    temperature: Temperature = 1.0,
    temperature_squared: bool = True,
) -> Float[Tensor, "B T"]:
    """KL(q || skew q + (1 - skew) p) in nats, q the student; at skew 0 reverse KL. Times the squared temperature."""
    found = divergence("skewed_reverse_kl", teacher_logits / temperature, student_logits / temperature, skew=skew)
    return found * (temperature**2 if temperature_squared else 1)
