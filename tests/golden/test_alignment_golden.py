"""Alignment of real tokenizer pairs: the golden chunks (B), which an independent set intersection of bytes made."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from tokenkit.align.spans import align
from tokenkit.tokenizers.base import TEXT_SEGMENT, Encoding
from tokenkit.tokenizers.load import load_tokenizer

PAIRS = [
    "cl100k_base__mistral_tekken",
    "gemma3__gemma3_byteconv",
    "gemma3__purebyte",
    "gemma3__qwen2",
    "gpt2__qwen2",
    "llama2__gpt2",
    "llama3__gemma3",
    "llama3__qwen2",
    "mistral_v1__llama3",
    "qwen2__llama3",
    "smollm2__gpt2",
]
Golden = dict[str, np.ndarray]
load = functools.cache(load_tokenizer)


def read(shared: Path, pair: str) -> Golden:
    with np.load(shared / "golden" / f"B_align_{pair}.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def golden_encoding(golden: Golden, prefix: str, side: str, item: int) -> Encoding:
    part = slice(*golden[f"{prefix}_ptr_{side}"][item : item + 2])
    ids, starts, ends = (golden[f"{prefix}_{name}_{side}"][part] for name in ("ids", "start", "end"))
    special, segment = np.zeros(len(ids), bool), np.full(len(ids), TEXT_SEGMENT, np.int32)
    if prefix == "prompt":
        special, segment = (golden[f"prompt_{name}_{side}"][part] for name in ("special", "seg"))
    return Encoding(ids, starts.astype(np.int64), ends.astype(np.int64), special.astype(bool), segment.astype(np.int32))


def check(golden: Golden, prefix: str, item: int, a: Encoding, b: Encoding) -> None:
    alignment = align(a, b)
    wanted = golden[f"{prefix}_chunks"][slice(*golden[f"{prefix}_chunks_ptr"][item : item + 2])]
    assert np.array_equal(alignment.spans, wanted)
    for side, chunk in (("T", alignment.chunk_a), ("S", alignment.chunk_b)):
        part = slice(*golden[f"{prefix}_ptr_{side}"][item : item + 2])
        assert np.array_equal(chunk, golden[f"{prefix}_col_{side}"][part])


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("prefix", ["plain", "prompt"])
def test_chunks_from_golden_spans(shared, pair, prefix):
    golden = read(shared, pair)
    if f"{prefix}_ptr_T" not in golden:
        pytest.skip("this pair has no chat template")
    for item in range(len(golden[f"{prefix}_ptr_T"]) - 1):
        a, b = (golden_encoding(golden, prefix, side, item) for side in "TS")
        copies = [{name: getattr(one, name).copy() for name in Encoding.__slots__} for one in (a, b)]
        check(golden, prefix, item, a, b)
        for one, copied in zip((a, b), copies):
            assert all(np.array_equal(getattr(one, name), value) for name, value in copied.items())


def covers(chunk: np.ndarray, encoding: Encoding) -> bool:
    return bool((chunk[encoding.ends > encoding.starts] >= 0).all())


QUICK = ["llama2__gpt2", "smollm2__gpt2", "gpt2__qwen2"]
FROM_TEXT = [
    pytest.param(pair, marks=[] if pair in QUICK else pytest.mark.slow) for pair in PAIRS if "byteconv" not in pair
]


@pytest.mark.parametrize("pair", FROM_TEXT)
def test_chunks_from_the_text(shared, pair):
    golden = read(shared, pair)
    texts = json.loads((shared / "golden/B_align_texts.json").read_text("utf-8"))["texts"]
    names = ["byte" if name == "purebyte" else str(shared / "data/tokenizers" / name) for name in pair.split("__")]
    if not all(name == "byte" or Path(name).is_dir() for name in names):
        pytest.skip(f"a tokenizer of {pair} is not in the shared data")
    sides = [load(name).encode_batch([text["text"] for text in texts]) for name in names]
    for item, (a, b) in enumerate(zip(*sides)):
        for side, encoding in (("T", a), ("S", b)):
            wanted = golden_encoding(golden, "plain", side, item)
            assert np.array_equal(encoding.ids, wanted.ids)
            assert np.array_equal(encoding.ends, wanted.ends)
            assert np.array_equal(encoding.starts, wanted.starts)
        check(golden, "plain", item, a, b)
        alignment = align(a, b)
        assert covers(alignment.chunk_a, a)
        assert covers(alignment.chunk_b, b)
