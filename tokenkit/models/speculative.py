"""A small draft model guesses some tokens, the model checks them in one pass (Leviathan+ 2023, 2211.17192).

A guess stands if it is the id that the model itself draws there. Draws are races whose random numbers belong to
(seed, sequence, token, id), so draft and model race with the same numbers: the likelier both find an id, the likelier
both draw it (Daliri+ 2024, 2408.07978), and what is written is, id for id, what the model writes alone, greedy or
sampled, under every penalty and filter. The first paper's rule keeps only the distribution; where it takes a share a
of the guesses, the races agree in a / (2 - a) of them or more.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from tokenkit.models.reader import Reader
from tokenkit.models.sample import Drawing, Enough, draw, said_of


@dataclass(frozen=True)
class Draft:
    """A model over the same vocabulary, and how many tokens it guesses at a time."""

    model: PreTrainedModel
    tokens: int = 4


@dataclass
class Tally:
    """What drafting has brought so far."""

    calls: int = 0
    """Passes of the model, reading the prompts included."""
    checked: int = 0
    """Guesses up to the first wrong one of each pass, that one among them."""
    accepted: int = 0
    written: int = 0
    """New tokens."""

    @property
    def acceptance(self) -> float:
        """How probable it is that a guess stands whose predecessors stood."""
        return self.accepted / max(1, self.checked)

    @property
    def tokens_per_call(self) -> float:
        """New tokens for each pass of the model; 1 without a draft."""
        return self.written / max(1, self.calls)


def speculated(
    model: PreTrainedModel,
    draft: Draft,
    prompts: Sequence[Sequence[int]],
    drawings: tuple[Drawing, Drawing],
    keys: Sequence[int],
    *,
    limits: Sequence[int],
    enough: Enough,
    scored: bool,
    tally: Tally,
) -> Iterator[tuple[int, int, float]]:
    """As `sample.drawn`, one prompt after the other; `drawings` are how the model draws and how the draft does."""
    modes = [(each, each.training) for each in (model, draft.model)]
    for each, _ in modes:
        each.eval()
    try:
        for place, prompt in enumerate(prompts):
            if limits[place] > 0:
                one = _One(model, draft, list(prompt), drawings, keys[place], tally)
                for i, said in one.ids(limits[place], scored=scored):
                    over = enough(place, i) or i in drawings[0].stop_ids
                    yield place, i, said
                    if over:
                        break
    finally:
        for each, training in modes:
            each.train(training)


class _One:
    """One row that is being written."""

    def __init__(
        self,
        model: PreTrainedModel,
        draft: Draft,
        row: list[int],
        drawings: tuple[Drawing, Drawing],
        key: int,
        tally: Tally,
    ) -> None:
        self.target, self.guesser, self.row, self.tally = Reader(model), Reader(draft.model), row, tally
        self.own, self.guessed, self.tokens = *drawings, draft.tokens
        self.device, self.key = model.device, torch.tensor([key], device=model.device)

    def ids(self, limit: int, *, scored: bool) -> Iterator[tuple[int, float]]:
        """New ids, and their log-probabilities, up to the limit."""
        n = 0
        while n < limit:
            found, guesses = self._pass(n, min(self.tokens, limit - n - 1), scored=scored)
            self.tally.calls += 1
            for step, (i, said) in enumerate(found):
                self.tally.checked += step < len(guesses)
                self.tally.accepted += step < len(guesses) and i == guesses[step]
                self.tally.written += 1
                yield i, said
            n += len(found)

    @torch.inference_mode()
    def _pass(self, n: int, count: int, *, scored: bool) -> tuple[list[tuple[int, float]], list[int]]:
        """What one pass of the model says, up to the first guess that it does not say; and all `count` guesses."""
        guesses = self._guesses(n, count)
        unread = [*self.row[self.target.length :], *guesses]
        logits = self.target.all(torch.tensor([unread], device=self.device), last=count + 1)[0]
        found: list[tuple[int, float]] = []
        for step in range(count + 1):
            one = logits[step : step + 1]
            chosen = self._draw(one, n + step, self.row, self.own)
            (said,), i = said_of(one, chosen, scored=scored, n=n + step), int(chosen)
            self.row.append(i)
            found.append((i, said))
            if step < count and i != guesses[step]:
                break
        for reader in (self.target, self.guesser):
            reader.crop(len(self.row) - 1)
        return found, guesses

    def _guesses(self, n: int, count: int) -> list[int]:
        row = list(self.row)
        for step in range(count):
            logits = self.guesser(torch.tensor([row[self.guesser.length :]], device=self.device))
            row.append(int(self._draw(logits, n + step, row, self.guessed)))
        return row[len(self.row) :]

    def _draw(self, logits: torch.Tensor, n: int, row: list[int], drawing: Drawing) -> torch.Tensor:
        repetition = drawing.repetition([row], logits.shape[1], self.device)
        return draw(logits if repetition is None else repetition(logits), self.key, n, drawing)
