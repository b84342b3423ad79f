"""Added tokens with flags, with spaces, of other scripts; doubled, missing and superfluous ids."""

import copy
import functools
import itertools
import json

import numpy as np
import pytest
import tokenizers

from tokenkit.config import UserError
from tokenkit.tokenizers.base import Encoding
from tokenkit.tokenizers.hf import HFTokenizer

PLAIN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
CONTENT = "<think>é"
FLAGS = [{}, {"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}, {"single_word": True}]
FLAGS += [{"normalized": True}]
TEXTS = [
    "a  <think>é \n the",
    "<think>é",
    "  <think>é  ",
    "x<think>éy cafe\u0301",
    "▁a <think>é▁",
    "😀<think>é😀 <think>é",
]


def with_tokens(tokenizer: HFTokenizer, contents: list[str], **flags: bool) -> HFTokenizer:
    """The tokenizer with more added tokens behind its last id."""
    vocabulary, free = tokenizer.definition["model"]["vocab"], itertools.count(tokenizer.vocab_size)
    ids = [vocabulary[content] if content in vocabulary else next(free) for content in contents]
    more = [{"id": index, "content": content, **PLAIN, **flags} for index, content in zip(ids, contents)]
    added = [*tokenizer.definition["added_tokens"], *more]
    return HFTokenizer(copy.deepcopy(tokenizer.definition) | {"added_tokens": added}, tokenizer.config, "added")


@functools.lru_cache(1)
def library(tokenizer: HFTokenizer) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.definition))
    backend.encode_special_tokens = True
    return backend


def library_ids(tokenizer: HFTokenizer, text: str) -> list[int]:
    return library(tokenizer).encode(text, add_special_tokens=False).ids


def spans(encoding: Encoding, text: str) -> list[str]:
    raw = text.encode()
    assert np.array_equal(encoding.starts, [0, *encoding.ends[:-1]][: len(encoding)])
    assert encoding.ends[-1] == len(raw)
    return [raw[a:b].decode(errors="replace") for a, b in zip(encoding.starts.tolist(), encoding.ends.tolist())]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "+".join(flags) or "none")
def test_white_space_that_an_added_token_swallows_belongs_to_it(tokenizer, flags):
    if not isinstance(tokenizer, HFTokenizer):
        return
    added = with_tokens(tokenizer, [CONTENT], **flags)
    index = tokenizer.vocab_size
    assert added.token_bytes[index] == CONTENT.encode()
    for text in TEXTS:
        encoding = added.encode(text)
        ids = encoding.ids.tolist()
        assert ids == library_ids(added, text)
        for where, span in zip(ids, spans(encoding, text)):
            if where == index:
                assert span.strip() == CONTENT
    text, ids = TEXTS[0], added.encode(TEXTS[0]).ids.tolist()
    if "normalized" not in flags:  # else its normalised literal may begin with a dummy space
        wanted = ("  " if "lstrip" in flags else "") + CONTENT + (" \n " if "rstrip" in flags else "")
        assert spans(added.encode(text), text)[ids.index(index)] == wanted


@pytest.mark.parametrize("kind", ["bpe", "sp-replace"])
def test_added_runs_of_spaces_and_newlines_spell_themselves(make_tokenizer, kind):
    runs = ["  ", "    ", "\n\n", "\n\n\n", "\t\t", "<h1>", "</h1>"]  # as GPT-NeoX and Gemma have them
    added = with_tokens(make_tokenizer(kind), runs, normalized=kind == "bpe")
    text = "def f():\n\n    return\t\t1  \n\n\n<h1>the</h1>"
    encoding = added.encode(text)
    spelled = [added.token_bytes[index].decode(errors="replace") for index in encoding.ids]
    assert spelled == spans(encoding, text)
    assert encoding.ids.tolist() == library_ids(added, text)
    assert {"<h1>", "</h1>", "\n\n\n", "\t\t"} <= {*spelled}


def test_special_tokens_with_spaces_and_other_scripts_are_text_inside_a_text(bpe):
    literals = ["<｜begin▁of▁sentence｜>", "<| a b |>", "<|é|>"]  # the first as DeepSeek has it
    added = with_tokens(bpe, literals, special=True)
    for literal in literals:
        index = added.special_tokens[literal]
        assert added.token_bytes[index] == b""
        encoding = added.encode(f"a {literal} b")
        assert index not in encoding.ids
        assert b"".join(added.token_bytes[i] for i in encoding.ids) == f"a {literal} b".encode()


def test_a_doubled_spelling_keeps_both_bytes(make_tokenizer):
    tokenizer = make_tokenizer("sp-always")
    vocabulary = tokenizer.definition["model"]["vocab"]
    pair = vocabulary["<0x61>"], vocabulary["a"]
    assert [tokenizer.token_bytes[index] for index in pair] == [b"a", b"a"]
    assert pair[0] not in tokenizer.encode("banana").ids


def test_holes_and_ids_behind_the_vocabulary(bpe):
    end, definition = bpe.vocab_size, copy.deepcopy(bpe.definition)
    far = end + 20
    definition["model"]["vocab"]["<far>"] = far
    definition["added_tokens"].append({"id": far, "content": "<far>", **PLAIN})
    tokenizer = HFTokenizer(definition, bpe.config, "holes")
    assert far in tokenizer.encode("the <far> cat").ids
    assert tokenizer.vocab_size == len(tokenizer.token_bytes) == far + 1
    assert tokenizer.token_bytes[far] == b"<far>"
    assert set(tokenizer.token_bytes[end:far]) == {b""}


def test_an_id_that_the_library_does_not_give_is_refused(bpe):
    more = [*bpe.definition["added_tokens"], {"id": bpe.vocab_size + 20, "content": "<far>", **PLAIN}]
    with pytest.raises(UserError, match=r"'<far>' has id \d+ in tokenizer.json, where the .* library gives it \d+;"):
        HFTokenizer(copy.deepcopy(bpe.definition) | {"added_tokens": more}, bpe.config, "far")


@pytest.mark.parametrize("kind", ["word-piece", "end-of-word", "split-words"])
def test_added_tokens_of_lossy_tokenizers_swallow_their_white_space_too(make_lossy, kind):
    added = with_tokens(make_lossy(kind), [CONTENT], lstrip=True, rstrip=True)
    text = "the \t<think>é  cat"
    encoding = added.encode(text)
    assert encoding.ids.tolist() == library_ids(added, text)
    assert " \t<think>é  " in spans(encoding, text)
