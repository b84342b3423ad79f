"""Tokenizers that change the text: their spans still tile it, and what has no span is named."""

import functools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenkit.config import UserError
from tokenkit.tokenizers.base import Tokenizer, require_lossless
from tokenkit.tokenizers.changes import NFC, NFKC
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.verbs.transfer import TransferRun, transfer

WORDS = [
    "The",
    "CAT",
    "catings",
    " ",
    "  ",
    "\n",
    "\t",
    "é",
    "É",
    "e\u0301",
    "中文",
    "😀",
    "x.",
    "ﬁ",
    "½",
    "ß",
    "İ",
    "[CLS]",
    "12",
]
TEXTS = st.lists(st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=4), max_size=10)
SPANS = {
    "word-piece": {
        "The  cats,\n": ["The", "  cat", "s", ",\n"],
        "Éx e\u0301": ["É", "x", " e\u0301"],
        " 中 文cat": [" 中", " 文", "cat"],
        "xyzzy 😀a the": ["x", "y", "z", "z", "y", " 😀a", " the"],
    },
    "end-of-word": {"The  Cat\n": ["The", "  Cat\n"], "É the": [b"\xc3", b"\x89", " the"], "12": ["1", "2"]},
    "split-words": {"the  cat": ["the", "  cat"], "xing\tﬁn ": ["", "x", "ing", "\t", b"\xef", b"\xac\x81", "n "]},
}


made_once = functools.cache(lambda make, tokenizer: make(tokenizer))


def pieces(tokenizer: HFTokenizer, text: str) -> list[bytes]:
    encoding, raw = tokenizer.encode(text), text.encode()
    return [raw[begin:end] for begin, end in zip(encoding.starts.tolist(), encoding.ends.tolist())]


def test_spans_by_hand(lossy):
    for text, wanted in SPANS[lossy.name].items():
        assert pieces(lossy, text) == [part if isinstance(part, bytes) else part.encode() for part in wanted], text


def test_tokens_hold_neither_word_marks_nor_dropped_white_space(lossy):
    vocabulary = lossy.definition["model"]["vocab"]
    if lossy.name == "word-piece":
        wanted = {"##ing": b"ing", "the": b"the", "#": b"#", "中": "中".encode(), "[UNK]": b""}
    elif lossy.name == "end-of-word":
        wanted = {"the</w>": b"the", "th": b"th", "Ã</w>": b"\xc3", "Ġ": b" "}
    else:
        vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
        wanted = {"▁the": b" the", "ing": b"ing"}
    assert {piece: lossy.token_bytes[vocabulary[piece]] for piece in wanted} == wanted


def test_changes_in_words(lossy, bpe):
    wanted = {
        "word-piece": ("lower-cases letters", "strips accents", "drops white space", "lacks some characters"),
        "end-of-word": ("lower-cases letters", "drops white space", NFC),
        "split-words": ("drops white space", NFC, NFKC, "lacks some characters"),
    }
    assert lossy.changes == wanted[lossy.name]
    assert not lossy.lossless
    with pytest.raises(
        UserError, match=r"this tokenizer .*drops white space.*, so it cannot be a target; use one"
    ) as e:
        require_lossless(lossy, "a target")
    assert "\n" not in str(e.value)
    require_lossless(bpe, "a target")
    assert bpe.changes == ()


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(parts=TEXTS)
def test_ids_are_the_librarys_and_spans_hold_what_was_normalised(lossy, checker, parts):
    check = made_once(checker.Checker, lossy)
    check.check(["".join(parts)])
    found = check.found
    assert found.wrong == 0, found.failures
    assert found.ids == found.tiled == found.strings - found.refused.total()


def test_a_batch_equals_its_texts_alone(lossy):
    texts = ["The cat", "", "  é 😀\n", "cat  ", "", "12"]
    for text, batched in zip(texts, lossy.encode_batch(texts)):
        for name in ("ids", "starts", "ends", "special", "segment"):
            assert np.array_equal(getattr(batched, name), getattr(lossy.encode(text), name))


@pytest.mark.parametrize("text", ["  ", "\n"])
def test_a_text_without_any_token_is_refused(lossy, text):
    with pytest.raises(UserError, match="leaves the text without any token") as caught:
        lossy.encode(text)
    assert "\n" not in str(caught.value)


def test_a_deleted_control_character_is_named(make_lossy):
    tokenizer = make_lossy("word-piece")
    assert tokenizer.encode_batch(["ca\x01t"])[0].ends.tolist() == [4]  # inside one token it is covered
    with pytest.raises(
        UserError, match=r"character 4, '\\x01' \(U\+0001\) in .*, belongs to no token; leave such texts"
    ):
        tokenizer.encode_batch(["fine", "the \x01cat"])


def test_a_special_token_made_of_text_is_refused(make_lossy):
    words = make_lossy("word-piece").definition | {"pre_tokenizer": {"type": "WhitespaceSplit"}, "normalizer": None}
    with pytest.raises(UserError, match=r"character 4, '\[' .* becomes a special token"):
        HFTokenizer(words, None, "words").encode("the [CLS] cat")


def test_a_transfer_to_a_lossy_tokenizer_is_refused_before_any_model_is_read(lossy, tmp_path):
    lossy.save(tmp_path / "lossy")
    run = {"output": tmp_path / "out", "model": {"source": "nowhere"}, "target_tokenizer": str(tmp_path / "lossy")}
    with pytest.raises(UserError, match="so it cannot be the target of a transfer"):
        transfer(TransferRun.model_validate(run))
    assert not (tmp_path / "out").exists()


def test_what_was_saved_gives_the_same(lossy, tmp_path):
    lossy.save(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert isinstance(again, Tokenizer)
    assert again.fingerprint == lossy.fingerprint
    assert again.changes == lossy.changes
    assert np.array_equal(again.encode("The cat").ends, lossy.encode("The cat").ends)


def test_decode_puts_white_space_where_the_library_does(lossy):
    assert lossy.decode(lossy.encode("the cat").ids.tolist()).split() == ["the", "cat"]
