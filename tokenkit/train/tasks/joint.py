"""A language model that also says the strings of its tokens again from their rows: LM + λ · reconstruction."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenkit.data.batch import Batch, Batches
from tokenkit.models.load import input_matrix
from tokenkit.models.speller import Speller, drawn_ids
from tokenkit.train.tasks.distill import TextTask

SPELLED = "spelled_ids"


class JointTask(TextTask):
    """Text in, named tensors out, and the bytes of some of its tokens."""

    def __init__(self, *args: Any, speller: Speller, **options: Any) -> None:
        super().__init__(*args, **options)
        self.speller = speller

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are learnt, by name: the model's, and those that read strings off its rows."""
        return {**super().trainable(), **{f"speller.{name}": p for name, p in self.speller.learnt().items()}}

    def modules(self) -> list[nn.Module]:
        """The model, and what reads strings off its rows."""
        return [*super().modules(), self.speller]

    def _asked(self, batch: Batch, teacher: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Also the logits of the strings of some of the model's tokens."""
        found = super()._asked(batch, teacher, means)
        rows = input_matrix(self.student.model)[batch.tensors[SPELLED]]
        with self._autocast():
            return found | {"student_byte_logits": self.speller(rows)}


class JointBatches(Batches):
    """Microbatches, and with each some of the step's distinct tokens: the same ones however the step is cut."""

    def __init__(self, *args: Any, speller: Speller, num_tokens: int, **options: Any) -> None:
        """`num_tokens` are the tokens of a step at most."""
        super().__init__(*args, **options)
        self.speller, self.num_tokens = speller, num_tokens

    def at(self, step: int, num_microbatches: int = 1, rank: int = 0, ranks: int = 1) -> list[Batch]:
        """The microbatches of a step, together always the same rows and tokens."""
        batches = super().at(step, num_microbatches * ranks)  # the tokens are drawn from the whole step
        seen = [batch.tensors["student_inputs"].numpy() for batch in batches]
        ids = drawn_ids(seen, self.speller, self.num_tokens, [self.seed, step])
        parts = np.array_split(ids, len(batches))
        return [self._with(batch, part) for batch, part in zip(batches, parts)][rank::ranks]

    def _with(self, batch: Batch, ids: np.ndarray) -> Batch:
        spelled = {SPELLED: torch.from_numpy(ids), "student_byte_labels": self.speller.labels(ids)}
        return replace(batch, tensors={**batch.tensors, **spelled})
