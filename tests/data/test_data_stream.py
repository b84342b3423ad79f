"""Streams: nothing is held, every epoch has every row, and a position says all that a resumed run needs."""

import gzip
import json
import re
from collections import Counter
from io import StringIO
from itertools import islice

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.config import UserError, build
from tokenkit.data import source as source_module
from tokenkit.data.batch import Batches
from tokenkit.data.corpus import DataConfig, read_texts, read_training_rows
from tokenkit.data.source import SourceConfig, iterate_documents, read_documents
from tokenkit.data.stream import Stream, StreamedRows, held


class Reader:
    """Rows that count how often they are begun, and how far they are read."""

    def __init__(self, length):
        self.length, self.begun, self.read = length, 0, 0

    def __call__(self):
        self.begun += 1
        for row in range(self.length):
            self.read += 1
            yield row


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5))
def test_every_epoch_has_every_row_and_any_place_can_be_begun_with(length, buffer, seed):
    stream = Stream(Reader(length), "rows", buffer, [seed])
    run = [stream.row(i) for i in range(3 * length)]
    epochs = [run[i : i + length] for i in range(0, 3 * length, length)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    for begin in {0, 1, length - 1, length, 2 * length + length // 2}:
        later = Stream(Reader(length), "rows", buffer, [seed])
        assert [later.row(i) for i in range(begin, 3 * length)] == run[begin:]


def test_rows_move_no_further_than_their_buffer_and_epochs_differ():
    stream = Stream(Reader(100), "rows", 10, [1])
    first, second = ([stream.row(i) for i in range(e * 100, (e + 1) * 100)] for e in range(2))
    assert first != sorted(first) != second != first
    assert all(abs(place - row) < 10 for place, row in enumerate(first))
    assert [Stream(Reader(100), "rows", 1, [1]).row(i) for i in range(5)] == [0, 1, 2, 3, 4]


def test_a_stream_reads_one_buffer_further_than_it_is_asked_for():
    reader = Reader(10_000)
    stream = Stream(reader, "rows", 16, [0])
    for i in range(100):
        stream.row(i)
    assert reader.read == 112
    stream.row(95)  # the buffer before is still there: a step that is asked for again
    assert (reader.read, reader.begun) == (112, 1)
    stream.row(0)
    assert reader.begun == 2


def test_a_run_that_goes_on_many_epochs_later_reads_two_epochs_at_most():
    reader = Reader(50)
    Stream(reader, "rows", 8, [0]).row(50 * 1000 + 3)
    assert reader.read <= 50 + 8


def test_an_empty_stream_is_an_error():
    with pytest.raises(UserError, match="nothing here: an empty corpus"):
        Stream(Reader(0), "nothing here", 8, [0]).row(0)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from(["a", "\n", "==", "text ", "=", "\n\n"]), max_size=60).map("".join))
def test_documents_of_a_file_are_those_of_a_split(text):
    pattern = re.compile(r"\n\n+|==")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_module, "BLOCK", 7)
        patch.setattr(source_module, "LONGEST_SEPARATOR", 60)
        assert list(source_module._separated(StringIO(text, newline="").read, pattern)) == pattern.split(text)


def written(folder, kind):
    """The same 24 documents in one of the ways that they may lie on a disk."""
    texts = [f"document {i}: " + "words of it " * (i % 5) for i in range(24)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    if kind == "jsonl":
        (folder / "a.jsonl").write_text(lines, "utf-8")
        return texts, {"path": str(folder / "a.jsonl")}
    if kind == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        return texts, {"path": str(folder / "a.jsonl.gz")}
    if kind == "text":
        (folder / "a.txt").write_text("<end>".join(texts), "utf-8")
        return texts, {"path": str(folder / "a.txt"), "separator": "<end>"}
    if kind == "parquet":
        Dataset.from_dict({"text": texts}).to_parquet(folder / "a.parquet")
        return texts, {"path": str(folder / "a.parquet")}
    if kind == "saved":
        Dataset.from_dict({"text": texts}).save_to_disk(folder / "saved")
        return texts, {"saved": str(folder / "saved")}
    (folder / "hub").mkdir()
    (folder / "hub" / "train.jsonl").write_text(lines, "utf-8")
    return texts, {"hub": str(folder / "hub")}


KINDS = ("jsonl", "jsonl.gz", "text", "parquet", "saved", "hub")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_streams_what_it_holds(tmp_path, kind):
    texts, source = written(tmp_path, kind)
    config = SourceConfig(**source)
    assert list(iterate_documents(config, streaming=True)) == read_documents(config) == texts
    assert list(islice(iterate_documents(SourceConfig(**source, max_documents=3), streaming=True), 9)) == texts[:3]
    data = build(DataConfig, {"source": source, "streaming": True, "shuffle_buffer": 5, "window_bytes": 32})
    whole = read_training_rows(data.model_copy(update={"streaming": False}))
    rows = read_training_rows(data)
    assert isinstance(rows, StreamedRows)
    assert rows[:7] == whole[:7]
    read = rows.seeded(0)
    assert sorted(r.text for r in whole) == sorted(read[i].text for i in range(len(whole)))
    assert read_texts(data) == texts


def stream(tmp_path, **options):
    made = []
    for name, count in (("en", 20), ("de", 4)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name} {i} " * 9}) + "\n" for i in range(count)), "utf-8")
        made.append({"path": str(path), "language": name, "weight": 1})
    fixed = {"streaming": True, "shuffle_buffer": 4, "mixture": made}
    return build(DataConfig, {"window_bytes": 48, **options} | fixed)


@pytest.mark.parametrize("options", [{}, {"packing": True, "window_bytes": 128}, {"mix_languages": False}], ids=str)
def test_batches_of_a_stream_resume_in_the_middle_bit_for_bit(bpe, tmp_path, options):
    data = stream(tmp_path, **options)
    begun = Batches(read_training_rows(data), bpe, None, batch_size=4, seed=3, pack_bytes=data.pack_bytes)
    expected = [begun.at(step, 2) for step in range(24)]  # several epochs of the small source, one of the large
    for step in (23, 7, 8, 0):
        again = Batches(read_training_rows(data), bpe, None, batch_size=4, seed=3, pack_bytes=data.pack_bytes)
        for one, other in zip(again.at(step, 2), expected[step], strict=True):
            assert one.rows == other.rows
            assert all(one.tensors[name].equal(tensor) for name, tensor in other.tensors.items())
    rows = Counter(begun.order.name(n) for step in range(24) for n in begun.rows(step))
    assert rows == begun.rows_read(24)
    assert "document" in begun.place(23)


def test_what_needs_every_row_says_that_a_stream_has_none(tmp_path):
    rows = read_training_rows(stream(tmp_path))
    assert rows
    for ask in (held, list, lambda some: some[:], lambda some: some[:-1]):
        with pytest.raises(UserError, match="streaming: true, but this needs every row"):
            ask(rows)


def test_conversations_are_streamed_too(bpe, tmp_path):
    path = tmp_path / "chat.jsonl"
    turns = [[{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}"}] for i in range(9)]
    path.write_text("".join(json.dumps({"messages": some}) + "\n" for some in turns), "utf-8")
    data = build(DataConfig, {"source": {"path": str(path)}, "format": "chat", "streaming": True})
    whole = read_training_rows(data.model_copy(update={"streaming": False}))
    rows = read_training_rows(data).seeded(0)
    assert sorted(rows[i].document for i in range(9)) == [row.document for row in whole] == list(range(9))
