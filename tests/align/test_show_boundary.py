"""What a reader sees of an alignment, and which tokens begin something new."""

import io

import numpy as np
from rich.console import Console

from tokenkit.align.boundary import boundary_tokens
from tokenkit.align.show import rows, show
from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.tokenizers.train import train_tokenizer

CORPUS = ["the cat sat on the mat\nthe cat\tsat"] * 5


def test_rows_hold_every_token_once_and_read_as_the_text():
    bpe, byte = train_tokenizer(CORPUS, "bpe", 300), ByteTokenizer()
    text = "the cat 😀\n"
    found = rows(text, bpe, byte, special=True)
    assert sum(len(row.a) for row in found) == len(bpe.encode(text, special=True))
    assert sum(len(row.b) for row in found) == len(byte.encode(text, special=True))
    assert all(row.aligned for row in found)
    assert (found[0].a, found[0].b) == (("[bos]",), ("[bos]",))
    assert found[1].a == ("the",)
    assert found[1].b == ("t", "h", "e")
    assert found[-1].b == ("↵",)


def test_tokens_in_no_chunk_are_shown_alone():
    bpe, byte = train_tokenizer(CORPUS, "bpe", 300, {"eos": "<|endoftext|>"}), ByteTokenizer()
    found = rows("a", bpe, byte, special=True)
    assert [(row.a, row.b, row.aligned) for row in found] == [((), ("[bos]",), False), (("a",), ("a",), True)]


def test_show_prints_both_sides_and_the_counts():
    bpe, byte = train_tokenizer(CORPUS, "bpe", 300), ByteTokenizer()
    console = Console(file=io.StringIO(), width=100)
    console.print(show("the mat", bpe, byte))
    printed = console.file.getvalue()
    assert "byte: 7 tokens" in printed
    assert "t│h│e" in printed
    assert "0 tokens in no chunk" in printed


def test_boundary_tokens_by_first_byte():
    byte = ByteTokenizer()
    boundary = boundary_tokens(byte)
    assert boundary.shape == (259,)
    assert np.flatnonzero(boundary).tolist() == [9, 10, 32, 256, 257, 258]
    bpe = train_tokenizer(CORPUS, "bpe", 300)
    wanted = [b[:1] in (b" ", b"\t", b"\n") or i in bpe.special_ids for i, b in enumerate(bpe.token_bytes)]
    assert boundary_tokens(bpe).tolist() == wanted
