"""Two tokenizers on the same text: how many tokens each needs, and how much of the running text they share."""

from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from itertools import islice

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from tokenkit.align.doctor_schemes import encodings, unknowns
from tokenkit.align.spans import align
from tokenkit.tokenizers.base import Encoding, Tokenizer

DOCUMENTS_AT_ONCE = 64
NUM_SUMS = 10  # numbers of a Measured


@dataclass(frozen=True, slots=True)
class Measured:
    """Tokens of source and target on one text or corpus; what either refuses is counted and left out."""

    text: str
    bytes: int
    source_tokens: int
    target_tokens: int
    target_known: int  # target tokens of the running text that the source has with the same bytes
    chunks: int  # pieces that both cut at both ends
    single: int  # of these, how many are one token on both sides
    source_unknown: int  # tokens that stand for characters which the vocabulary cannot spell
    target_unknown: int
    source_refused: int  # documents
    target_refused: int

    @property
    def whole(self) -> bool:
        """Whether something was measured, and both could spell all of it."""
        return self.bytes > 0 and self.source_unknown == self.target_unknown == 0

    @property
    def ratio(self) -> float:
        """Target tokens per source token; 1 where nothing was measured."""
        return self.target_tokens / self.source_tokens if self.source_tokens else 1.0

    @property
    def known_share(self) -> float:
        """Share of the target's tokens in running text that the source has; 1 where nothing was measured."""
        return self.target_known / self.target_tokens if self.target_tokens else 1.0


def known_tokens(source: Tokenizer, target: Tokenizer) -> Bool[ndarray, "V"]:
    """True for ids of the target whose bytes the source has as a token."""
    had = set(source.token_bytes) - {b""}
    return np.fromiter((spelling in had for spelling in target.token_bytes), np.bool_, target.vocab_size)


def measure(
    source: Tokenizer, target: Tokenizer, known: Bool[ndarray, "V"], text: str, documents: Iterable[str]
) -> Measured:
    """The sums over documents; `text` says what they are, `known` which target tokens the source has."""
    totals = np.zeros(NUM_SUMS, np.int64)
    for batch in _batches(documents):
        for document, a, b in zip(batch, encodings(source, batch), encodings(target, batch)):
            if a is None or b is None:
                totals[8:] += a is None, b is None
            else:
                lost = unknowns(source, a), unknowns(target, b)
                totals[:8] += len(document.encode()), len(a), len(b), known[b.ids].sum(), *_chunks(a, b), *lost
    return Measured(text, *totals.tolist())


def total(text: str, parts: list[Measured]) -> Measured:
    """The sum of several measurements."""
    totals = np.array([astuple(part)[1:] for part in parts], np.int64).reshape(-1, NUM_SUMS).sum(0)
    return Measured(text, *totals.tolist())


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(documents)
    while batch := list(islice(rest, DOCUMENTS_AT_ONCE)):
        yield batch


def _chunks(a: Encoding, b: Encoding) -> tuple[int, int]:
    """How many chunks, and how many of them are one token on both sides."""
    spans = align(a, b).spans
    widths = spans[:, 1::2] - spans[:, ::2]
    return len(spans), int((widths == 1).all(1).sum())
