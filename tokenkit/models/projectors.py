"""Parts that are learnt along with a student and thrown away after: linear maps between the spaces of two models."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from tokenkit.models.view import ModelView
from tokenkit.quantities import at_least_float32, next_inputs


class HiddenProjection(nn.Module):
    """The student's hidden states, mapped to the teacher's width."""

    def __init__(self, student_width: int, teacher_width: int):
        super().__init__()
        self.to_teacher = nn.Linear(student_width, teacher_width)

    def forward(self, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T E"]:
        """One linear map, with bias."""
        return self.to_teacher(hidden)


class DualSpace(nn.Module):
    """Each model's hidden states in the other's space, position by position. Zhang+ 2024, 2406.17328 (DSKD).

    A student position looks at the teacher's positions by attention between what both read and are about to read; the
    teacher's positions look back by the same scores.
    """

    def __init__(self, student_width: int, teacher_width: int):
        super().__init__()
        self.query = nn.Linear(2 * student_width, 2 * teacher_width)
        self.to_student = nn.Linear(teacher_width, student_width)
        self.to_teacher = nn.Linear(student_width, teacher_width)

    def forward(
        self,
        student_hidden: Float[Tensor, "B T D"],
        student_embeds: Float[Tensor, "B T D"],
        student_token_mask: Bool[Tensor, "B T"],
        teacher_hidden: Float[Tensor, "B S E"],
        teacher_embeds: Float[Tensor, "B S E"],
        teacher_token_mask: Bool[Tensor, "B S"],
        deviations: Float[Tensor, "3"],
        no_later: tuple[Bool[Tensor, "B T S"], Bool[Tensor, "B S T"]] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B S E"]]:
        """The teacher's states in the student's space, and the student's in the teacher's.

        `deviations` are the standard deviations of the teacher's inputs and next inputs together, its hidden states and
        its next inputs; `no_later` says what each side may look at, besides the masks.
        """
        teacher_next = next_inputs(teacher_embeds)
        key = torch.cat([teacher_embeds, teacher_next], -1) / deviations[0]
        value = self.to_student(teacher_hidden / deviations[1] + teacher_next / deviations[2])
        query = self.query(torch.cat([student_embeds, next_inputs(student_embeds)], -1))
        scores = query @ key.transpose(1, 2) / math.sqrt(key.shape[-1])
        pairs = student_token_mask.unsqueeze(2) & teacher_token_mask.unsqueeze(1)
        there, back = pairs, pairs.transpose(1, 2)
        if no_later is not None:
            there, back = there & no_later[0], back & no_later[1]
        values_back = self.to_teacher(student_hidden)
        return _attend(scores, there, value), _attend(scores.transpose(1, 2), back, values_back)


def no_later(
    end: Int[Tensor, "B C"], length: int, other_end: Int[Tensor, "B C"], other_length: int
) -> Bool[Tensor, "B T S"]:
    """Which positions of the other side have read, and are about to read, nothing that this side has not.

    Counted in chunks of text by where they end. The other side's first position may always be looked at.
    """
    position = torch.arange(1, length + 1, device=end.device)  # what is about to be read, too
    other_position = torch.arange(1, other_length + 1, device=end.device)
    done = ((end >= 0).unsqueeze(1) & (end.unsqueeze(1) <= position.view(1, -1, 1))).sum(-1)
    exists = (other_end >= 0).unsqueeze(1)
    begun = (exists & (other_end.unsqueeze(1) < other_position.view(1, -1, 1))).sum(-1) + 1
    allowed = begun.unsqueeze(1) <= done.unsqueeze(2)
    allowed[:, :, 0] = True
    return allowed


def _attend(scores: Tensor, pairs: Tensor, values: Tensor) -> Tensor:
    """Softmax attention; a position that may look at nothing gets the plain mean, which no mask lets through."""
    scores = at_least_float32(scores)
    weights = scores.masked_fill(~pairs, torch.finfo(scores.dtype).min).softmax(-1)
    return weights.to(values.dtype) @ values


def logits_under(view: ModelView, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
    """What a model's head makes of hidden states that are not its own; the head itself learns nothing from it."""
    return view.form()(at_least_float32(linear(hidden, view.head().detach().to(hidden.dtype))))


class Projectors(nn.Module):
    """What the losses of a run have learnt along, by name; empty where they need nothing."""

    def __init__(self, wanted: set[str], student: ModelView, teacher_width: int, paired: Mapping[str, nn.Module]):
        super().__init__()
        self.paired = nn.ModuleDict(paired)
        width = student.head().shape[1]
        if "student_projected_hidden" in wanted:
            self.hidden = HiddenProjection(width, teacher_width)
        if wanted & {"dual_student_logits", "dual_teacher_logits"}:
            self.dual = DualSpace(width, teacher_width)

    def named(self) -> Mapping[str, nn.Parameter]:
        """Its parameters as they are called in checkpoints and learning-rate groups."""
        found = {f"projectors.{name}": parameter for name, parameter in self.named_parameters()}
        return {name: parameter for name, parameter in found.items() if parameter.requires_grad}

    def memory(self) -> dict[str, Tensor]:
        """What they remember without a gradient: running statistics, what a teacher was measured to be."""
        return {f"projectors.{name}": buffer for name, buffer in self.named_buffers()}

    def recall(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `memory` gave."""
        for name, buffer in self.memory().items():
            buffer.copy_(tensors[name])
