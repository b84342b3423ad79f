"""Units of a loss made of neighbouring chunks: every chunk by itself, whole words, or up to an end both sides trust.

What is decided here is known before a model has read the text. Merging by boundary probability, an option of the loss,
comes after it and only joins further.
"""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from tokenkit.align.bias import PairBias
from tokenkit.align.boundary import space_tokens
from tokenkit.align.spans import Alignment, renumber
from tokenkit.config import UserError
from tokenkit.tokenizers.base import Encoding, Tokenizer

ModeName = Literal["unconstrained", "space", "unbiased"]
Mode = Callable[[Encoding, Encoding, Alignment], Alignment]
MODES: tuple[ModeName, ...] = get_args(ModeName)


def chunk_mode(
    name: str, teacher: Tokenizer, student: Tokenizer, bias: PairBias | None = None, threshold: float = 0.1
) -> Mode:
    """The function (teacher encoding, student encoding, their alignment) -> coarser alignment of that name.

    `unconstrained`: every chunk. `space`: a chunk ends where the next token of both sides begins with a space.
    `unbiased`: it ends where the tokens that close it have bias of at most `threshold` on both sides, or an id beyond
    the table. In all three it also ends with a special token.
    """
    if name == "unconstrained":
        return lambda a, b, alignment: alignment
    if name == "space":
        spaces = space_tokens(teacher), space_tokens(student)
        return lambda a, b, found: merge_chunks(found, closed_by_space(a, b, found, *spaces))
    if name != "unbiased":
        raise UserError(f"chunks: {name!r} is no alignment mode; write one of {', '.join(MODES)}")
    if bias is None:
        raise UserError(
            "chunks: 'unbiased' needs the bias of this pair; make it with tokenkit tokenizer-info and name its folder"
        )
    if not 0 <= threshold <= 1:
        raise UserError(f"bias threshold: {threshold} is no probability; write a number from 0 to 1, such as 0.1")
    return lambda a, b, found: merge_chunks(found, closed_by_bias(a, b, found, bias, threshold))


def merge_chunks(alignment: Alignment, closes: Bool[ndarray, "K"]) -> Alignment:
    """One chunk for every run of chunks up to one that closes. It never spans tokens that are in no chunk."""
    spans = alignment.spans
    if not len(spans):
        return alignment
    apart = (spans[1:, [0, 2]] != spans[:-1, [1, 3]]).any(axis=1)
    begins = np.append(True, closes[:-1] | apart)
    firsts = np.flatnonzero(begins)
    lasts = np.append(firsts[1:], len(spans)) - 1
    merged = np.stack([spans[firsts, 0], spans[lasts, 1], spans[firsts, 2], spans[lasts, 3]], axis=1)
    return renumber(alignment, merged, np.cumsum(begins) - 1)


def closed_by_space(
    a: Encoding, b: Encoding, alignment: Alignment, spaces_a: Bool[ndarray, "Va"], spaces_b: Bool[ndarray, "Vb"]
) -> Bool[ndarray, "K"]:
    """Chunks after which both sides go on with a token of the given sets, and chunks that end in a special token."""
    _, a_end, _, b_end = alignment.spans.T
    follows = np.append(spaces_a[a.ids], False)[a_end] & np.append(spaces_b[b.ids], False)[b_end]
    return follows | _ends_in_special(a, b, alignment)


def closed_by_bias(
    a: Encoding, b: Encoding, alignment: Alignment, bias: PairBias, threshold: float
) -> Bool[ndarray, "K"]:
    """Chunks whose last tokens have at most that bias on both sides or stand beyond the table, or are special."""
    last_a, last_b = a.ids[alignment.spans[:, 1] - 1], b.ids[alignment.spans[:, 3] - 1]
    listed = (last_a < bias.shape[0]) & (last_b < bias.shape[1])
    teacher_bias, student_bias = bias.at(last_a[listed], last_b[listed])
    closes = ~listed
    closes[listed] = (teacher_bias <= threshold) & (student_bias <= threshold)
    return closes | _ends_in_special(a, b, alignment)


def _ends_in_special(a: Encoding, b: Encoding, alignment: Alignment) -> Bool[ndarray, "K"]:
    return a.special[alignment.spans[:, 1] - 1] | b.special[alignment.spans[:, 3] - 1]
