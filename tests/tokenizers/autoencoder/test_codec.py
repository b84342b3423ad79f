"""Bytes ⇄ ids: exact for any bytes whatever the network says, cheapest of all, and the same in any weather."""

import gc
import itertools
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tokenkit.config import UserError
from tokenkit.tokenizers.autoencoder.chunkers import PATTERNS, make_chunker, to_text
from tokenkit.tokenizers.autoencoder.codec import LEAST_GAIN, Codec
from tokenkit.tokenizers.autoencoder.fast import fast_definition
from tokenkit.tokenizers.autoencoder.ids import PAD, UNK, IdLayout
from tokenkit.tokenizers.autoencoder.open_codes import OpenCodes
from tokenkit.tokenizers.autoencoder.pins import PinTable

CHUNKERS = [*PATTERNS, "fixed:3", "fixed:16"]
EDGES = [
    "",
    " ",
    "\0",
    "\0\0\0\0",
    "the cat",
    "  \r\n\n\r\t ",
    "\ufeffx\x85y\u2028z\u2029",
    "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪中文字",
    "a" + "\u0301" * 40,
    "مرحبا\u202eabc\u202c שלום",
    "\ud800 \udfff \ud83d\ude00",
    '{"k": [1, 2.5e-3, null]}',
    "aGVsbG8=\t0xDEADBEEF",
    "<|bos|><|eos|><0x41><c:12>",
    "x" * 5000,
    "中" * 3000,
    "kvjqzxkvjq qzx",
]
WORDS = ["the", " cat", "中", "文", "qzx", "kvjq", "😀", "жу", " ", "\n", "1234", "é", "--", "Größe", "\0\0\0"]
TEXTS = st.lists(st.sampled_from(WORDS) | st.text(max_size=5), max_size=12).map("".join)
BYTES = st.lists(TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=6)).map(b"".join)
fuzz = settings(max_examples=80, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def compact(make_package) -> Codec:
    return make_package("compact").codec()


@pytest.fixture(scope="module")
def opened(make_package) -> Codec:
    return make_package("open").codec()


@pytest.fixture(scope="module", params=["compact", "open"])
def codec(request, make_package) -> Codec:
    return make_package(request.param).codec()


def check(codec: Codec, data: bytes) -> list[int]:
    ids = codec.encode_bytes(data)
    assert codec.decode_bytes(ids) == data == b"".join(codec.token_strings(ids))
    assert len(ids) <= len(data)
    assert codec.lengths(ids).tolist() == [*map(len, codec.token_strings(ids))]
    assert all(codec.layout.byte_base <= index < codec.layout.vocab_size for index in ids)
    return ids


def open_ids(codec: Codec, ids: list[int]) -> list[int]:
    return [index for index in ids if codec.layout.is_open(index)]


def test_every_byte(codec):
    for byte in range(256):
        check(codec, bytes([byte]))


def test_every_pair_of_bytes(compact):
    for pair in map(bytes, itertools.product(range(256), repeat=2)):
        assert compact.decode_bytes(compact.encode_bytes(pair)) == pair


SLOW = [pytest.param("compact", 10_000, marks=pytest.mark.slow), pytest.param("open", 1000, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("kind", "count"), [("compact", 500), ("open", 40), *SLOW])
def test_random_bytes(make_package, kind, count):
    codec, draw = make_package(kind).codec(), random.Random(count)
    for _ in range(count):
        check(codec, draw.randbytes(draw.randrange(65)))


@pytest.mark.parametrize("chunker", CHUNKERS)
@fuzz
@given(data=BYTES)
def test_any_bytes_come_back_for_every_chunker(make_package, chunker, data):
    check(make_package("compact", chunker).codec(), data)
    check(make_package("open", chunker).codec(), data)


@pytest.mark.parametrize("text", EDGES, ids=range(len(EDGES)))
def test_texts_at_the_edge(codec, text):
    data = text.encode("utf-8", "surrogatepass")
    ids = codec.encode(text)
    assert codec.decode_bytes(ids) == data
    assert codec.encode_bytes(data) == ids
    assert codec.decode(ids) == data.decode("utf-8", "replace")


def test_ten_megabytes(compact):
    text = "".join(f"the cat {n} sat\n" for n in range(600_000))
    assert len(text) > 10_000_000
    assert compact.decode(compact.encode(text)) == text


@fuzz
@given(data=st.binary(max_size=9) | st.text("theca \n", max_size=9).map(str.encode))
def test_the_spelling_is_the_cheapest_of_all(compact, data):
    """Of equally cheap ones that with the longest last piece, then the longest last but one, ..."""
    costs = compact.pins.costs
    ways = []
    for borders in range(1 << max(0, len(data) - 1)):
        ends = [n for n in range(1, len(data)) if borders >> (n - 1) & 1] + [len(data)] * bool(data)
        pieces = [data[a:b] for a, b in zip([0, *ends], ends)]
        if all(piece in costs for piece in pieces):
            ways.append((sum(costs[piece] for piece in pieces), [-len(piece) for piece in reversed(pieces)], pieces))
    spelled = [compact.fixed_bytes[index] for index in compact.spell_piece(data)] if data else []
    assert spelled == min(ways)[2]
    assert len(spelled) == min(len(pieces) for _, _, pieces in ways)


@pytest.mark.parametrize("chunker", CHUNKERS)
def test_the_exported_table_gives_the_same_ids(make_package, chunker):
    codec = make_package("compact", chunker).codec()
    stock = Tokenizer.from_str(json.dumps(fast_definition(codec)))

    @fuzz
    @given(text=TEXTS)
    def same(text):
        text = text.encode("utf-8", "replace").decode().replace("<|", "<")
        assert stock.encode(text, add_special_tokens=False).ids == codec.encode(text)
        assert stock.decode(codec.encode(text)) == text

    same()


def test_ids_of_a_table_never_change():
    """Raise ARITHMETIC of the package when they must."""
    pieces = (b" the", b"the", b" cat", b"in", b"ing", b" c", b"at", "é".encode(), b"  ", b"123")
    codec = Codec(PinTable(pieces, (90, 30, 20, 9, 9, 5, 5, 4, 3, 2)), make_chunker("joined"), first_regular_id=64)
    pinned = {piece: 320 + n for n, piece in enumerate(pieces)}
    wanted = [pinned[b"the"], pinned[b" cat"], pinned[b" c"], 64 + 97, 64 + 115, 64 + 116, pinned[b"ing"], 64 + 46]
    assert codec.encode("the cat casting.") == wanted
    assert codec.encode("1234\n é") == [pinned[b"123"], 64 + 52, 74, 96, pinned["é".encode()]]
    assert codec.encode_bytes(b"\xff\xe2\x82") == [64 + 255, 64 + 226, 64 + 130]


@pytest.mark.parametrize("size", [0, 1, 3, 50])
def test_the_cache_changes_nothing(make_package, codec, size):
    kind = "open" if codec.open_codes else "compact"
    small = make_package(kind).codec(cache_size=size)
    draw = random.Random(1)
    texts = ["".join(draw.choices(WORDS, k=12)) for _ in range(25)]
    wanted = [codec.encode(text) for text in texts]
    assert [small.encode(text) for text in texts] == wanted
    assert small.encode_batch(texts) == wanted
    statistics = small.cache.statistics()
    assert statistics["recent"] <= 2 * size
    assert statistics["misses"] > 0
    small.cache.clear_recent()
    assert small.cache.statistics()["recent"] == 0
    assert [small.encode(text) for text in texts] == wanted


def test_any_batch_gives_the_same_ids(make_package):
    draw = random.Random(2)
    texts = ["".join(draw.choices(WORDS, k=9)) for _ in range(80)]
    wanted = make_package("open").codec().encode_batch(texts)
    assert any(open_ids(make_package("open").codec(), ids) for ids in wanted)
    for size in (1, 7, 64):
        codec = make_package("open").codec(cache_size=0)
        found = [ids for start in range(0, len(texts), size) for ids in codec.encode_batch(texts[start : start + size])]
        assert found == wanted


@pytest.mark.parametrize(("kind", "size"), [("compact", 5), ("compact", 10_000), ("open", 10_000)])
def test_threads_share_a_codec(make_package, kind, size):
    draw = random.Random(3)
    texts = ["".join(draw.choices(WORDS, k=5)) for _ in range(1000)]
    wanted = make_package(kind).codec().encode_batch(texts)
    shared = make_package(kind).codec(cache_size=size)

    def work(seed: int) -> bool:
        order = random.Random(seed).sample(range(len(texts)), len(texts))
        return all(shared.decode_bytes(shared.encode(texts[n])) == texts[n].encode() for n in order) and [
            shared.encode(texts[n]) for n in order
        ] == [wanted[n] for n in order]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_memory_does_not_grow(make_package):
    codec = make_package("compact").codec(cache_size=500)

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text("utf-8").split()[1]) * 4096

    def work(count: int) -> None:
        draw = random.Random(count)
        for _ in range(count):
            codec.decode(codec.encode(f"{draw.random()} the {draw.random()}"))

    work(3_000)
    before = resident()
    work(10_000)
    assert resident() - before < 3_000_000


def test_encoding_draws_no_random_numbers(make_package):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 (the global one)
    make_package("open").codec().encode("中文 qzx the cat")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_codes_are_used_where_they_save_ids_and_are_right(opened, compact):
    for text in ("中", "文字", "qzx", "kvjq", "😀中"):
        ids = check(opened, text.encode())
        assert open_ids(opened, ids)
        assert len(ids) < len(compact.encode(text))
    for text in ("the cat", "é", "\n", "ab"):  # what the table says as shortly
        assert opened.encode(text) == compact.encode(text)


@fuzz
@given(data=BYTES)
def test_codes_stand_for_what_the_decoder_says(opened, compact, data):
    ids = check(opened, data)
    assert len(ids) <= len(compact.encode_bytes(data))
    layout = opened.layout
    run: list[int] = []
    for index, string in zip(ids, opened.token_strings(ids)):
        if layout.is_open(index):
            final, code = divmod(index - layout.open_base, layout.num_codes)
            run.append(code)
            if final:
                assert opened.open_codes.spell([string]) == [tuple(run)]
                assert opened.open_codes.read([tuple(run)]) == [string]
                assert opened.open_codes.network.config.min_groups <= len(run) < max(len(string), LEAST_GAIN)
                run = []
            else:
                assert string == b""
    assert not run


def test_a_bad_network_costs_ids_and_no_bytes(make_package):
    package = make_package("open")
    network = type(package.network)(package.network.config)  # random weights
    for codes in (OpenCodes(network), OpenCodes(package.network, decoder_margin=1e9)):
        codec = Codec(package.pins, make_chunker("joined"), first_regular_id=64, open_codes=codes)
        assert not open_ids(codec, check(codec, "中文 qzx the cat 😀".encode()))


@fuzz
@given(data=st.data())
def test_any_ids_decode(codec, data):
    layout = codec.layout
    some = st.sampled_from([PAD, UNK, 64, 64 + 0xE2, layout.pin_base, layout.vocab_size - 1])
    opens = st.integers(layout.open_base, layout.vocab_size - 1) if layout.num_codes else some
    ids = data.draw(st.lists(some | opens | st.integers(0, layout.vocab_size - 1), max_size=12))
    spelled = codec.decode_bytes(ids)
    assert spelled == b"".join(codec.token_strings(ids))
    assert isinstance(codec.decode(ids), str)
    strict = codec.decode_bytes(ids, strict=True)
    assert len(strict) <= len(spelled)
    assert codec.decode_bytes(codec.encode_bytes(spelled)) == spelled
    if not open_ids(codec, ids):
        assert strict == spelled


def test_runs_that_end_too_early_are_read_as_they_stand(opened):
    first, last = opened.encode("中")
    assert opened.layout.is_open(first)
    whole = [first, last]
    assert opened.decode(whole) == "中"
    assert opened.decode_bytes([first], strict=True) == b""
    assert opened.decode_bytes([first]) == opened.open_codes.read([(first - opened.layout.open_base,)])[0]
    for inside in (PAD, opened.layout.byte_base + 65, opened.layout.pin_base):
        broken = opened.decode_bytes([first, inside, *whole])
        assert broken.startswith(opened.decode_bytes([first]) + opened.fixed_bytes[inside])
        assert opened.decode_bytes([first, inside, *whole], strict=True) == opened.fixed_bytes[inside] + "中".encode()
    endless = opened.decode_bytes([first] * 7)  # more codes than a run has: cut at the most
    most = opened.open_codes.groups
    assert endless == opened.decode_bytes([first] * most) * 2 + opened.decode_bytes([first])


@pytest.mark.parametrize("index", [-1, 10**9])
def test_ids_out_of_range_are_one_line(codec, index):
    with pytest.raises(UserError, match=f"id {index}: ") as caught:
        codec.decode([64, index])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"id {index}: "):
        codec.token_strings([index])


@pytest.mark.parametrize("first", [4, 64])
def test_ids_come_in_tiers(first):
    layout = IdLayout(10, 125, first, ("<|tool|>",))
    borders = [0, layout.byte_base, layout.pin_base, layout.open_base, layout.vocab_size]
    assert borders == [0, first, first + 256, first + 266, first + 516]
    for tier, a, b in zip(("special", "byte", "pin", "open"), borders, borders[1:]):
        assert {layout.tier(index) for index in range(a, b)} == {tier}
        assert {layout.is_special(index) for index in range(a, b)} == {tier == "special"}
        assert {layout.is_open(index) for index in range(a, b)} == {tier == "open"}
    names = layout.special_names
    assert len(names) == len(set(names)) == first
    assert names[:4] == ["<|pad|>", "<|unk|>", "<|bos|>", "<|eos|>"]
    assert first == 4 or names[7] == "<|tool|>"


def test_an_edit_changes_the_ids_of_its_chunk_only(opened):
    before = opened.encode("the cat sat on the 中文 mat")
    after = opened.encode("the cat szt on the 中文 mat")
    same = len(opened.encode("the cat"))
    assert before[:same] == after[:same]
    tail = len(opened.encode(" on the 中文 mat"))
    assert before[-tail:] == after[-tail:]


def test_chunks_longer_than_a_piece_are_cut_between_characters(opened):
    text = "中" * 20 + "文"
    strings = opened.token_strings(opened.encode(text))
    assert all(to_text(string).isprintable() for string in strings)
    assert b"".join(strings).decode() == text
