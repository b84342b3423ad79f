"""Places in held-out text, and what a model thinks there: the hidden states that its output rows are read with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy import ndarray
from torch import Tensor

from tokenkit.align.doctor_schemes import encodings
from tokenkit.config import UserError
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.base import Tokenizer

BATCH_TOKENS = 8192


@dataclass(frozen=True, eq=False)
class Contexts:
    """Windows of a text as ids, and the places in them that are looked at."""

    windows: tuple[Int64[ndarray, "_"], ...]
    window: Int64[ndarray, "N"]
    """Which window each place is in."""
    place: Int64[ndarray, "N"]
    """Where in it: the logits there predict the id that follows."""
    labels: Int64[ndarray, "N"]
    """The ids that follow."""
    met: Bool[ndarray, "V"]
    """Ids that stand anywhere in the text."""
    left_out: int
    """Windows with ids that the model has no row for."""

    def __len__(self) -> int:
        return len(self.labels)


def find_contexts(
    tokenizer: Tokenizer, documents: Sequence[str], rows: int, *, count: int = 2048, length: int = 256
) -> Contexts:
    """`count` places spread evenly over documents that are cut into windows of at most `length` ids.

    Every window begins as documents do, where the tokenizer has a token for that.
    """
    windows, met, left_out = [], np.zeros(rows, bool), 0
    for ids in _windows(tokenizer, documents, length):
        if ids.max() >= rows:
            left_out += 1
            continue
        met[ids[1:]] = True
        windows.append(ids)
    sizes = np.array([len(ids) - 1 for ids in windows], np.int64)
    total = int(sizes.sum())
    if total == 0:
        raise UserError("text: no two tokens in a row that the model has rows for; take a longer text")
    chosen = np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64))
    ends = np.cumsum(sizes)
    window = np.searchsorted(ends, chosen, side="right")
    place = chosen - (ends - sizes)[window]
    labels = np.array([windows[w][p + 1] for w, p in zip(window, place)], np.int64)
    return Contexts(tuple(windows), window, place, labels, met, left_out)


def _windows(tokenizer: Tokenizer, documents: Sequence[str], length: int) -> Iterator[Int64[ndarray, "T"]]:
    begins = tokenizer.bos_id is not None or tokenizer.eos_id is not None
    start = [tokenizer.start_id()] if begins else []
    step = length - len(start)
    for encoding in encodings(tokenizer, documents):
        ids = [] if encoding is None else encoding.ids.tolist()
        for begin in range(0, len(ids), step):
            row = np.array(start + ids[begin : begin + step], np.int64)
            if len(row) > 1:
                yield row


@torch.no_grad()
def hidden_at(view: ModelView, contexts: Contexts) -> Float[Tensor, "N D"]:
    """The last hidden state at every place."""
    found: list[Tensor] = [torch.empty(0)] * len(contexts)
    wanted: dict[int, list[int]] = {}
    for number, window in enumerate(contexts.window.tolist()):
        wanted.setdefault(window, []).append(number)
    order = sorted(wanted, key=lambda window: len(contexts.windows[window]))
    for batch in _batches(order, [len(contexts.windows[window]) for window in order]):
        longest = max(len(contexts.windows[window]) for window in batch)
        inputs = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, window in enumerate(batch):
            inputs[row, : len(contexts.windows[window])] = torch.from_numpy(contexts.windows[window])
        states = view.hidden(inputs.to(view.model.device))
        for row, window in enumerate(batch):
            for number in wanted[window]:
                found[number] = states[row, int(contexts.place[number])].float()
    return torch.stack(found)


def _batches(order: list[int], lengths: list[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    for one, length in zip(order, lengths):  # shortest first: the one at hand is the longest
        if batch and length * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch
