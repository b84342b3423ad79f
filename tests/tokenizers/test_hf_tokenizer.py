"""Byte spans where tokens do not spell the text; roles and files of a tokenizer."""

import copy
import functools
import json
import re
import unicodedata

import numpy as np
import pytest
from tokenizers import Tokenizer

from tokenkit.config import UserError
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.offsets import Texts, Uncovered, byte_positions, code_points, tiled_ends


def changed(tokenizer: HFTokenizer, **parts: object) -> HFTokenizer:
    return HFTokenizer(copy.deepcopy(tokenizer.definition) | parts, tokenizer.config, "changed")


def test_positions_of_characters_of_every_width():
    text = "aé中😀b"
    wanted = [len(text[:end].encode()) for end in range(len(text) + 1)]
    assert byte_positions(code_points(text)).tolist() == wanted


def ends(text: str, offsets: list[list[int]], lengths: list[int], spaced: bool = False) -> list[int]:
    flags = np.array([spaced] + [False] * (len(lengths) - 1))
    pairs = np.array(offsets, np.int64).reshape(-1, 2)
    composed = functools.partial(unicodedata.normalize, "NFC")
    return tiled_ends(pairs, np.array(lengths, np.int64), flags, Texts([text]), composed).tolist()


def test_pieces_of_one_character_share_its_bytes():
    assert ends("a😀b", [[0, 1], [1, 2], [1, 2], [1, 2], [2, 3]], [1, 2, 1, 1, 1]) == [1, 3, 4, 5, 6]


def test_a_dummy_space_stands_for_no_byte_and_a_real_one_for_its_own():
    assert ends("😀", [[0, 1], [0, 1], [0, 1]], [1, 2, 2], spaced=True) == [0, 2, 4]
    assert ends(" é", [[0, 1], [0, 2]], [1, 2], spaced=True) == [1, 3]


def test_marks_of_no_token_belong_to_the_token_before_and_white_space_to_the_one_behind():
    assert ends("xe\u0301y", [[0, 1], [1, 2], [3, 4]], [1, 2, 1]) == [1, 4, 5]
    assert ends("x  y ", [[0, 1], [3, 4]], [1, 1]) == [1, 4]  # what is behind the last token, its caller adds
    assert ends("e\u0301 \u0301y", [[0, 1], [4, 5]], [1, 1]) == [3, 7]
    assert ends("\u1112\u1161\u11aba", [[0, 1], [3, 4]], [3, 1]) == [9, 10]  # one syllable of three letters


@pytest.mark.parametrize(
    ("text", "offsets", "place"),
    [("a\x01b", [[0, 1], [2, 3]], 1), ("\x01b", [[1, 2]], 0), ("ab", [[0, 1]], 1), ("a \u200bb", [[0, 1], [3, 4]], 2)],
)
def test_the_first_character_of_no_token_is_named(text, offsets, place):
    with pytest.raises(Uncovered) as caught:
        ends(text, offsets, [1] * len(offsets))
    assert caught.value.place == place


def test_nfc_is_allowed_and_its_spans_cover_the_text_as_written(bpe):
    nfc = changed(bpe, normalizer={"type": "NFC"})
    text = "cafe\u0301 the cat"
    encoding = nfc.encode(text)
    assert encoding.ends[-1] == len(text.encode())
    assert (encoding.ends >= encoding.starts).all()
    assert np.array_equal(encoding.ids, bpe.encode("caf\u00e9 the cat").ids)
    boundary = len("cafe\u0301".encode())
    assert boundary in encoding.ends


def test_offsets_are_those_of_the_text_even_if_the_file_trims_them(bpe):
    trimming = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    text = "cafe\u0301  the cat"
    plain = changed(bpe, normalizer={"type": "NFC"}).encode(text)
    trimmed = changed(bpe, normalizer={"type": "NFC"}, post_processor=trimming).encode(text)
    assert np.array_equal(plain.ends, trimmed.ends)


@pytest.mark.parametrize("text", ["the cat▁sat été▁the", "😀▁the"])
def test_a_literal_space_mark_is_spelled_as_a_space_but_covers_its_own_bytes(tokenizer, text):
    spaced = text.replace("▁", " ")
    marked, plain = tokenizer.encode(text), tokenizer.encode(spaced)
    if "▁" in tokenizer.decode(marked.ids.tolist()):
        return  # this kind has no space mark
    assert np.array_equal(marked.ids, plain.ids)
    moved = dict(zip(Texts([spaced]).positions.tolist(), Texts([text]).positions.tolist()))
    before = len(text[: text.index("▁")].encode())
    for ours, theirs in zip(marked.ends.tolist(), plain.ends.tolist()):
        assert ours == (theirs if theirs <= before else moved.get(theirs, ours))


CHANGES = {
    "Lowercase": "lower-cases letters",
    "StripAccents": "strips accents",
    "Strip": "drops white space",
    "NFD": "normalises to NFD",
    "NFKC": "normalises compatibility characters",
    "Replace": r"changes ordinary text \(.*brulée",
}


@pytest.mark.parametrize("normalizer", CHANGES)
def test_normalizers_that_change_the_text_are_named_and_never_removed(bpe, normalizer):
    step = {"type": normalizer} | ({"strip_left": True, "strip_right": True} if normalizer == "Strip" else {})
    if normalizer == "Replace":
        step |= {"pattern": {"String": "û"}, "content": "u"}
    if normalizer == "StripAccents":
        step = {"type": "Sequence", "normalizers": [{"type": "NFD"}, step]}
    tokenizer, text = changed(bpe, normalizer=step), "  Thé ﬁne û cat "
    assert any(re.match(CHANGES[normalizer], words) for words in tokenizer.changes), tokenizer.changes
    assert tokenizer.lossless == (normalizer == "NFKC")
    encoding = tokenizer.encode(text)
    assert np.array_equal(encoding.starts, [0, *encoding.ends[:-1]])
    assert encoding.ends[-1] == len(text.encode())
    library = Tokenizer.from_str(json.dumps(tokenizer.definition))
    assert encoding.ids.tolist() == library.encode(text).ids


def test_a_model_of_another_kind_is_refused(bpe):
    with pytest.raises(UserError, match="changed: model type 'Neural': unknown; write a BPE"):
        changed(bpe, model={"type": "Neural", "vocab": {"a": 0}})


def test_dropped_bytes_name_the_place(bpe):
    model = copy.deepcopy(bpe.definition["model"])
    missing = model["vocab"].pop("ā")  # byte 1
    model["vocab"]["ĀĀ"] = missing
    tokenizer = changed(bpe, model=model)
    assert tokenizer.changes == ("lacks some bytes",)
    with pytest.raises(UserError, match=r"changed: .* character 3, '\\x01' \(U\+0001\) in .* is spelled by no token"):
        tokenizer.encode("abc\x01d")


def test_missing_role_token_is_named(bpe):
    with pytest.raises(UserError, match=r"pad_token is '<missing>', which tokenizer.json does not hold"):
        HFTokenizer(bpe.definition, {"pad_token": "<missing>"}, "x")


def test_no_bos_and_no_eos(bpe):
    tokenizer = HFTokenizer(bpe.definition, {}, "x")
    with pytest.raises(UserError, match="neither bos nor eos"):
        assert tokenizer.start_id()


def test_the_unknown_token_is_not_proposed_as_bos(bpe):
    names = [token["content"] for token in bpe.definition["added_tokens"] if token["special"]]
    model = bpe.definition["model"] | {"unk_token": names[0]}
    with pytest.raises(UserError, match=re.escape(f'such as {{"bos_token": "{names[1]}"')):
        HFTokenizer(bpe.definition | {"model": model}, {}, "x").start_id()


def test_a_single_special_token_ends_texts_where_no_config_speaks(bpe):
    added = bpe.definition["added_tokens"][:1]
    assert HFTokenizer(bpe.definition | {"added_tokens": added}, None, "x").eos_id == added[0]["id"]


def test_fingerprint_follows_ids_and_roles(bpe):
    same = HFTokenizer(copy.deepcopy(bpe.definition), bpe.config, "another name")
    other_roles = HFTokenizer(bpe.definition, bpe.config | {"eos_token": "<|pad|>"}, bpe.name)
    assert same.fingerprint == bpe.fingerprint != other_roles.fingerprint
    assert changed(bpe, normalizer={"type": "NFC"}).fingerprint != bpe.fingerprint


def test_non_special_added_tokens_spell_their_text(bpe):
    index = bpe.vocab_size
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    added = [*bpe.definition["added_tokens"], {"id": index, "content": "<think>é", **flags}]
    tokenizer = changed(bpe, added_tokens=added)
    encoding = tokenizer.encode("a <think>é b")
    assert tokenizer.token_bytes[index] == "<think>é".encode()
    assert index in encoding.ids
    assert tokenizer.decode(encoding.ids.tolist()) == "a <think>é b"
