"""Chunks are counted once, split by document, cut at characters, and drawn as (seed, step) say."""

import json
import os
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.config import UserError, build
from tokenkit.data.chunk_batches import ChunkBatches, DrawConfig, inclusion, invented
from tokenkit.data.chunk_corpus import (
    ChunkDataConfig,
    count_corpus,
    load_prepared,
    prepare_corpus,
    read_corpus,
)
from tokenkit.data.chunks import ChunkTable, TokenizerDataset, count_chunks, split_documents
from tokenkit.tokenizers.autoencoder.chunkers import make_chunker
from tokenkit.tokenizers.autoencoder.network import END, NetworkConfig, chunks_of

NETWORK = NetworkConfig(hidden=32, byte_width=8)
PLAIN = DrawConfig(corrupted=0.0, invented=0.0)


def batches_of(documents, draw=PLAIN, network=NETWORK, **options):
    table = ChunkTable.of(count_chunks(documents, make_chunker("word"))).cut(network.max_bytes)
    return ChunkBatches(table, network, draw, **{"batch_size": 256, "seed": 3, **options})


@given(st.lists(st.text(), max_size=4), st.integers(4, 9))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_pieces_joined_are_the_text_and_end_at_characters(texts, max_bytes):
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    table = ChunkTable.of(count_chunks(texts, make_chunker("word")))
    pieces = table.cut(max_bytes)
    total = sum(len(text.encode()) for text in texts)
    assert sum(len(c) * n for c, n in table.as_dict().items()) == total
    assert sum(len(c) * n for c, n in pieces.as_dict().items()) == total
    for piece in pieces.chunks:
        assert len(piece) <= max_bytes
        piece.decode()


def test_a_table_does_not_hang_on_the_order_of_counting(documents):
    counts = count_chunks(documents, make_chunker("word"))
    table, other = ChunkTable.of(counts), ChunkTable.of(dict(reversed(counts.items())))
    assert table.chunks == other.chunks
    assert table.fingerprint() == other.fingerprint()
    assert table.fingerprint() != ChunkTable.of(counts | {b"new": 1}).fingerprint()
    assert chunks_of(table.symbols(16).long()) == list(table.chunks)


def test_documents_are_split_without_leakage(documents):
    train, held_out = split_documents([*documents, *documents], 0.3, 7)
    assert set(train) | set(held_out) == set(documents)
    assert not set(train) & set(held_out)  # copies of a document stand on one side
    assert split_documents(documents, 0.3, 7) == split_documents(documents, 0.3, 7)
    assert split_documents(documents, 0.3, 8)[1] != held_out


def test_rare_chunks_are_drawn_by_the_root_of_their_count(documents):
    batches = batches_of(["common " * 900 + "rare " * 9])
    drawn = Counter(row for step in range(200) for row in batches.rows(step).tolist())
    chunks = batches.table.chunks
    rows = {chunks[row]: count for row, count in drawn.items()}
    assert rows[b" common"] / rows[b" rare"] == pytest.approx((899 / 9) ** 0.5, rel=0.1)


def test_a_step_is_a_function_of_seed_and_step(documents):
    whole, again = batches_of(documents, DrawConfig()), batches_of(documents, DrawConfig())
    for step in (0, 5):
        one, cut = again.at(step)[0], whole.at(step, 3)
        for name in one.tensors:
            assert torch.equal(torch.cat([part.tensors[name] for part in cut]), one.tensors[name])
    assert whole.at(5)[0].rows != whole.at(6)[0].rows
    assert repr(whole.table.chunks[whole.rows(5)[0]]) in whole.place(5)


def test_labels_are_the_bytes_and_the_end(documents):
    batch = batches_of(documents).at(0)[0]
    symbols, labels = batch.tensors["symbols"], batch.tensors["student_byte_labels"]
    for chunk, row in zip(chunks_of(symbols), labels.tolist()):
        expected = [*chunk, END][:8]
        assert row == expected + [-1] * (8 - len(expected))
    assert batch.num_bytes == sum(map(len, chunks_of(symbols)))


def test_the_share_of_corrupted_samples_and_bytes():
    batches = batches_of(["abcdefgh " * 50], DrawConfig(corrupted=0.1, substituted=0.3, invented=0.0, exponent=0.0))
    changed = touched = total = 0
    for step in range(100):
        batch = batches.at(step)[0]
        clean = batches.symbols[batch.rows]
        differs = batch.tensors["symbols"].numpy() != clean
        assert not (differs & (clean == END)).any()  # lengths stay
        changed += differs.any(1).sum()
        touched += differs.sum()
        total += len(clean)
    lengths = float(batches.lengths[batch.rows].mean())
    assert changed / total == pytest.approx(0.1 * (1 - 0.7 ** round(lengths)), abs=0.02)
    assert touched / total / lengths == pytest.approx(0.03, rel=0.15)


@pytest.mark.parametrize(("groups", "least"), [(3, 2), (4, 1), (2, 2)])
def test_never_fewer_groups_than_the_fewest(documents, groups, least):
    network = NetworkConfig(hidden=32, byte_width=8, groups=groups, min_groups=least)
    batches = batches_of(documents, network=network)
    kept = torch.cat([batches.at(step)[0].tensors["kept"] for step in range(8)])
    assert set(kept.tolist()) == set(range(least, groups + 1))


def test_invented_chunks_are_digits_symbols_and_identifiers():
    chunks = chunks_of(torch.from_numpy(invented(np.random.default_rng(0), 4000, 8)))
    assert all(1 <= len(chunk) <= 8 for chunk in chunks)
    stripped = [chunk.lstrip(b" ").decode() for chunk in chunks]
    for kind in (str.isdecimal, str.isidentifier, lambda s: s and not any(c.isalnum() for c in s)):
        assert sum(map(bool, map(kind, stripped))) > 600
    assert max(len(s) for s in stripped if s.isdecimal()) >= 3
    share = sum(chunk.startswith(b" ") for chunk in chunks) / len(chunks)
    assert share == pytest.approx(0.5, abs=0.05)


def test_failing_chunks_are_drawn_three_times_as_often_and_come_back(documents):
    batches = batches_of(documents, DrawConfig(corrupted=0, invented=0, exponent=0.0))
    number = len(batches.table)
    batches.mine(np.array([4, 2]))
    drawn = np.bincount(np.concatenate([batches.rows(step) for step in range(400)]), minlength=number)
    others = np.delete(drawn, [2, 4])
    assert drawn[[2, 4]].mean() / others.mean() == pytest.approx(3, rel=0.05)
    again = batches_of(documents, DrawConfig(corrupted=0, invented=0, exponent=0.0))
    again.load_state(batches.state())
    assert np.array_equal(again.rows(9), batches.rows(9))


def test_a_batch_is_drawn_in_well_under_a_millisecond(documents):
    batches = batches_of(documents, DrawConfig())
    batches.at(0)
    best = min(_seconds(batches, step) for step in range(20))
    assert best < 1e-3


def _seconds(batches, step):
    began = time.process_time()
    batches.at(step)
    return time.process_time() - began


def test_a_sample_stands_for_the_whole():
    table = ChunkTable.of({bytes([i % 256, i // 256]): 5000 - i for i in range(5000)})
    rows, weights = inclusion(table, 1000, 0)
    assert len(set(rows.tolist())) == len(rows) == 1000
    assert weights.sum() == pytest.approx(5000)
    assert (weights * table.counts[rows]).sum() == pytest.approx(table.counts.sum(), rel=0.03)


def test_the_data_set_of_the_checklist(documents):
    data = TokenizerDataset(documents, chunk_size=8, batch_size=100)
    seen = Counter()
    while batch := data.next_batch():
        assert len(batch) <= 100
        seen.update(batch)
    assert seen == data.table.as_dict()
    assert seen.total() == data.size() == len(data)
    data.reset()
    first = data.next_batch()
    data.shuffle()
    assert data.next_batch() != first
    train, held_out = data.split(0.25)
    assert set(train.corpus) | set(held_out.corpus) == set(documents)
    assert not set(train.corpus) & set(held_out.corpus)
    assert train.size() + held_out.size() == data.size()


@pytest.fixture
def folder(tmp_path, documents):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, document in enumerate(documents):
        (folder / f"{number:03}.txt").write_text(document, "utf-8")
    return folder


def test_a_prepared_folder_is_what_is_read_and_holds_the_text(tmp_path, folder, documents):
    config = build(ChunkDataConfig, {"source": {"path": str(folder)}, "validation_split": 0.2})
    lines = []
    statistics = prepare_corpus(config, tmp_path / "out", lines.append)
    corpus = load_prepared(tmp_path / "out")
    assert corpus.fingerprint() == read_corpus(config).fingerprint()
    assert corpus.train.chunks == read_corpus(config).train.chunks
    assert statistics["files_read"] == len(documents)
    assert statistics == json.loads((tmp_path / "out/statistics.json").read_text("utf-8"))
    sides = [
        [json.loads(line)["text"] for line in (tmp_path / "out" / name).open()]
        for name in ("train.jsonl", "validation.jsonl")
    ]
    assert sides == [*split_documents(documents, 0.2, 0)]
    assert f"{len(documents)}/{len(documents)} files (100%)" in lines[-1]
    with pytest.raises(UserError, match="exists and is not empty; nothing is overwritten"):
        prepare_corpus(config, tmp_path / "out")
    chunks = tmp_path / "out/chunks.safetensors"
    content = chunks.read_bytes()
    for broken in (content[:-100], content[:-1] + bytes([content[-1] ^ 1])):
        chunks.write_bytes(broken)
        with pytest.raises(UserError, match=r"not a prepared corpus|not those of its manifest"):
            load_prepared(tmp_path / "out")


def test_progress_is_told_every_hundred_files(tmp_path):
    for number in range(250):
        (tmp_path / f"{number}.txt").write_text(f"document number {number}", "utf-8")
    lines = []
    count_corpus(build(ChunkDataConfig, {"source": {"path": str(tmp_path)}}), lines.append)
    assert [line.split(" ")[0] for line in lines] == ["100/250", "200/250", "250/250"]
    assert all("distinct" in line and "MB/s" in line and "left" in line for line in lines)


def test_unreadable_files_are_passed_over(folder, caplog):
    (folder / "zz.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "zz.jsonl").write_text("{broken", "utf-8")
    reading = count_corpus(build(ChunkDataConfig, {"source": {"path": str(folder)}}))
    assert len(reading.skipped) == 2
    assert reading.files_read == 40
    assert caplog.text.count("skipped") == 2


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, {}, r"no \.txt, \.jsonl, \.parquet, \.py or \.md file in it"),
        ("", {}, r"no text in its 1 files"),
        ("one document", {}, r"none of 1 documents is left to (validate with|train on) at validation_split=0.1"),
    ],
)
def test_nothing_to_read_is_one_line(tmp_path, content, options, message):
    if content is not None:
        (tmp_path / "a.txt").write_text(content, "utf-8")
    with pytest.raises(UserError, match=message) as caught:
        read_corpus(build(ChunkDataConfig, {"source": {"path": str(tmp_path)}, **options}))
    assert "\n" not in str(caught.value)


def test_a_stopped_preparation_leaves_nothing_in_the_way(tmp_path, folder):
    out = tmp_path / "out"
    out.mkdir()
    (out / f".train.jsonl.{os.getpid() + 1}.tmp").write_text("half", "utf-8")
    prepare_corpus(build(ChunkDataConfig, {"source": {"path": str(folder)}}), out)
    assert sorted(p.name for p in out.iterdir())[0] == "chunks.safetensors"
