"""Text in, named tensors out: a student reads its tokens, and a teacher reads the same text in its own."""

from contextlib import AbstractContextManager
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from tokenkit.align.boundary import boundary_tokens
from tokenkit.config import UserError
from tokenkit.data.batch import Batch
from tokenkit.models.view import ModelView
from tokenkit.objective import Objective
from tokenkit.tokenizers.base import Tokenizer


class TextTask:
    """A language model trained on text, alone or under a teacher."""

    def __init__(
        self,
        objective: Objective,
        student: ModelView,
        student_tokenizer: Tokenizer,
        teacher: ModelView | None = None,
        teacher_tokenizer: Tokenizer | None = None,
        *,
        precision: Literal["float32", "bfloat16"] = "float32",
    ):
        self.objective, self.student, self.teacher = objective, student, teacher
        self.device = student.model.device
        self.precision = precision
        self._boundary = {"student": boundary_mask(student, student_tokenizer)}
        self._eos = {"student": eos_mask(student, student_tokenizer)}
        if teacher is not None and teacher_tokenizer is not None:
            self._boundary["teacher"] = boundary_mask(teacher, teacher_tokenizer)
            self._eos["teacher"] = eos_mask(teacher, teacher_tokenizer)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are learnt, by name; a tied one once."""
        return {name: p for name, p in self.student.model.named_parameters() if p.requires_grad}

    def train_mode(self, on: bool) -> None:
        """Dropout on or off in the student; a teacher that shares its body runs without in any case."""
        self.student.model.train(on)

    def teacher_tensors(self, batch: Batch) -> dict[str, Tensor]:
        """What the losses ask of the teacher, without gradients."""
        needs = self.objective.needs("teacher")
        if self.teacher is None or not needs:
            return {}
        training = self.teacher.model.training
        self.teacher.model.eval()
        with torch.no_grad(), self._autocast():
            found = self._leaves(self.teacher, "teacher", needs, batch)
        self.teacher.model.train(training)
        return found

    def student_tensors(self, batch: Batch) -> dict[str, Tensor]:
        """What the losses ask of the student."""
        with self._autocast():
            return self._leaves(self.student, "student", self.objective.needs("student"), batch)

    def _leaves(self, view: ModelView, side: str, needs: set[str], batch: Batch) -> dict[str, Tensor]:
        inputs, labels = batch.tensors[f"{side}_inputs"], batch.tensors[f"{side}_labels"]
        if "eos_logp" in needs and not self._eos[side].any():
            raise UserError(
                f"losses.alm.boundary: the {side}'s tokenizer has no end-of-text token; write boundary=space"
            )
        leaves = view.leaves(needs, inputs, labels, self._boundary[side], self._eos[side])
        return {f"{side}_{name}": tensor for name, tensor in leaves.items()}

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")


def eos_mask(view: ModelView, tokenizer: Tokenizer) -> Bool[Tensor, "V"]:
    """The row of a model's head that is its tokenizer's end of text; none where it has no such token."""
    mask = torch.zeros(view.vocab_rows, dtype=torch.bool)
    if tokenizer.eos_id is not None:
        mask[tokenizer.eos_id] = True
    return mask.to(view.model.device)


def boundary_mask(view: ModelView, tokenizer: Tokenizer) -> Bool[Tensor, "V"]:
    """Which rows of a model's head are boundary tokens of its tokenizer; rows beyond the tokenizer are not."""
    mask = torch.zeros(view.vocab_rows, dtype=torch.bool)
    mask[: tokenizer.vocab_size] = torch.from_numpy(boundary_tokens(tokenizer))[: view.vocab_rows]
    return mask.to(view.model.device)
