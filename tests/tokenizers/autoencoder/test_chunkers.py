"""Chunks join to the text, are those of the exported expression, and only the last one hangs on what follows."""

import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from tokenkit.config import UserError
from tokenkit.tokenizers.autoencoder.chunkers import (
    CLASSES,
    PATTERNS,
    Chunker,
    cut,
    escaped,
    make_chunker,
    to_bytes,
    to_text,
)

NAMES = [*PATTERNS, "fixed:1", "fixed:5", "fixed:16"]
ALPHABET = "aZé́ऀक中ل9٣½Ⅷ²·_-'\"!?€😀👩\u200d🏽\U0001d7d8\U00010400\U0001e922"
ALPHABET += " \u00a0\u2003\u3000\t\r\n\v\x1c\x85\u2028\0\x7f\ufeff\U000e0041"
PIECES = ["the", "The", "12345", "  ", "\r\n", "\n\n", " a", "don't", "x_1", "é", "é", "👩‍👩‍👧", "--", "…\n"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.sampled_from(ALPHABET) | st.characters(), max_size=16).map("".join)
BROKEN = st.lists(TEXTS.map(lambda text: escaped(text).encode("utf-8", "surrogateescape")) | st.binary(max_size=5))
fuzz = settings(max_examples=300, deadline=None, derandomize=True)


@pytest.mark.parametrize("name", NAMES)
@fuzz
@given(data=BROKEN.map(b"".join))
def test_chunks_join_to_the_text(name, data):
    chunks = make_chunker(name).split(to_text(data))
    assert "" not in chunks
    assert b"".join(map(to_bytes, chunks)) == data


@pytest.mark.parametrize("name", PATTERNS)
@fuzz
@given(text=TEXTS.filter(lambda text: not re.search("[\ud800-\udfff]", text)))
def test_the_exported_expression_splits_alike(name, text):
    chunker = make_chunker(name)
    split = pre_tokenizers.Split(Regex(chunker.exported), "isolated")
    assert [piece for piece, _ in split.pre_tokenize_str(text)] == chunker.split(text)


@pytest.mark.parametrize("name", PATTERNS)
def test_every_character_is_in_the_class_that_is_exported(name):
    chunker = make_chunker(name)
    split = pre_tokenizers.Split(Regex(chunker.exported), "isolated")
    ranges = [
        pair for ranges in json.loads(CLASSES.read_text("utf-8")).values() if type(ranges) is list for pair in ranges
    ]
    borders = {point for first, last in ranges for point in (first - 1, first, last, last + 1)}
    points = [point for point in borders if 0 <= point <= 0x10FFFF and not 0xD800 <= point < 0xE000]
    for form in ("a{}", " {}1", "{} "):  # what a class is told by: does it join a letter, a digit, a space
        text = "\n".join(form.format(chr(point)) for point in points)
        assert [piece for piece, _ in split.pre_tokenize_str(text)] == chunker.split(text)


@pytest.mark.parametrize("name", NAMES)
@fuzz
@given(text=TEXTS, more=TEXTS)
def test_only_the_last_chunk_changes_when_text_is_appended(name, text, more):
    text, more = escaped(text), escaped(more)
    chunks = make_chunker(name).split(text)
    longer = make_chunker(name).split(text + more)
    assert longer[: max(0, len(chunks) - 1)] == chunks[:-1]


@pytest.mark.parametrize("name", ["joined", "word"])
@fuzz
@given(before=TEXTS, after=TEXTS, chunk=st.sampled_from(["cat", "hat", "cart"]))
def test_an_edit_of_a_word_moves_no_other(name, before, after, chunk):
    split = make_chunker(name).split
    before, after = escaped(before) + "x. ", " y" + escaped(after)
    around = split(before + "cat" + after)
    edited = split(before + chunk + after)
    assert [c for c in edited if c != f" {chunk}"] == [c for c in around if c != " cat"] or chunk == "cat"


@pytest.mark.parametrize(
    ("name", "text", "chunks"),
    [
        ("word", "the cat, 12345!\n\nx", ["the", " cat", ",", " 123", "45", "!", "\n", "\n", "x"]),
        ("word", "  a\t b \n", [" ", " a", "\t", " b", " \n"]),
        ("joined", "f(x) == 'y'\r\n\tz", ["f", "(x", ")", " ==", " 'y", "'\r\n", "\t", "z"]),
        ("joined", "été—Größe", ["été", "—Größe"]),
        ("space", "the cat, sat", ["the ", "cat,", " sat"]),
        ("superword", "one two three four five", ["one two three", " four five"]),
        ("fixed:4", "aé中b😀", ["aé", "中b", "😀"]),
    ],
)
def test_examples(name, text, chunks):
    assert make_chunker(name).split(text) == chunks


@fuzz
@given(data=BROKEN.map(b"".join), width=st.integers(1, 20))
def test_cuts_are_short_and_between_characters(data, width):
    pieces = cut(data, width)
    assert b"".join(pieces) == data
    assert all(0 < len(piece) <= width for piece in pieces)
    if width >= 4 and to_text(data).isprintable() and data.decode("utf-8", "ignore").encode() == data:
        for piece in pieces:
            piece.decode()


def test_classes_are_pinned_and_do_not_overlap():
    read = json.loads(CLASSES.read_text("utf-8"))
    ranges = sorted(pair for name in ("letters", "digits", "spaces") for pair in read[name])
    assert all(a <= b for a, b in ranges)
    assert all(last < first for (_, last), (first, _) in itertools.pairwise(ranges))


@fuzz
@given(text=st.text(st.characters() | st.sampled_from("\ud800\udc80\udcff\udfff"), max_size=8))
def test_halves_of_surrogate_pairs_are_three_bytes(text):
    assert to_bytes(escaped(text)) == text.encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("name", NAMES)
def test_a_chunker_is_made_of_its_name(name):
    chunker = make_chunker(name)
    assert isinstance(chunker, Chunker)
    assert make_chunker(chunker.name) == chunker
    assert chunker.split("") == []


@pytest.mark.parametrize("name", ["words", "fixed", "fixed:0", "fixed:65", "fixed:x", "entropy:2.5", ""])
def test_unknown_chunkers_are_one_line(name):
    with pytest.raises(UserError) as caught:
        make_chunker(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)
