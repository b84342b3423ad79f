"""Streams say what one call would have said, hold little back, and speak the protocol of `generate`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from tokenkit.tokenizers.autoencoder.codec import Codec
from tokenkit.tokenizers.autoencoder.stream import DecodeStream, EncodeStream

CHUNKERS = ["joined", "word", "space", "superword", "fixed:3", "fixed:40"]
PIECES = ["the", " cat", "中", "文", "qzx", "😀", "жу", "  ", "\n", "\r\n", "1234", "é", "--", "\0\0\0"]
PIECES += ["x" * 20, "中" * 9, " " * 17, " a b c"]
DATA = st.lists(st.sampled_from(PIECES).map(str.encode) | st.binary(max_size=5), max_size=14).map(b"".join)
fuzz = settings(max_examples=60, deadline=None, derandomize=True)


def held_at_most(codec: Codec, data: bytes) -> int:
    """A piece and the beginning of a character; all of the last chunk where its width is the chunker's own."""
    return (40 if codec.chunker.name.startswith("fixed") else codec.max_chunk) + 4


@pytest.fixture(scope="module", params=CHUNKERS)
def codec(request, make_package) -> Codec:
    return make_package("open" if request.param == "joined" else "compact", request.param).codec()


@fuzz
@given(data=DATA, cuts=st.lists(st.integers(0, 60), max_size=8))
def test_any_cut_of_the_input_gives_the_same_ids(codec, data, cuts):
    borders = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    stream = EncodeStream(codec)
    ids = []
    for a, b in zip(borders, borders[1:]):  # noqa: RUF007
        ids += stream.feed(data[a:b])
        assert stream.held_bytes <= held_at_most(codec, data)
        assert codec.decode_bytes(ids) == data[: b - stream.held_bytes]
    ids += stream.flush()
    assert ids == codec.encode_bytes(data)
    assert stream.held_bytes == 0
    assert stream.feed(b"") + stream.flush() == []


@fuzz
@given(texts=st.lists(st.text(max_size=6) | st.sampled_from(PIECES), max_size=8))
def test_text_may_be_fed_as_text(codec, texts):
    stream = EncodeStream(codec)
    ids = [index for text in texts for index in stream.feed(text)] + stream.flush()
    assert ids == codec.encode_bytes("".join(texts).encode("utf-8", "surrogatepass"))


def test_one_endless_chunk_is_held_back_a_piece_at_a_time(codec):
    stream = EncodeStream(codec)
    ids = []
    for _ in range(300):
        ids += stream.feed("ab")
        assert stream.held_bytes <= held_at_most(codec, b"")
    assert ids + stream.flush() == codec.encode("ab" * 300)


@fuzz
@given(data=DATA)
def test_pieces_join_to_the_text(codec, data):
    stream = DecodeStream(codec)
    pieces = [stream.feed(index) for index in codec.encode_bytes(data)]
    text = "".join(pieces) + stream.flush()
    assert text == data.decode("utf-8", "replace") == stream.text
    decoded_early = data.decode("utf-8", "ignore") == data.decode("utf-8", "replace")
    assert not decoded_early or "\ufffd" not in "".join(pieces) or "\ufffd" in text


@fuzz
@given(data=st.data())
def test_any_ids_stream_as_they_decode(codec, data):
    layout = codec.layout
    one = st.integers(0, layout.vocab_size - 1) | st.integers(layout.open_base - 9, layout.vocab_size - 1)
    ids = data.draw(st.lists(one, max_size=12))
    stream = DecodeStream(codec)
    assert "".join(map(stream.feed, ids)) + stream.flush() == codec.decode(ids)


def test_half_a_character_waits(make_package):
    codec = make_package("compact").codec()
    stream = DecodeStream(codec)
    ids = codec.encode_bytes("😀".encode())
    assert [stream.feed(index) for index in ids] == ["", "", "", "😀"]
    assert stream.feed(ids[0]) == ""
    assert stream.flush() == "\ufffd"


def test_a_run_of_codes_waits_for_its_end(make_package):
    codec = make_package("open").codec()
    first, last = codec.encode("中")
    stream = DecodeStream(codec)
    assert [stream.feed(first), stream.feed(last)] == ["", "中"]
    assert stream.feed(first) == ""
    assert stream.feed(codec.layout.byte_base + 65).endswith("A")  # a byte ends the run before it


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_generate_speaks_to_a_stream(make_package, skip_prompt):
    codec = make_package("open").codec()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=codec.layout.vocab_size, **sizes)).eval()
    prompt = torch.tensor([[2, *codec.encode("the 中")]])
    stream = DecodeStream(codec, skip_prompt=skip_prompt)
    with torch.random.fork_rng():
        ids = model.generate(prompt, streamer=stream, max_new_tokens=12, do_sample=True, pad_token_id=0)[0].tolist()
    assert stream.text == codec.decode(ids[prompt.shape[1] :] if skip_prompt else ids)
