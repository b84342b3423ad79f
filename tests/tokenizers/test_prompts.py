"""Prompts in the neutral form and the modes that frame them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit import align
from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.tokenizers.chat import encode_pieces, render
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.prompts import neutral_pieces, neutral_prompt, prompt_pieces
from tokenkit.tokenizers.roles import KINDS, Roles, kind_roles

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]


def tokenizer_of(bpe: HFTokenizer, kind: str) -> HFTokenizer:
    definition, roles = bpe.definition, kind_roles(kind)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    known = {token["content"] for token in definition["added_tokens"]}
    for number, literal in enumerate(one for one in roles.specials if one not in known):
        definition["added_tokens"].append({"id": bpe.vocab_size + number, "content": literal, **flags})
    return HFTokenizer(definition, {"eos_token": roles.eos, "tokenkit_kind": kind}, kind)


def text_of(tokenizer, prompt: str, mode: str, **options) -> str:
    return "".join(piece.text for piece in prompt_pieces(tokenizer, prompt, mode, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_modes(bpe, kind):
    tokenizer, roles = tokenizer_of(bpe, kind), kind_roles(kind)
    assert text_of(tokenizer, "hi", "direct_encode") == roles.bos + "hi" + roles.eos
    assert text_of(tokenizer, "hi", "direct_encode_no_force_eos") == roles.bos + "hi"
    assert text_of(tokenizer, "hi", "direct_encode_no_force_bos") == "hi" + roles.eos
    assert text_of(tokenizer, "hi", "direct_encode_no_force_bos_no_force_eos") == "hi"
    asked = roles.bos + roles.header("user") + "hi" + roles.eot + roles.header("assistant")
    assert text_of(tokenizer, "hi", "surround_instruct") == asked
    assert text_of(tokenizer, "hi", "surround_instruct", placeholders=True) == asked


@pytest.mark.parametrize("kind", KINDS)
def test_neutral_form_says_what_messages_say(bpe, kind):
    tokenizer = tokenizer_of(bpe, kind)
    neutral = neutral_prompt(MESSAGES)
    assert neutral.startswith("<|<bos>|><|<start_header>|><|<user_name>|><|<end_header>|>hi<|<eot>|>")
    wanted = "".join(piece.text for piece in render(tokenizer, MESSAGES))
    assert text_of(tokenizer, neutral, "direct_encode_no_force_eos", placeholders=True) == wanted
    closed = text_of(tokenizer, neutral, "direct_encode", placeholders=True)
    assert closed == wanted  # it ends with the end of a turn already


def test_placeholders_are_text_unless_asked_for(bpe):
    tokenizer = tokenizer_of(bpe, "Qwen2")
    pieces = prompt_pieces(tokenizer, "a <|<eot>|> <|im_end|>", "direct_encode")
    found = encode_pieces(tokenizer, pieces)
    literal = tokenizer.special_tokens["<|im_end|>"]
    assert literal not in found.encoding.ids.tolist()
    assert "<|<eot>|>" in "".join(piece.text for piece in pieces)


def test_first_and_last_tokens_pair_across_families(bpe):
    """Appendix A, case A10: whatever begins and ends a text is one place in both."""
    sides = [
        encode_pieces(t, prompt_pieces(t, "x", "direct_encode"))
        for t in (tokenizer_of(bpe, "Qwen3"), tokenizer_of(bpe, "Gemma2"), ByteTokenizer())
    ]
    for one in sides[1:]:
        assert align(sides[0].encoding, one.encoding).spans.tolist() == [[0, 1, 0, 1], [1, 2, 1, 2], [2, 3, 2, 3]]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    parts=st.lists(
        st.sampled_from(["<|<bos>|>", "<|<eot>|>", "<|<user_name>|>", "<|<nothing>|>", "text", " ", "<|<"]), max_size=8
    )
)
def test_neutral_pieces_keep_the_text(parts):
    roles = Roles((), bos="[B]", eot="", user="U")
    pieces = neutral_pieces(roles, "".join(parts))
    expected = "".join({"<|<bos>|>": "[B]", "<|<eot>|>": "", "<|<user_name>|>": "U"}.get(part, part) for part in parts)
    joined = "".join(piece.text for piece in pieces)
    if "<|<" not in "".join(part for part in parts if part in ("text", " ", "<|<")):
        assert joined == expected
    places = [piece.place for piece in pieces]
    assert places == sorted(set(places))
