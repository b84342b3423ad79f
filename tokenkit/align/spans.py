"""Two tokenisations of one text to the finest chunks that both sides spell with whole tokens. Integers only."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Int64
from numpy import ndarray

from tokenkit.tokenizers.base import Encoding


@dataclass(frozen=True, slots=True)
class Alignment:
    """Chunks shared by two tokenisations, in text order. Chunk c is `spans[c]` on both sides; -1 is in no chunk."""

    spans: Int64[ndarray, "K 4"]  # a_start, a_end, b_start, b_end: token ranges, half-open
    chunk_a: Int32[ndarray, "Ta"]
    chunk_b: Int32[ndarray, "Tb"]

    def __len__(self) -> int:
        return len(self.spans)


def align(a: Encoding, b: Encoding) -> Alignment:
    """The finest common chunks of two tokenisations of one text.

    Inside equal segments a chunk ends wherever both sides end a token at the same byte; a zero-width token belongs to
    the chunk that follows. A segment that one side spells with special tokens only is one chunk if both sides have it.
    In no chunk: what follows the last common end of a segment (a truncated tail), and segments of one side only.
    """
    stride = 1 + max(int(side.ends.max()) if len(side) else 0 for side in (a, b))
    whole = _template_segments(a, b)
    a_ends, a_keys = _chunk_ends(a, whole, stride)
    b_ends, b_keys = _chunk_ends(b, whole, stride)
    where = np.searchsorted(b_keys, a_keys)
    common = np.flatnonzero(b_keys[np.minimum(where, len(b_keys) - 1)] == a_keys) if len(b_keys) else where[:0]
    a_last, b_last = a_ends[common], b_ends[where[common]]
    a_range, b_range = _ranges(a, a_last), _ranges(b, b_last)
    return Alignment(
        np.concatenate([a_range, b_range], axis=1), _chunk_per_token(a_range, len(a)), _chunk_per_token(b_range, len(b))
    )


def _template_segments(a: Encoding, b: Encoding) -> Int32[ndarray, "S"]:
    """Segments that hold nothing but special tokens on at least one side."""
    found = [np.zeros(0, np.int32)]
    for side in (a, b):
        if side.special.any():
            specials = side.segment[side.special]
            found.append(np.setdiff1d(specials, side.segment[~side.special]))
    return np.concatenate(found) if len(found) > 1 else found[0]


def _chunk_ends(
    side: Encoding, whole: Int32[ndarray, "S"], stride: int
) -> tuple[Int64[ndarray, "E"], Int64[ndarray, "E"]]:
    """Tokens at which a chunk may end, and (segment, byte end) of each as one increasing key."""
    candidate = side.ends > side.starts
    within = side.ends
    if len(whole):
        template: Bool[ndarray, "T"] = np.isin(side.segment, whole)
        closes = np.append(side.segment[1:] != side.segment[:-1], True) if len(side) else template
        candidate = np.where(template, closes, candidate)
        within = np.where(template, stride - 1, within)
    tokens = np.flatnonzero(candidate)
    return tokens, side.segment[tokens].astype(np.int64) * stride + within[tokens]


def _ranges(side: Encoding, last: Int64[ndarray, "K"]) -> Int64[ndarray, "K 2"]:
    """Half-open token ranges of chunks that end with the given tokens and begin after the chunk before, or segment."""
    ranges = np.zeros((len(last), 2), np.int64)
    ranges[:, 1] = last + 1
    ranges[1:, 0] = ranges[:-1, 1]
    if len(side) and side.segment[0] != side.segment[-1]:
        ranges[:, 0] = np.maximum(ranges[:, 0], np.searchsorted(side.segment, side.segment[last]))
    return ranges


def _chunk_per_token(ranges: Int64[ndarray, "K 2"], num_tokens: int) -> Int32[ndarray, "T"]:
    """The chunk of every token: the ranges and the gaps before, between and after them, each repeated to its length."""
    borders = np.concatenate([[0], ranges.ravel(), [num_tokens]])
    value = np.full(len(borders) - 1, -1, np.int32)
    value[1::2] = np.arange(len(ranges), dtype=np.int32)
    return np.repeat(value, borders[1:] - borders[:-1])
