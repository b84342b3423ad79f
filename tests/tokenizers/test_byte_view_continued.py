"""A text after a special token is tokenised as the library tokenises it there, dummy spaces included."""

import copy
import json

import numpy as np
import pytest
import tokenizers

from tokenkit.tokenizers.hf import HFTokenizer

TEXTS = ["the cat", " the cat", "  x", "\nthe", "été", "😀 x", "", "▁the", "a<s>b"]


def library_after(tokenizer: HFTokenizer, literal: str, text: str) -> list[int]:
    """The library's own ids behind a special token that it matches in the text."""
    backend = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.definition))
    ids = backend.encode(literal + text, add_special_tokens=False).ids
    assert ids[0] == tokenizer.special_tokens[literal]
    return ids[1:]


def test_continued_equals_the_library_behind_a_special_token(tokenizer):
    if not isinstance(tokenizer, HFTokenizer):
        assert np.array_equal(tokenizer.encode_batch(["the"], continued=True)[0].ids, tokenizer.encode("the").ids)
        return
    literal = next(iter(tokenizer.special_tokens))
    literal = "</s>" if "</s>" in tokenizer.special_tokens else literal
    for text in TEXTS:
        if any(other in text for other in tokenizer.special_tokens):
            continue
        ids = tokenizer.encode_batch([text], continued=True)[0].ids.tolist()
        assert ids == library_after(tokenizer, literal, text), text


@pytest.mark.parametrize(
    ("kind", "inside"), [("sp-first", False), ("sp-always", True), ("sp-never", False), ("sp-prepend", True)]
)
def test_where_a_dummy_space_is_added_inside(make_tokenizer, kind, inside):
    tokenizer = make_tokenizer(kind)
    first, within = tokenizer.encode("the"), tokenizer.encode_batch(["the"], continued=True)[0]
    spelled = b"".join(tokenizer.token_bytes[index] for index in within.ids)
    assert spelled == (b" the" if inside else b"the")
    assert within.starts[0] == 0
    assert within.ends[-1] == first.ends[-1] == 3


def test_a_prefix_space_of_byte_level_is_added_inside_too(bpe):
    step = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    tokenizer = HFTokenizer(copy.deepcopy(bpe.definition) | {"pre_tokenizer": step}, bpe.config, "prefixing")
    for text in TEXTS:
        ids = tokenizer.encode_batch([text], continued=True)[0].ids.tolist()
        assert ids == library_after(tokenizer, "<|endoftext|>", text)
        assert ids == tokenizer.encode(text).ids.tolist()
    assert tokenizer.encode_batch(["the"], continued=True)[0].ends.tolist()[-1] == 3
