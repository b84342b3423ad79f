"""The order of the teacher's best tokens, whatever their probabilities. Burges+ 2005 (RankNet); hinge: Joachims 2002.

One vocabulary. Every two of the best tokens that the teacher does not hold equal are compared.
"""

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from tokenkit.losses import loss
from tokenkit.losses.divergences import Temperature
from tokenkit.quantities import at_least_float32


@loss(per="token")
def ranking(
    student_logits: Float[Tensor, "B T V"],
    teacher_logits: Float[Tensor, "B T V"],
    *,
    kind: Literal["pairwise", "hinge"] = "pairwise",
    best: Annotated[int, Field(ge=2)] = 8,
    margin: float = 1.0,
    temperature: Temperature = 1.0,
) -> Float[Tensor, "B T"]:
    """Mean over pairs of the teacher's `best` tokens of what the student's lead d of the better one is penalised with.

    `pairwise`: log(1 + exp(-d / temperature)), in nats; `hinge`: max(0, margin - d), in logits.
    """
    teacher, ids = at_least_float32(teacher_logits).topk(min(best, teacher_logits.shape[-1]), -1)
    student = at_least_float32(student_logits).gather(-1, ids)
    possible = (teacher > -torch.inf) & (student > -torch.inf)
    student = torch.where(possible, student, 0)
    compared = (teacher.unsqueeze(-1) > teacher.unsqueeze(-2)) & possible.unsqueeze(-1) & possible.unsqueeze(-2)
    lead = student.unsqueeze(-1) - student.unsqueeze(-2)
    penalty = functional.softplus(-lead / temperature) if kind == "pairwise" else functional.relu(margin - lead)
    return torch.where(compared, penalty, 0).sum((-2, -1)) / compared.sum((-2, -1)).clamp_min(1)
