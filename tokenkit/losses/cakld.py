"""Forward and reverse KL, the surer the teacher the more of the reverse. Du+ 2024, 2402.10631 (BitDistiller).

Where the teacher is sure of the text the student may settle on one answer; where it is not, all of them matter. The
paper takes one confidence for a set of texts; here each position has its own.
"""

from jaxtyping import Float
from torch import Tensor

from tokenkit.losses import loss
from tokenkit.losses.divergences import Share, Temperature, kl_of_logs, log_probabilities


@loss(per="token")
def cakld(
    student_logits: Float[Tensor, "B T V"],
    teacher_logits: Float[Tensor, "B T V"],
    teacher_label_logp: Float[Tensor, "B T"],
    *,
    beta: Share = 0.5,
    confidence: bool = False,
    temperature: Temperature = 1.0,
    temperature_squared: bool = True,
) -> Float[Tensor, "B T"]:
    """beta KL(student || teacher) + (1 - beta) KL(teacher || student) in nats, times the squared temperature.

    With `confidence`, beta is the teacher's probability of the label, at temperature 1.
    """
    p, q = log_probabilities(teacher_logits, student_logits, temperature)
    share = teacher_label_logp.detach().to(p.dtype).clamp_max(0).exp() if confidence else beta
    found = share * kl_of_logs(q, p) + (1 - share) * kl_of_logs(p, q)
    return found * (temperature**2 if temperature_squared else 1)
