"""What a reader sees of an alignment, and which tokens begin something new."""

import io
import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tokenkit.align.boundary import boundary_tokens
from tokenkit.align.show import compare, readable, rows, show
from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.tokenizers.train import train_tokenizer

CORPUS = ["the cat sat on the mat\nthe cat\tsat"] * 5
BPE, BYTE = train_tokenizer(CORPUS, "bpe", 300), ByteTokenizer()


def labels(tokens):
    return [token.label for token in tokens]


def printed(found, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(show(found))
    return console.file.getvalue()


def test_rows_hold_every_token_once_and_read_as_the_text():
    found = compare("the cat 😀\n", BPE, BYTE, special=True)
    made = rows(found)
    assert tuple(token for row in made for token in row.a) == found.a
    assert tuple(token for row in made for token in row.b) == found.b
    assert all(row.chunk == index for index, row in enumerate(made))
    assert (labels(made[0].a), labels(made[0].b)) == (["<|endoftext|>"], ["<|bos|>"])
    assert labels(made[1].a) == ["the"]
    assert labels(made[1].b) == ["t", "h", "e"]
    assert labels(made[-1].b) == ["↵"]


def test_tokens_in_no_chunk_are_shown_alone():
    bpe = train_tokenizer(CORPUS, "bpe", 300, {"eos": "<|endoftext|>"})
    found = compare("a", bpe, BYTE, special=True)
    assert [(labels(row.a), labels(row.b), row.chunk) for row in rows(found)] == [
        ([], ["<|bos|>"], -1),
        (["a"], ["a"], 0),
    ]
    assert found.counts["tokens_in_no_chunk"] == 1


def test_show_prints_both_sides_and_the_counts():
    out = printed(compare("the mat", BPE, BYTE))
    assert "byte: 7 tokens" in out
    assert "t│h│e" in out
    assert "0 tokens in no chunk" in out


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.text(max_size=30))
def test_json_is_complete_and_spells_the_text(text):
    found = json.loads(json.dumps(compare(text, BPE, BYTE).as_json()))
    raw = text.encode()
    for side, tokenizer in (("a", BPE), ("b", BYTE)):
        tokens = found[side]["tokens"]
        assert [token["id"] for token in tokens] == tokenizer.encode(text).ids.tolist()
        assert b"".join(bytes.fromhex(token["hex"]) for token in tokens) == raw
        for token in tokens:
            covered = raw[token["start"] : token["end"]]
            assert covered.hex() == token["hex"]
            assert token["text"] is None or token["text"].encode() == covered
    assert b"".join(raw[chunk["start"] : chunk["end"]] for chunk in found["chunks"]) == raw
    for index, chunk in enumerate(found["chunks"]):
        assert chunk["text"] is None or chunk["text"].encode() == raw[chunk["start"] : chunk["end"]]
        for side in ("a", "b"):
            inside = found[side]["tokens"][slice(*chunk[side])]
            assert {token["chunk"] for token in inside} == {index}
            assert (inside[0]["start"], inside[-1]["end"]) == (chunk["start"], chunk["end"])
    assert found["counts"]["chunks"] == len(found["chunks"])
    assert found["counts"]["bytes"] == len(raw)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.text(max_size=30))
def test_nothing_unseen_reaches_the_terminal(text):
    """Escape sequences, direction marks and line breaks of a text are drawn, never obeyed."""
    assert all(c.isprintable() and c != " " for c in readable(text))
    out = printed(compare("\x1b[31m\u202e\u200b" + text, BPE, BYTE), width=1000)
    assert not {"\x1b", "\u202e", "\u200b", "\r", "\x00"} & set(out)


def test_marks_stand_on_a_circle_and_parts_of_characters_in_hexadecimal():
    assert readable("\u0301a\u0301") == "◌\u0301a\u0301"
    assert readable(" \n\r\t\xa0") == "·↵←⇥\\xa0"
    assert labels(compare("é", BYTE, BYTE).a) == ["\\xc3", "\\xa9"]


def test_space_mode_gives_whole_words():
    found = compare("the catfish sat", BPE, BYTE, mode="space")
    assert [chunk.text for chunk in found.chunks] == ["the", " catfish", " sat"]
    assert found.as_json()["mode"] == "space"


def test_an_empty_text():
    found = compare("", BPE, BYTE)
    assert found.counts == dict.fromkeys(found.counts, 0)
    assert "0 chunks" in printed(found)


def test_boundary_tokens_by_first_byte():
    boundary = boundary_tokens(BYTE)
    assert boundary.shape == (259,)
    assert np.flatnonzero(boundary).tolist() == [9, 10, 32, 256, 257, 258]
    wanted = [b[:1] in (b" ", b"\t", b"\n") or i in BPE.special_ids for i, b in enumerate(BPE.token_bytes)]
    assert boundary_tokens(BPE).tolist() == wanted
