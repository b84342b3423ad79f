"""Alignment against hand-made vectors, a slow obvious reference, and its laws."""

import copy
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.align.spans import align
from tokenkit.tokenizers.base import Encoding


def encoding(*segments: tuple[int, str, bool]) -> Encoding:
    """Segments of (number, tokens separated by |, template or text). A leading _ is a dummy space: zero bytes."""
    starts, ends, special, number = [], [], [], []
    for segment, tokens, template in segments:
        at = 0
        for token in tokens.split("|"):
            width = 0 if template else len(token.removeprefix("_").encode("latin-1"))
            starts.append(at)
            at += width
            ends.append(at)
            special.append(template)
            number.append(segment)
    ids = np.arange(len(starts), dtype=np.int32)
    return Encoding(
        ids, np.array(starts, np.int64), np.array(ends, np.int64), np.array(special, bool), np.array(number, np.int32)
    )


def template(segment: int, tokens: str) -> tuple[int, str, bool]:
    return (segment, tokens, True)


def text(segment: int, tokens: str) -> tuple[int, str, bool]:
    return (segment, tokens, False)


LLAMA3_HEADER = [template(0, "bot"), template(1, "shi"), template(2, "user"), template(3, "ehi|nn")]
# teacher, student, chunks as (a_start, a_end, b_start, b_end)
VECTORS = {
    "A1 bos unpaired, headers paired": (
        [*LLAMA3_HEADER, text(4, "hi"), template(5, "eot_id")],
        [template(1, "im_start"), template(2, "user"), template(3, "n"), text(4, "hi"), template(5, "im_end|n")],
        [(1, 2, 0, 1), (2, 3, 1, 2), (3, 5, 2, 3), (5, 6, 3, 4), (6, 7, 4, 6)],
    ),
    "A2 characters split differently": (
        [template(1, "im_start"), template(2, "user"), template(3, "n"), text(4, "Ã|©t|Ã©|!"), template(5, "im_end|n")],
        [*LLAMA3_HEADER, text(4, "Ã©|tÃ|©!"), template(5, "eot_id")],
        [(0, 1, 1, 2), (1, 2, 2, 3), (2, 3, 3, 5), (3, 7, 5, 8), (7, 9, 8, 9)],
    ),
    "A3 dummy prefix on one side": (
        [template(0, "bot"), text(1, "The| cat| sat")],
        [template(0, "bos"), text(1, "_The| cat| sa|t")],
        [(0, 1, 0, 1), (1, 2, 1, 2), (2, 3, 2, 3), (3, 4, 3, 5)],
    ),
    "A4 unequal tails": ([text(1, "a|b|c")], [text(1, "ab|cd")], [(0, 2, 0, 1)]),
    "A5 newline in text": (
        [text(1, "a|\n|b|c|d|e")],
        [text(1, "a|\n|b|c|d|e")],
        [(i, i + 1, i, i + 1) for i in range(6)],
    ),
    "A6 role words in text": (
        [text(1, "super|user|s| here| and")],
        [text(1, "superusers| here| and")],
        [(0, 3, 0, 1), (3, 4, 1, 2), (4, 5, 2, 3)],
    ),
    "A7 dummy prefix, newline": (
        [template(0, "bos"), text(1, "Hi|\n|there| you")],
        [template(0, "s"), text(1, "_Hi|\n|there| you")],
        [(i, i + 1, i, i + 1) for i in range(5)],
    ),
    "A8 template newline and content newline": (
        [template(1, "bos|sot"), template(2, "user"), template(3, "n"), text(4, "hi|\n|ok"), template(5, "eot|n")],
        [template(1, "im_start"), template(2, "user"), template(3, "n"), text(4, "hi|\n|ok"), template(5, "im_end|n")],
        [(0, 2, 0, 1), (2, 3, 1, 2), (3, 4, 2, 3), (4, 5, 3, 4), (5, 6, 4, 5), (6, 7, 5, 6), (7, 9, 6, 8)],
    ),
    "A9 header on one side": (
        [template(2, "<user>"), template(3, "n"), text(4, "hi"), template(5, "end|n")],
        [template(1, "im_start"), template(2, "user"), template(3, "n"), text(4, "hi"), template(5, "im_end|n")],
        [(0, 1, 1, 2), (1, 2, 2, 3), (2, 3, 3, 4), (3, 5, 4, 6)],
    ),
    "A10 one literal in two roles": (
        [template(0, "endoftext"), text(1, "x"), template(2, "endoftext")],
        [template(0, "bos"), text(1, "x"), template(2, "eos")],
        [(0, 1, 0, 1), (1, 2, 1, 2), (2, 3, 2, 3)],
    ),
    "A11 cut inside a character": (
        [template(0, "bos"), text(1, "ab|Ã©|Ã©")],
        [template(0, "bos"), text(1, "a|b|Ã©|Ã")],
        [(0, 1, 0, 1), (1, 2, 1, 3), (2, 3, 3, 4)],
    ),
    "role written as text on one side": (
        [template(2, "<user>"), text(4, "hi")],
        [text(2, "us|er"), text(4, "hi")],
        [(0, 1, 0, 2), (1, 2, 2, 3)],
    ),
    "a lone dummy token joins what follows": ([text(1, "_|Hi")], [text(1, "Hi")], [(0, 2, 0, 1)]),
}


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("swapped", [False, True])
def test_vector(name, swapped):
    left, right, wanted = VECTORS[name]
    a, b = encoding(*left), encoding(*right)
    if swapped:
        a, b, wanted = b, a, [(b_start, b_end, a_start, a_end) for a_start, a_end, b_start, b_end in wanted]
    before = copy.deepcopy((a, b))
    alignment = align(a, b)
    assert [tuple(row) for row in alignment.spans.tolist()] == wanted
    for now, then in zip((a, b), before):
        assert all(np.array_equal(getattr(now, field), getattr(then, field)) for field in Encoding.__slots__)


def reference(a: Encoding, b: Encoding) -> tuple[list[tuple[int, int, int, int]], list[int], list[int]]:
    """Token by token with sets, segment by segment."""
    spans, chunk_a, chunk_b = [], [-1] * len(a), [-1] * len(b)
    for segment in sorted({*a.segment.tolist()} & {*b.segment.tolist()}):
        sides = [[t for t in range(len(side)) if side.segment[t] == segment] for side in (a, b)]
        if any(all(side.special[t] for t in tokens) for side, tokens in zip((a, b), sides)):
            cuts = [[tokens[-1]] for tokens in sides]
        else:
            ends = [{int(s.ends[t]): t for t in tokens if s.ends[t] > s.starts[t]} for s, tokens in zip((a, b), sides)]
            common = sorted({*ends[0]} & {*ends[1]})
            cuts = [[one[end] for end in common] for one in ends]
        first = [tokens[0] for tokens in sides]
        for last_a, last_b in zip(*cuts):
            for chunk, begin, last in ((chunk_a, first[0], last_a), (chunk_b, first[1], last_b)):
                chunk[begin : last + 1] = [len(spans)] * (last + 1 - begin)
            spans.append((first[0], last_a + 1, first[1], last_b + 1))
            first = [last_a + 1, last_b + 1]
    return spans, chunk_a, chunk_b


@st.composite
def encodings(draw: st.DrawFn, numbers: list[int], lengths: list[int]) -> Encoding:
    """A random side: some segments missing, some template, random cuts, dummy tokens, a tail sometimes cut off."""
    parts = []
    for number, length in zip(numbers, lengths):
        kind = draw(st.sampled_from(["absent", "template", "text", "text", "text"]))
        if kind == "template":
            parts.append(template(number, "|".join("x" * draw(st.integers(1, 3)))))
        elif kind == "text":
            length = draw(st.integers(0, length)) if draw(st.booleans()) else length
            cuts = sorted(draw(st.sets(st.integers(1, max(length - 1, 1)), max_size=8)) | {0, length})
            tokens = ["x" * (right - left) for left, right in pairwise(cuts)] or ["_"]
            tokens[0] = ("_|" if draw(st.booleans()) else "_") + tokens[0]
            parts.append(text(number, "|".join(tokens)))
    return encoding(*parts)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Encoding, Encoding]:
    numbers = sorted(draw(st.sets(st.integers(0, 6), max_size=5)))
    lengths = [draw(st.integers(1, 12)) for _ in numbers]
    return draw(encodings(numbers, lengths)), draw(encodings(numbers, lengths))


@settings(max_examples=600, deadline=None, derandomize=True)
@given(pair=pairs())
def test_equals_the_slow_reference(pair):
    alignment = align(*pair)
    spans, chunk_a, chunk_b = reference(*pair)
    assert [tuple(row) for row in alignment.spans.tolist()] == spans
    assert alignment.chunk_a.tolist() == chunk_a
    assert alignment.chunk_b.tolist() == chunk_b


@settings(max_examples=100, deadline=None, derandomize=True)
@given(pair=pairs())
def test_swapping_sides_swaps_the_answer(pair):
    forth, back = align(*pair), align(*pair[::-1])
    assert np.array_equal(forth.spans, back.spans[:, [2, 3, 0, 1]])
    assert np.array_equal(forth.chunk_a, back.chunk_b)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 5), max_size=20))
def test_equal_sides_give_every_token_its_own_chunk(lengths):
    side = encoding(text(1, "|".join("x" * length for length in lengths))) if lengths else encoding()
    alignment = align(side, side)
    assert alignment.chunk_a.tolist() == list(range(len(lengths))) == alignment.chunk_b.tolist()


def test_nothing_on_one_side():
    side = encoding(text(1, "a|b"))
    alignment = align(side, encoding())
    assert len(alignment) == 0
    assert alignment.spans.shape == (0, 4)
    assert alignment.chunk_a.tolist() == [-1, -1]
    assert len(align(encoding(), encoding())) == 0
