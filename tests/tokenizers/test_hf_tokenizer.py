"""Byte spans where tokens do not spell the text, and tokenizers that are refused."""

import copy

import numpy as np
import pytest

from tokenkit.config import UserError
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.offsets import byte_positions, ends_from_offsets, uncovered_character


def changed(tokenizer: HFTokenizer, **parts: object) -> HFTokenizer:
    return HFTokenizer(copy.deepcopy(tokenizer.definition) | parts, tokenizer.config, "changed")


def test_positions_of_characters_of_every_width():
    text = "aé中😀b"
    wanted = [len(text[:end].encode()) for end in range(len(text) + 1)]
    assert byte_positions(text).tolist() == wanted


def test_pieces_of_one_character_share_its_bytes():
    offsets = np.array([[0, 1], [1, 2], [1, 2], [1, 2], [2, 3]])
    ends = ends_from_offsets(offsets, np.array([1, 2, 1, 1, 1]), byte_positions("a😀b"))
    assert ends.tolist() == [1, 3, 4, 5, 6]


def test_a_mark_composed_into_a_letter_belongs_to_the_token_before():
    offsets = np.array([[0, 1], [1, 2], [3, 4]])
    assert ends_from_offsets(offsets, np.array([1, 2, 1]), byte_positions("xe\u0301y")).tolist() == [1, 4, 5]


def test_first_uncovered_character():
    assert uncovered_character(np.array([[0, 1], [2, 3]]), 3) == 1
    assert uncovered_character(np.array([[0, 1], [0, 2]]), 3) == 2
    assert uncovered_character(np.zeros((0, 2), np.int64), 1) == 0
    assert uncovered_character(np.array([[0, 2], [1, 3]]), 3) is None


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
    moved = dict(zip(byte_positions(spaced).tolist(), byte_positions(text).tolist()))
    before = len(text[: text.index("▁")].encode())
    for ours, theirs in zip(marked.ends.tolist(), plain.ends.tolist()):
        assert ours == (theirs if theirs <= before else moved.get(theirs, ours))


@pytest.mark.parametrize("normalizer", ["Lowercase", "StripAccents", "NFKC", "Strip"])
def test_normalizers_that_change_the_text_never_pass_silently(bpe, normalizer):
    lossy = {"type": normalizer} | ({"strip_left": True, "strip_right": True} if normalizer == "Strip" else {})
    if normalizer == "StripAccents":
        lossy = {"type": "Sequence", "normalizers": [{"type": "NFD"}, lossy]}
    if normalizer == "NFKC":  # keeps ordinary text, changes ligatures: spans still cover what was written
        encoding = changed(bpe, normalizer=lossy).encode("the ﬁne cat")
        assert encoding.ends[-1] == len("the ﬁne cat".encode())
        return
    with pytest.raises(UserError, match="changes ordinary text"):
        changed(bpe, normalizer=lossy)


def test_word_pieces_are_refused(bpe):
    with pytest.raises(UserError, match="WordPiece tokenizers do not keep the bytes"):
        changed(bpe, model={"type": "WordPiece", "vocab": {"a": 0}})


def test_dropped_bytes_name_the_place(bpe):
    model = copy.deepcopy(bpe.definition["model"])
    missing = model["vocab"].pop("ā")  # byte 1
    model["vocab"]["ĀĀ"] = missing
    with pytest.raises(UserError, match=r"changed: changes the text at character 3, '\\x01d'"):
        changed(bpe, model=model).encode("abc\x01d")


def test_missing_role_token_is_named(bpe):
    with pytest.raises(UserError, match=r"pad_token is '<missing>', which tokenizer.json does not hold"):
        HFTokenizer(bpe.definition, {"pad_token": "<missing>"}, "x")


def test_no_bos_and_no_eos(bpe):
    tokenizer = HFTokenizer(bpe.definition, {}, "x")
    with pytest.raises(UserError, match="neither bos nor eos"):
        assert tokenizer.start_id


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
