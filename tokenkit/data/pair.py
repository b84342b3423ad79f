"""What losses ask of two vocabularies: which ids mean the same, and how one side would spell the other's tokens."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int, Int64
from numpy import ndarray
from torch import Tensor

from tokenkit.align.bias import load_bias
from tokenkit.align.vocabulary import NONE, ids_in_use, load_mined, mined_map
from tokenkit.config import UserError
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer.plan import plan_transfer

log = logging.getLogger(__name__)
PROJECTION_WIDTH = 4  # pieces of a token that get a weight
PROJECTION_DECAY = 0.1  # each piece weighs a tenth of the one before


@dataclass(frozen=True)
class Pair:
    """A student's and a teacher's tokenizer, the rows of their heads, and where precomputed maps lie."""

    student: Tokenizer
    teacher: Tokenizer
    student_rows: int
    teacher_rows: int
    mined: Path | None = None
    bias: Path | None = None
    bias_threshold: float = 0.1

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tables by their names among the quantities; UserError where one of them would be empty."""
        found = {name: TABLES[name](self) for name in sorted(names)}
        for name, table in found.items():
            if not table.size:
                raise UserError(
                    f"losses: {name.replace('_', ' ')}: {self.student.name} and {self.teacher.name} have none; use a "
                    "loss that needs none, such as alm"
                )
        return {name: torch.from_numpy(np.ascontiguousarray(table)) for name, table in found.items()}

    def exact_pairs(self) -> Int64[ndarray, "P 2"]:
        """Student and teacher id of every spelling, special literal and end of text that both sides have."""
        own, other = ids_in_use(self.student), ids_in_use(self.teacher)
        pairs = [(index, other[spelling]) for spelling, index in own.items() if spelling in other]
        specials = self.teacher.special_tokens
        pairs += [(i, specials[literal]) for literal, i in self.student.special_tokens.items() if literal in specials]
        end, other_end = self.student.eos_id, self.teacher.eos_id
        if end is not None and other_end is not None and not any(i == end or j == other_end for i, j in pairs):
            pairs.append((end, other_end))
        return self._inside(np.array(sorted(pairs), np.int64).reshape(-1, 2))

    def mined_pairs(self) -> Int64[ndarray, "P 2"]:
        """Every student id and the teacher's nearest."""
        found = self.mined_ids()
        own = np.flatnonzero(found != NONE)
        return np.stack([own, found[own]], 1)

    def unbiased_pairs(self) -> Int64[ndarray, "P 2"]:
        """The exact pairs whose tokenization bias is at most the threshold on both sides."""
        if self.bias is None:
            raise UserError(
                "losses.side_path.mapping: 'unbiased' needs the bias of this pair; make it with tokenkit "
                "tokenizer-info teacher=... student=... and name its folder as data.bias"
            )
        pairs = self.exact_pairs()
        table = load_bias(self.bias, self.teacher, self.student)
        left, right = table.at(pairs[:, 1], pairs[:, 0])
        return pairs[(left <= self.bias_threshold) & (right <= self.bias_threshold)]

    def mined_ids(self) -> Int64[ndarray, "V"]:
        """The nearest teacher id of every row of the student's head, -1 where there is none."""
        found = np.full(self.student_rows, NONE, np.int64)
        ids = self._mined_map[: self.student_rows]
        found[: len(ids)] = np.where(ids < self.teacher_rows, ids, NONE)
        return found

    @cached_property
    def _mined_map(self) -> Int[ndarray, "V"]:
        if self.mined is not None:
            return load_mined(self.mined, self.teacher, self.student).teacher_id
        log.warning("looking for nearest tokens; `tokenkit mined-mapping` keeps them for data.mined")
        return mined_map(self.student, self.teacher).teacher_id

    def projection_ids(self) -> Int64[ndarray, "V K"]:
        """Teacher ids that each student token is spelled with, the first ones; -1 where there are fewer."""
        return self._projection[0]

    def projection_weights(self) -> Float32[ndarray, "V K"]:
        """What share of a student token's probability goes to each of them; rows sum to 1, or are 0."""
        return self._projection[1]

    @cached_property
    def _projection(self) -> tuple[Int64[ndarray, "V K"], Float32[ndarray, "V K"]]:
        plan = plan_transfer(self.teacher, self.student, source_rows=self.teacher_rows)
        ids = np.full((self.student_rows, PROJECTION_WIDTH), NONE, np.int64)
        known = min(len(plan), self.student_rows)
        for place in range(PROJECTION_WIDTH):
            has = np.flatnonzero(plan.lengths[:known] > place)
            ids[has, place] = plan.head_pieces[plan.offsets[has] + place]
        weights = np.where(ids == NONE, 0.0, PROJECTION_DECAY ** np.arange(PROJECTION_WIDTH))
        total = weights.sum(1, keepdims=True)
        return ids, (weights / np.where(total, total, 1)).astype(np.float32)

    def _inside(self, pairs: Int64[ndarray, "P 2"]) -> Int64[ndarray, "Q 2"]:
        return pairs[(pairs[:, 0] < self.student_rows) & (pairs[:, 1] < self.teacher_rows)]


TABLES: dict[str, Callable[[Pair], ndarray]] = {
    fn.__name__: fn
    for fn in (
        Pair.exact_pairs,
        Pair.mined_pairs,
        Pair.unbiased_pairs,
        Pair.mined_ids,
        Pair.projection_ids,
        Pair.projection_weights,
    )
}
