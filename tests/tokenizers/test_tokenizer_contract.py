"""What every tokenizer kind promises: round trip, spans that cover the text, text that stays text."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenkit.tokenizers.autoencoder.learned import LearnedTokenizer
from tokenkit.tokenizers.base import Encoding, Tokenizer

PIECES = [
    "the cat",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "é",
    "é",
    "😀",
    "👩‍👩‍👧",
    "中文",
    "\0",
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "▁",
]
PIECES += ["<|endoftext|>", "<|pad|>", "<|bos|>", "<|im_start|>", "user", "ﬁ", "À", "12345"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=12).map("".join)
fuzz = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="session")
def tokenizer(any_tokenizer):
    return any_tokenizer


def check_spans(encoding: Encoding, text: str) -> None:
    length = len(text.encode())
    starts, ends = encoding.starts, encoding.ends
    assert not encoding.special.any()
    assert (ends >= starts).all()
    assert np.array_equal(starts[1:], ends[:-1])
    assert length == 0 if len(encoding) == 0 else (starts[0] == 0 and ends[-1] == length)


def strings(tokenizer: Tokenizer, ids: list[int]) -> list[bytes]:
    """What every id adds to the text: by itself, but for codes, of which a run says all with its last one."""
    return (
        tokenizer.codec.token_strings(ids)
        if isinstance(tokenizer, LearnedTokenizer)
        else [tokenizer.token_bytes[index] for index in ids]
    )


def loses(tokenizer: Tokenizer, encoding: Encoding) -> bool:
    """Whether the encoding holds an unknown token."""
    return "<unk>" in tokenizer.special_tokens and bool((encoding.ids == tokenizer.special_tokens["<unk>"]).any())


@fuzz
@given(text=TEXTS)
def test_spans_cover_the_text_and_tokens_spell_it(tokenizer, text):
    encoding = tokenizer.encode(text)
    check_spans(encoding, text)
    if loses(tokenizer, encoding):
        return
    spelled = b"".join(strings(tokenizer, encoding.ids.tolist()))
    wanted = text.encode() if "▁" not in text or spelled == text.encode() else text.replace("▁", " ").encode()
    assert spelled in (wanted, b" " + wanted)
    if spelled == text.encode():
        widths = [*map(len, strings(tokenizer, encoding.ids.tolist()))]
        assert np.array_equal(encoding.ends - encoding.starts, widths)


@fuzz
@given(text=TEXTS)
def test_decode_inverts_encode(tokenizer, text):
    encoding = tokenizer.encode(text)
    decoded = tokenizer.decode(encoding.ids.tolist())
    if loses(tokenizer, encoding):
        return
    if "▁" in text and decoded != text:  # the mark of a space and a space share one spelling
        assert decoded.replace("▁", " ") == text.replace("▁", " ")[len(text) - len(decoded) :]
    elif decoded != text:  # a dummy space and a space share one spelling: the ids do not say which it was
        assert text == " " + decoded
        if decoded[:1] not in ("", " "):  # what begins with a space gets no dummy
            assert np.array_equal(encoding.ids, tokenizer.encode(decoded).ids)


@fuzz
@given(text=TEXTS)
def test_literals_of_special_tokens_stay_text(tokenizer, text):
    unknown = {tokenizer.special_tokens[name] for name in ("<unk>",) if name in tokenizer.special_tokens}
    assert not (tokenizer.special_ids - unknown) & {*tokenizer.encode(text).ids.tolist()}


def test_batch_equals_one_by_one(tokenizer):
    texts = ["the cat", "", "  été 😀\n", "<s>"]
    for text, batched in zip(texts, tokenizer.encode_batch(texts, special=True)):
        single = tokenizer.encode(text, special=True)
        for name in ("ids", "starts", "ends", "special", "segment"):
            assert np.array_equal(getattr(batched, name), getattr(single, name))


def test_special_frames_with_bos_in_its_own_segment(tokenizer):
    framed, plain = tokenizer.encode("the cat", special=True), tokenizer.encode("the cat")
    assert framed.ids[0] == tokenizer.bos_id == tokenizer.start_id()
    assert np.array_equal(framed.ids[1:], plain.ids)
    assert framed.special.tolist() == [True] + [False] * len(plain)
    assert (framed.starts[0], framed.ends[0]) == (0, 0)
    assert framed.segment.tolist() == [0] + [1] * len(plain)
    assert tokenizer.decode(framed.ids.tolist()) == "the cat"


def test_shape_of_the_protocol(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size
    assert all(tokenizer.token_bytes[index] == b"" for index in tokenizer.special_ids)
    assert len(tokenizer.fingerprint) == 64


@pytest.mark.parametrize("text", ["é", "中文字", "naïve 😀"])
def test_half_characters_decode_to_replacement(tokenizer, text):
    ids = tokenizer.encode(text).ids.tolist()
    for cut in range(len(ids)):
        assert isinstance(tokenizer.decode(ids[:cut]), str)
