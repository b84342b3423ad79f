"""Divergences between next-token distributions over one vocabulary. Hinton+ 2015, 1503.02531."""

from jaxtyping import Float
from torch import Tensor

from tokenkit.losses import loss
from tokenkit.losses.divergences import kl_of_logs
from tokenkit.quantities import at_least_float32


@loss(per="token")
def forward_kl(
    student_logits: Float[Tensor, "B T V"], teacher_logits: Float[Tensor, "B T V"], *, temperature: float = 1.0
) -> Float[Tensor, "B T"]:
    """KL(teacher || student) in nats, times the squared temperature so that gradients keep their size."""
    log_p = (at_least_float32(teacher_logits) / temperature).log_softmax(-1)
    log_q = (at_least_float32(student_logits) / temperature).log_softmax(-1)
    return kl_of_logs(log_p, log_q) * temperature**2


@loss(per="token")
def total_variation(
    student_logits: Float[Tensor, "B T V"], teacher_logits: Float[Tensor, "B T V"], *, temperature: float = 1.0
) -> Float[Tensor, "B T"]:
    """Half the L1 distance, in [0, 1]. Wen+ 2023, 2307.15190."""
    p = (at_least_float32(teacher_logits) / temperature).softmax(-1)
    q = (at_least_float32(student_logits) / temperature).softmax(-1)
    return (p - q).abs().sum(-1) / 2
