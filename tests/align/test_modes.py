"""Laws of the alignment modes, of truncation and of masks, on random segmentations of random bytes."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.align.bias import PairBias
from tokenkit.align.modes import MODES, chunk_mode, closed_by_bias, closed_by_space, merge_chunks
from tokenkit.align.spans import align, keep_chunks, mask_tokens, trained_chunks, truncate
from tokenkit.config import UserError
from tokenkit.tokenizers.base import TEXT_SEGMENT, Encoding, framed
from tokenkit.tokenizers.bytelevel import ByteTokenizer

LAWS = settings(max_examples=300, deadline=None, derandomize=True)
VOCABULARY = 8  # ids of the random sides; even ones begin with a space
SPACES = np.arange(VOCABULARY) % 2 == 0
Token = tuple[int, int, bool, int]  # start, end, special, segment


def make(tokens: list[Token], ids: list[int]) -> Encoding:
    starts, ends, special, segment = zip(*tokens) if tokens else ([], [], [], [])
    return Encoding(
        np.array(ids, np.int32),
        np.array(starts, np.int64),
        np.array(ends, np.int64),
        np.array(special, np.bool_),
        np.array(segment, np.int32),
    )


@st.composite
def sides(draw: st.DrawFn, lengths: dict[int, int], absent: bool, tails: bool) -> Encoding:
    """Random cuts of every segment, zero-width tokens among them; template, missing and cut segments if asked for."""
    tokens: list[Token] = []
    for segment, length in lengths.items():
        kind = draw(st.sampled_from(["absent", "template", "text", "text"] if absent else ["template", "text", "text"]))
        if kind == "template":
            tokens += [(0, 0, True, segment)] * draw(st.integers(1, 2))
        elif kind == "text":
            end = draw(st.integers(1, length)) if tails else length
            cuts = sorted({0, end} | draw(st.sets(st.integers(1, max(end - 1, 1)), max_size=6)) - {end + 1})
            for left, right in pairwise(cut for cut in cuts if cut <= end):
                tokens += [(left, left, False, segment)] * draw(st.sampled_from([0, 0, 0, 1]))
                tokens.append((left, right, False, segment))
    return make(tokens, draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=len(tokens), max_size=len(tokens))))


@st.composite
def pairs(draw: st.DrawFn, absent: bool = True, tails: bool = True) -> tuple[Encoding, Encoding]:
    lengths = {s: draw(st.integers(1, 10)) for s in sorted(draw(st.sets(st.integers(0, 5), max_size=4)))}
    return draw(sides(lengths, absent, tails)), draw(sides(lengths, absent, tails))


@st.composite
def closings(draw: st.DrawFn) -> PairBias:
    """A random table that leaves some pairs and the highest ids out."""
    shape = (draw(st.integers(1, VOCABULARY)), draw(st.integers(1, VOCABULARY)))
    keys = sorted(draw(st.sets(st.integers(0, shape[0] * shape[1] - 1))))
    values = st.lists(st.sampled_from([0.0, 0.05, 0.5]), min_size=len(keys), max_size=len(keys))
    rows = np.array(keys, np.int32)
    biases = [np.array(draw(values), np.float32) for _ in range(2)]
    return PairBias(rows // shape[1], rows % shape[1], *biases, shape=shape)


def slow_column(a: Encoding, b: Encoding, trusted) -> list[tuple[int, int, int, int]]:
    """Columns chunk by chunk, from the words of the definition."""
    columns: list[tuple[int, int, int, int]] = []
    closed = True
    for a0, a1, b0, b1 in align(a, b).spans.tolist():
        if not closed and columns[-1][1::2] == (a0, b0):
            columns[-1] = (columns[-1][0], a1, columns[-1][2], b1)
        else:
            columns.append((a0, a1, b0, b1))
        closed = bool(a.special[a1 - 1] or b.special[b1 - 1]) or trusted(a1, b1)
    return columns


def laws_of_a_coarser(greedy, merged):
    for old, new, spans in (
        (greedy.chunk_a, merged.chunk_a, merged.spans[:, :2]),
        (greedy.chunk_b, merged.chunk_b, merged.spans[:, 2:]),
    ):
        assert np.array_equal(old >= 0, new >= 0)
        inside = old >= 0
        assert (np.diff(new[inside]) >= 0).all()
        assert all(len({*new[old == chunk]}) == 1 for chunk in {*old[inside].tolist()})
        for chunk, (start, end) in enumerate(spans.tolist()):
            assert np.flatnonzero(new == chunk).tolist() == list(range(start, end))
    assert len(merged) <= len(greedy)


@LAWS
@given(pair=pairs())
def test_space_mode_equals_its_definition(pair):
    a, b = pair
    greedy = align(a, b)

    def trusted(i, j):
        return i < len(a) and j < len(b) and bool(SPACES[a.ids[i]] and SPACES[b.ids[j]])

    merged = merge_chunks(greedy, closed_by_space(a, b, greedy, SPACES, SPACES))
    assert [tuple(row) for row in merged.spans.tolist()] == slow_column(a, b, trusted)
    laws_of_a_coarser(greedy, merged)
    again = merge_chunks(merged, closed_by_space(a, b, merged, SPACES, SPACES))
    assert np.array_equal(again.spans, merged.spans)
    mirrored = align(b, a)
    mirrored = merge_chunks(mirrored, closed_by_space(b, a, mirrored, SPACES, SPACES))
    assert np.array_equal(mirrored.spans[:, [2, 3, 0, 1]], merged.spans)


@LAWS
@given(pair=pairs(), bias=closings(), threshold=st.sampled_from([0.0, 0.1, 0.5]))
def test_unbiased_mode_equals_its_definition(pair, bias, threshold):
    a, b = pair
    greedy = align(a, b)
    listed = {
        (t, s): max(one, two)
        for t, s, one, two in zip(*(x.tolist() for x in (bias.teacher_ids, bias.student_ids, bias.bias1, bias.bias2)))
    }

    def trusted(i, j):
        x, y = int(a.ids[i - 1]), int(b.ids[j - 1])
        return x >= bias.shape[0] or y >= bias.shape[1] or listed.get((x, y), 0.0) <= threshold

    merged = merge_chunks(greedy, closed_by_bias(a, b, greedy, bias, threshold))
    assert [tuple(row) for row in merged.spans.tolist()] == slow_column(a, b, trusted)
    laws_of_a_coarser(greedy, merged)
    assert np.array_equal(merge_chunks(merged, closed_by_bias(a, b, merged, bias, threshold)).spans, merged.spans)


def test_modes_by_name(bpe, unigram):
    texts = ["the cat sat on a mat", "goldfish redder"]
    none = np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.float32)
    bias = PairBias(*none, shape=(bpe.vocab_size, unigram.vocab_size))
    for a, b in zip(bpe.encode_batch(texts), unigram.encode_batch(texts)):
        greedy = align(a, b)
        found = {name: chunk_mode(name, bpe, unigram, bias)(a, b, greedy) for name in MODES}
        assert np.array_equal(found["unconstrained"].spans, greedy.spans)
        assert np.array_equal(found["unbiased"].spans, greedy.spans)  # nothing is listed: no bias anywhere
    words = [found["space"].spans[k].tolist() for k in range(len(found["space"]))]
    assert [(a.ends[row[1] - 1], b.ends[row[3] - 1]) for row in words] == [(8, 8), (15, 15)]
    assert len(greedy) > len(words)


def test_modes_refused(bpe):
    with pytest.raises(
        UserError, match=r"'unbiassed' is no alignment mode; write one of unconstrained, space, unbiased"
    ):
        chunk_mode("unbiassed", bpe, bpe)
    with pytest.raises(UserError, match="'unbiased' needs the bias of this pair"):
        chunk_mode("unbiased", bpe, bpe)
    none = np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.float32)
    with pytest.raises(UserError, match=r"2\.0 is no probability"):
        chunk_mode("unbiased", bpe, bpe, PairBias(*none, shape=(1, 1)), 2.0)


WORDS = ["user", " model", "assistant", "\n", "\r\n", "\n\n", "<|endoftext|>", "<s>", " ", "cat", "é", "🙂", "\t", "x"]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.lists(st.sampled_from(WORDS), max_size=12).map("".join))
def test_nothing_in_running_text_breaks_a_chunk(bpe, unigram, text):
    tokenizers = (bpe, unigram, ByteTokenizer())
    encodings = [tokenizer.encode(text) for tokenizer in tokenizers]
    for a, one in zip(encodings, tokenizers):
        assert not a.special.any()
        for b, other in zip(encodings, tokenizers):
            ends = sorted({*a.ends[a.ends > a.starts].tolist()} & {*b.ends[b.ends > b.starts].tolist()})
            greedy = align(a, b)
            assert a.ends[greedy.spans[:, 1] - 1].tolist() == ends == b.ends[greedy.spans[:, 3] - 1].tolist()
            assert (greedy.chunk_a[a.ends > a.starts] >= 0).all()
            spaces = {len(text.encode())} | {at for at, byte in enumerate(text.encode()) if byte == 32}
            merged = chunk_mode("space", one, other)(a, b, greedy)
            assert {*a.ends[merged.spans[:, 1] - 1].tolist()} <= spaces  # no word, line break or literal closes


def test_begin_and_end_on_one_side_are_in_no_chunk(bpe, unigram):
    text = "the cat sat"
    a, b = bpe.encode(text), unigram.encode(text)
    plain = align(a, b)
    for begin, end in ((0, None), (None, 0), (0, 0)):
        longer = align(framed(a, begin, end), b)
        first = int(begin is not None)
        assert np.array_equal(longer.spans, plain.spans + np.array([first, first, 0, 0]))
        assert np.array_equal(longer.chunk_b, plain.chunk_b)
        assert (np.delete(longer.chunk_a, slice(first, first + len(a))) == -1).all()
        both = align(framed(a, begin, end), framed(b, begin, end))
        assert len(both) == len(plain) + (begin is not None) + (end is not None)


def same(one: Encoding, other: Encoding, count: int) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)[:count]) for name in Encoding.__slots__)


@LAWS
@given(pair=pairs(), max_a=st.integers(0, 25), max_b=st.integers(0, 25))
def test_truncation_keeps_the_whole_chunks_that_fit(pair, max_a, max_b):
    a, b = pair
    greedy = align(a, b)
    cut_a, cut_b = truncate(a, b, max_a, max_b)
    assert len(cut_a) <= max_a
    assert len(cut_b) <= max_b
    assert same(cut_a, a, len(cut_a))
    assert same(cut_b, b, len(cut_b))
    kept = align(cut_a, cut_b)
    fits = (greedy.spans[:, 1] <= max_a) & (greedy.spans[:, 3] <= max_b)
    assert np.array_equal(kept.spans, greedy.spans[fits])
    # Nothing stands behind the last chunk but whole segments that the other side lacks.
    for side, full, other, column in ((cut_a, a, b, 1), (cut_b, b, a, 3)):
        behind = side.segment[int(kept.spans[-1, column]) if len(kept) else 0 :]
        assert not {*behind.tolist()} & {*other.segment.tolist()}
        if len(side) < len(full) and len(behind):
            assert full.segment[len(side)] != behind[-1]


@LAWS
@given(pair=pairs(tails=False))
def test_what_fits_is_not_cut(pair):
    a, b = pair
    cut_a, cut_b = truncate(a, b, len(a), len(b))
    assert same(cut_a, a, len(a))
    assert same(cut_b, b, len(b))
    assert len(cut_a) == len(a)
    assert len(cut_b) == len(b)


def test_truncation_of_real_texts(bpe, unigram):
    text = "the cat sat on a mat and then ran home 🙂 to see"
    a, b = framed(bpe.encode(text), bpe.bos_id, bpe.eos_id), ByteTokenizer().encode(text)
    for budget in range(len(b) + 2):
        cut_a, cut_b = truncate(a, b, len(a), budget)
        assert cut_a.ends.max(initial=0) == cut_b.ends.max(initial=0)
        assert budget - len(cut_b) < 14  # a word of the other side at most is given up
    assert len(cut_a) == len(a)  # the end of text, too
    with_tail = Encoding(*(getattr(b, name)[:-1] for name in Encoding.__slots__))
    cut_a, cut_b = truncate(a, with_tail, len(a), len(b))
    assert cut_a.ends[-1] == cut_b.ends[-1] < len(text.encode())


Rows = list[tuple[int, int, int]]
ROWS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 10), st.integers(0, 6)).map(lambda r: (r[0], r[1], r[1] + r[2])),
    max_size=4,
)


def slow_mask(encoding: Encoding, rows: Rows) -> list[bool]:
    trained = {(segment, byte) for segment, start, end in rows for byte in range(start, end)}
    named = {segment for segment, _, _ in rows}
    found = []
    for start, end, special, segment in zip(
        *(getattr(encoding, name).tolist() for name in ("starts", "ends", "special", "segment"))
    ):
        wanted = {(segment, byte) for byte in range(start, max(end, start + 1))}
        found.append(segment in named if special else wanted <= trained)
    return found


@LAWS
@given(pair=pairs(), rows=ROWS)
def test_masks_equal_sets_of_bytes_and_agree_on_chunks(pair, rows):
    a, b = pair
    spans = np.array(rows, np.int64).reshape(-1, 3)
    masks = [mask_tokens(side, spans) for side in pair]
    assert [mask.tolist() for mask in masks] == [slow_mask(side, rows) for side in pair]
    greedy = align(a, b)
    counts = trained_chunks(greedy, *masks)
    for chunk, (a0, a1, b0, b1) in enumerate(greedy.spans.tolist()):
        by_side = [bool(masks[0][a0:a1].all()), bool(masks[1][b0:b1].all())]
        if a.special[a0:a1].any() == b.special[b0:b1].any():  # the same bytes: the same answer from either side alone
            assert by_side[0] == by_side[1]
        assert counts[chunk] == all(by_side)
    kept = keep_chunks(greedy, counts)
    assert np.array_equal(kept.spans, greedy.spans[counts])
    assert np.array_equal(np.isin(greedy.chunk_a, np.flatnonzero(counts)), kept.chunk_a >= 0)
    words = merge_chunks(kept, closed_by_space(a, b, kept, SPACES, SPACES))
    laws_of_a_coarser(kept, words)  # among them: no column holds a token that is not trained


def test_a_token_across_the_border_is_out():
    tokens = [(0, 3, False, 1), (3, 6, False, 1), (6, 6, False, 1), (6, 8, False, 1), (0, 0, True, 2), (0, 0, True, 3)]
    encoding = make(tokens, list(range(6)))
    rows = np.array([[1, 2, 4], [1, 4, 8], [2, 0, 0]], np.int64)
    assert mask_tokens(encoding, rows).tolist() == [False, True, True, True, True, False]
    assert not mask_tokens(encoding, np.zeros((0, 3), np.int64)).any()
    assert mask_tokens(make([], []), rows).shape == (0,)
    whole = np.array([[TEXT_SEGMENT, 0, 8]], np.int64)
    assert mask_tokens(encoding, whole).tolist() == [True] * 4 + [False] * 2
