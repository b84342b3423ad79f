"""Penalties are transformers' own, row by row and id by id."""

import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from tokenkit.models.repetition import Repetition

ROWS = 7


def logits(seed: int, rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, ROWS, generator=torch.Generator().manual_seed(seed))


def histories(length: int) -> list[list[int]]:
    return torch.randint(0, ROWS, (3, length), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("ngram", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 4, 30])
def test_as_transformers_does_it_after_every_id(penalty, ngram, length):
    rows = histories(length)
    state = Repetition(rows, ROWS, penalty=penalty, no_repeat_ngram=ngram)
    for step in range(6):
        given, ids = logits(step), torch.tensor(rows)
        wanted = RepetitionPenaltyLogitsProcessor(penalty)(ids, given.clone())
        if ngram:
            wanted = NoRepeatNGramLogitsProcessor(ngram)(ids, wanted)
        before = given.clone()
        assert torch.equal(state(given), wanted)
        assert torch.equal(given, before)
        more = [(step * 3 + row) % ROWS for row in range(3)]
        state.add(more)
        rows = [[*row, i] for row, i in zip(rows, more)]


def test_selected_rows_keep_what_they_hold():
    rows = histories(12)
    state = Repetition(rows, ROWS, penalty=1.5, no_repeat_ngram=2)
    state.add([1, 2, 3])
    state.select([2, 0])
    alone = Repetition([[*rows[2], 3], [*rows[0], 1]], ROWS, penalty=1.5, no_repeat_ngram=2)
    assert torch.equal(state(logits(0, 2)), alone(logits(0, 2)))
