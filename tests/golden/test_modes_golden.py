"""Alignment modes and mined token maps: the golden columns of B and D.3, and the distances of D.1."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from tokenkit.align.bias import PairBias
from tokenkit.align.modes import chunk_mode, closed_by_space, merge_chunks
from tokenkit.align.spans import align
from tokenkit.align.vocabulary import mined_map
from tokenkit.tokenizers.base import TEXT_SEGMENT, Encoding
from tokenkit.tokenizers.load import load_tokenizer

PAIRS = [
    "cl100k_base__mistral_tekken",
    "gemma3__qwen2",
    "gpt2__qwen2",
    "llama2__gpt2",
    "llama3__gemma3",
    "llama3__qwen2",
    "mistral_v1__llama3",
    "qwen2__llama3",
    "smollm2__gpt2",
]


def read(path):
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def golden_sides(golden, prefix, item):
    for side in "TS":
        part = slice(*golden[f"{prefix}_ptr_{side}"][item : item + 2])
        ids, starts, ends = (golden[f"{prefix}_{name}_{side}"][part] for name in ("ids", "start", "end"))
        special, segment = np.zeros(len(ids), bool), np.full(len(ids), TEXT_SEGMENT)
        if prefix == "prompt":
            special, segment = (golden[f"prompt_{name}_{side}"][part] for name in ("special", "seg"))
        spans = starts.astype(np.int64), ends.astype(np.int64)
        yield Encoding(ids, *spans, special.astype(bool), segment.astype(np.int32)), part


def first_bytes(golden, prefix, texts, side):
    """Ids that stand for bytes which begin with a space, read off the golden texts instead of a vocabulary."""
    found = np.zeros(int(golden[f"{prefix}_ids_{side}"].max()) + 1, bool)
    for item, text in enumerate(texts):
        part = slice(*golden[f"{prefix}_ptr_{side}"][item : item + 2])
        ids, starts, ends = (golden[f"{prefix}_{name}_{side}"][part] for name in ("ids", "start", "end"))
        found[[i for i, s, e in zip(ids, starts, ends) if e > s and text.encode()[s] == 32]] = True
    return found


@pytest.mark.parametrize("pair", [*PAIRS, "gemma3__gemma3_byteconv", "gemma3__purebyte"])
def test_space_columns_of_plain_texts(shared, pair):
    golden = read(shared / f"golden/B_align_{pair}.npz")
    texts = json.loads((shared / "golden/B_align_texts.json").read_text("utf-8"))["texts"]
    spaces = [first_bytes(golden, "plain", [text["text"] for text in texts], side) for side in "TS"]
    for item in range(len(texts)):
        (a, part_a), (b, part_b) = golden_sides(golden, "plain", item)
        greedy = align(a, b)
        found = merge_chunks(greedy, closed_by_space(a, b, greedy, *spaces))
        assert np.array_equal(found.chunk_a, golden["plain_space_col_T"][part_a])
        assert np.array_equal(found.chunk_b, golden["plain_space_col_S"][part_b])


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("prefix", ["plain", "prompt"])
def test_space_columns_by_the_tokenizers(shared, pair, prefix):
    golden = read(shared / f"golden/B_align_{pair}.npz")
    if f"{prefix}_ptr_T" not in golden:
        pytest.skip("this pair has no chat template")
    mode = chunk_mode("space", *(load_tokenizer(str(shared / "data/tokenizers" / name)) for name in pair.split("__")))
    for item in range(len(golden[f"{prefix}_ptr_T"]) - 1):
        (a, part_a), (b, part_b) = golden_sides(golden, prefix, item)
        found = mode(a, b, align(a, b))
        assert np.array_equal(found.chunk_a, golden[f"{prefix}_space_col_T"][part_a])
        assert np.array_equal(found.chunk_b, golden[f"{prefix}_space_col_S"][part_b])


def as_encoding(tokenizer, ids, mask):
    ids = ids[: int(mask.sum())]
    assert mask[: len(ids)].all()
    ends = np.cumsum([len(tokenizer.token_bytes[index]) for index in ids]).astype(np.int64)
    starts = np.append(0, ends[:-1])
    return Encoding(ids, starts, ends, np.zeros(len(ids), bool), np.full(len(ids), TEXT_SEGMENT, np.int32))


@pytest.fixture(scope="module")
def small(shared):
    golden = shared / "golden"
    teacher, student = (load_tokenizer(str(golden / f"D_tokenizer_bpe1k_{side}.json")) for side in "ab")
    arrays = read(golden / "D_bias_bpe1k_a__bpe1k_b.npz")
    order = np.lexsort((arrays["student_id"], arrays["teacher_id"]))
    names = ("teacher_id", "student_id", "bias1", "bias2")
    columns = [arrays[name][order].astype(np.int32 if "id" in name else np.float32) for name in names]
    bias = PairBias(*columns, shape=tuple(arrays["shape"].tolist()))
    return SimpleNamespace(teacher=teacher, student=student, bias=bias, columns=read(golden / "D_collator_bpe1k.npz"))


@pytest.mark.parametrize(
    "name, threshold", [("unconstrained", 0.1), ("space", 0.1), *(("unbiased", g) for g in (1e-4, 0.01, 0.1))]
)
def test_columns_of_the_collator(small, name, threshold):
    mode = chunk_mode(name, small.teacher, small.student, small.bias, threshold)
    key = f"{name}_{threshold}" if name == "unbiased" else name
    total = 0
    for row in range(len(small.columns["input_ids_new"])):
        a, b = (
            as_encoding(
                tokenizer, small.columns[f"input_ids_{side}"][row], small.columns[f"attention_mask_{side}"][row]
            )
            for tokenizer, side in ((small.teacher, "original"), (small.student, "new"))
        )
        found = mode(a, b, align(a, b))
        total += len(found)
        for chunk, side in ((found.chunk_a, "teacher"), (found.chunk_b, "student")):
            wanted = small.columns[f"col_{side}_{key}"][row]
            assert np.array_equal(chunk, wanted[: len(chunk)]), row
            assert (wanted[len(chunk) :] == -1).all()
    assert total > 600


def edits(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def test_mined_distances(shared):
    golden = shared / "golden"
    teacher, student = (load_tokenizer(str(golden / f"D_tokenizer_bpe4k_{side}.json")) for side in "ab")
    wanted = read(golden / "D_mined_bpe4k_a__to__bpe4k_b.npz")
    found = mined_map(student, teacher, workers=1)
    assert np.array_equal(found.distance, wanted["min_distance"])
    literals = {index: literal.encode() for literal, index in (teacher.special_tokens | student.special_tokens).items()}
    for index, (mapped, ties) in enumerate(zip(found.teacher_id.tolist(), wanted["n_ties"].tolist())):
        listed = wanted["tie_teacher_ids_first8"][slice(*wanted["tie_ptr"][index : index + 2])]
        assert len(listed) == min(ties, 8)
        spelled = (student.token_bytes[index] or literals[index], teacher.token_bytes[mapped] or literals[mapped])
        assert mapped in listed or (ties > 8 and edits(*spelled) == found.distance[index])
