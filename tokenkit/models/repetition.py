"""Logits that make a text repeat itself less: a penalty on ids that stand in it, and no second n-gram of its own.

The penalty is CTRL's (Keskar+ 2019, 1909.05858): a positive logit is divided by it, a negative one multiplied. Both
look at the whole row, the prompt too, as transformers does; padding is not part of it.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


class Repetition:
    """What stands in each row of a batch, as far as the next logits are changed by it."""

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        vocab_rows: int,
        *,
        penalty: float = 1.0,
        no_repeat_ngram: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.penalty, self.length = penalty, no_repeat_ngram
        self.seen = torch.zeros(len(rows), vocab_rows, dtype=torch.bool, device=device)
        for row, ids in enumerate(rows):
            self.seen[row, torch.tensor(ids, dtype=torch.long, device=device)] = True
        self.rows: list[list[int]] = [[] for _ in rows]
        self.followers: list[dict[tuple[int, ...], set[int]]] = [defaultdict(set) for _ in rows]
        for row, ids in enumerate(rows):
            for i in ids:
                self._follow(row, i)

    def __call__(self, logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """The logits, changed, as a new tensor."""
        if self.penalty != 1:
            changed = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
            logits = torch.where(self.seen, changed, logits)
        if self.length:
            logits = logits.clone()
            for row in range(len(self.rows)):
                logits[row, self._again(row)] = -torch.inf
        return logits

    def add(self, ids: Sequence[int]) -> None:
        """One more id of every row."""
        self.seen[torch.arange(len(ids)), torch.tensor(ids, device=self.seen.device)] = True
        for row, i in enumerate(ids):
            self._follow(row, i)

    def select(self, rows: Sequence[int]) -> None:
        """Goes on with these rows, each at most once."""
        self.seen = self.seen[torch.tensor(rows, dtype=torch.long, device=self.seen.device)]
        self.rows, self.followers = [self.rows[row] for row in rows], [self.followers[row] for row in rows]

    def _follow(self, row: int, i: int) -> None:
        if self.length:
            ids = self.rows[row]
            if len(ids) >= self.length - 1:
                self.followers[row][tuple(ids[len(ids) - self.length + 1 :])].add(i)
            ids.append(i)

    def _again(self, row: int) -> list[int]:
        """The ids that would end an n-gram which the row has already."""
        ids = self.rows[row]
        if len(ids) < self.length - 1:
            return []
        return sorted(self.followers[row].get(tuple(ids[len(ids) - self.length + 1 :]), ()))
