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


def renumber(alignment: Alignment, spans: Int64[ndarray, "M 4"], number: Int64[ndarray, "K"]) -> Alignment:
    """The alignment with other chunks: `number` is the new chunk of every old one, -1 for none."""
    table = np.append(number, -1).astype(np.int32)  # its last entry answers for -1
    return Alignment(spans, table[alignment.chunk_a], table[alignment.chunk_b])


def keep_chunks(alignment: Alignment, kept: Bool[ndarray, "K"]) -> Alignment:
    """Only the kept chunks, numbered anew; the tokens of the others are in no chunk."""
    return renumber(alignment, alignment.spans[kept], np.where(kept, np.cumsum(kept) - 1, -1))


def trained_chunks(
    alignment: Alignment, trained_a: Bool[ndarray, "Ta"], trained_b: Bool[ndarray, "Tb"]
) -> Bool[ndarray, "K"]:
    """Chunks of which every token is trained on both sides, so that both sides score the same bytes."""
    a_start, a_end, b_start, b_end = alignment.spans.T
    out_a, out_b = (np.append(0, np.cumsum(~trained)) for trained in (trained_a, trained_b))
    return (out_a[a_end] == out_a[a_start]) & (out_b[b_end] == out_b[b_start])


def mask_tokens(encoding: Encoding, trained: Int64[ndarray, "N 3"]) -> Bool[ndarray, "T"]:
    """True for tokens all of whose bytes are trained. Rows of `trained` are (segment, first byte, end), half-open.

    A token that straddles the border is out, on the side of either tokenizer that has one there. A zero-width token of
    a text goes with the byte that follows it; a special token is in if any row, an empty one too, names its segment.
    """
    stride = 1 + max(int(encoding.ends.max(initial=0)), int(trained[:, 2].max(initial=0)))
    rows = trained[np.lexsort((trained[:, 1], trained[:, 0]))]
    firsts, reach = rows[:, 0] * stride + rows[:, 1], np.maximum.accumulate(rows[:, 0] * stride + rows[:, 2])
    begins = np.flatnonzero(np.append(True, firsts[1:] > reach[:-1])[: len(rows)])  # rows that touch make one span
    lasts = np.append(begins[1:], len(rows))[: len(begins)] - 1
    start, end = (encoding.segment.astype(np.int64) * stride + side for side in (encoding.starts, encoding.ends))
    span = np.searchsorted(firsts[begins], start, side="right")
    until = np.append(-1, reach[lasts])[span]
    inside = (end <= until) & (start < until)
    return np.where(encoding.special, np.isin(encoding.segment, trained[:, 0]), inside)


def truncate(a: Encoding, b: Encoding, max_a: int, max_b: int) -> tuple[Encoding, Encoding]:
    """Both sides cut at the last common place (segment, byte) up to which both fit; tails beyond the last one go too.

    Such places are the ends of chunks and, while both sides have all of every segment so far, the ends of segments,
    also of those that one side lacks.
    """
    alignment = align(a, b)
    whole = _common_segment_ends(a, b, alignment)
    places = np.concatenate([np.zeros((1, 2), np.int64), alignment.spans[:, [1, 3]], whole])
    fitting = places[(places[:, 0] <= max_a) & (places[:, 1] <= max_b)]
    end_a, end_b = fitting[fitting.sum(axis=1).argmax()].tolist()  # places never cross, so the farthest is one
    return _first(a, end_a), _first(b, end_b)


def _common_segment_ends(a: Encoding, b: Encoding, alignment: Alignment) -> Int64[ndarray, "S 2"]:
    """Numbers of tokens up to the ends of segments, as long as no shared segment lacks its end on one side."""
    segments = np.union1d(a.segment, b.segment)
    sides = ((a, alignment.chunk_a), (b, alignment.chunk_b))
    ends = np.stack([np.searchsorted(side.segment, segments, side="right") for side, _ in sides], axis=1)
    shared = np.isin(segments, a.segment) & np.isin(segments, b.segment)
    ended = np.ones(len(segments), np.bool_)
    for (_, chunk), end in zip(sides, ends.T):
        ended &= np.append(chunk, -1)[end - 1] >= 0
    return ends[np.logical_and.accumulate(ended | ~shared)]


def _first(encoding: Encoding, count: int) -> Encoding:
    columns = (encoding.ids, encoding.starts, encoding.ends, encoding.special, encoding.segment)
    return Encoding(*(column[:count] for column in columns))


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
    number, lengths = np.arange(len(ranges), dtype=np.int32), ranges[:, 1] - ranges[:, 0]
    if lengths.sum() == num_tokens:  # no gaps
        return np.repeat(number, lengths)
    borders = np.concatenate([[0], ranges.ravel(), [num_tokens]])
    value = np.full(len(borders) - 1, -1, np.int32)
    value[1::2] = number
    return np.repeat(value, borders[1:] - borders[:-1])
