"""Next-token cross-entropy of the student on its own tokens: causal language modelling."""

from jaxtyping import Float
from torch import Tensor

from tokenkit.losses import loss


@loss(per="token")
def clm(student_label_logp: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Negative log-probability of each label, in nats."""
    return -student_label_logp
