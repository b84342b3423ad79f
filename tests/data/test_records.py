"""A record on disk: what is read is what was written, and any damage is found before a step is taken."""

import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.config import UserError
from tokenkit.data.example import Side, cut
from tokenkit.data.messages import Dialogue
from tokenkit.data.records import (
    MANIFEST,
    Manifest,
    Record,
    Recording,
    RowScores,
    check_identity,
    read_manifest,
    row_checksum,
    rows_identity,
)

IDENTITY = {"data.format": "text", "data.window_bytes": 64, "corpus": "c" * 64}


def made_up(rows: int, seed: int = 0, longest: int = 30) -> list[RowScores]:
    rng = np.random.default_rng(seed)
    found = []
    for length in rng.integers(1, longest, rows).tolist():
        scores = -rng.exponential(3, (2, length - 1)).astype(np.float32)
        found.append(RowScores(rng.integers(0, 1000, length).astype(np.int32), scores[0], scores[1]))
    return found


def write(folder, scores, shard_rows=7, identity=IDENTITY, finish=True):
    folder.mkdir(exist_ok=True)
    recording = Recording(folder, Manifest(teacher="t", text="x", identity=identity, rows=len(scores)))
    for number, first in enumerate(range(0, len(scores), shard_rows)):
        if not recording.has(number):
            recording.add(number, first, scores[first : first + shard_rows])
    return recording.finish() if finish else None


def side(row: RowScores, count: int | None = None, trained=None) -> Side:
    ids = row.ids[:count]
    learnt = np.ones(len(ids), np.bool_) if trained is None else trained
    return Side(ids, np.zeros(len(ids), np.int32), learnt)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("shard_rows", [1, 7, 100])
def test_rows_are_read_as_they_were_written_in_any_order(tmp_path, shard_rows):
    scores = made_up(40)
    write(tmp_path / "r", scores, shard_rows)
    record = Record(tmp_path / "r")
    order = np.random.default_rng(1).permutation(40).tolist()
    width = 32
    leaves = record.leaves(order, [side(scores[row]) for row in order], width)
    for place, row in enumerate(order):
        one, rest = scores[row], width - len(scores[row].ids) + 1
        label = np.concatenate([one.label_logp, np.zeros(rest, np.float32)])
        mass = np.concatenate([[np.float32(0)], one.boundary_logp, np.zeros(rest - 1, np.float32)])
        assert np.array_equal(leaves["teacher_label_logp"][place].numpy(), label)
        assert np.array_equal(leaves["teacher_boundary_logp"][place].numpy(), mass)


def test_what_a_student_does_not_learn_is_zero(tmp_path):
    scores = made_up(5)
    write(tmp_path / "r", scores)
    trained = np.arange(len(scores[3].ids)) % 2 == 0
    leaves = Record(tmp_path / "r").leaves([3], [side(scores[3], trained=trained)], 32)
    assert np.array_equal(
        leaves["teacher_label_logp"][0, : len(trained) - 1].numpy(), np.where(trained[1:], scores[3].label_logp, 0)
    )


def test_eight_bytes_per_token_on_disk(tmp_path):
    scores = made_up(3000, longest=60)
    manifest = write(tmp_path / "r", scores, shard_rows=1000)
    tokens = sum(len(row.ids) for row in scores)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "r").iterdir())  # the manifest among them
    assert manifest.tokens == tokens
    assert manifest.bytes_per_token <= on_disk / tokens <= 8


@pytest.mark.parametrize("stop", [0, 1, 3, 5])
@pytest.mark.parametrize("listed", [True, False])
def test_what_was_finished_is_kept_and_the_rest_is_the_same(tmp_path, stop, listed):
    """Killed after a shard was written and before (or after) the manifest listed it."""
    scores = made_up(40)
    write(tmp_path / "whole", scores)
    folder = tmp_path / "killed"
    folder.mkdir()
    recording = Recording(folder, Manifest(teacher="t", text="x", identity=IDENTITY, rows=40))
    for number in range(stop):
        recording.add(number, number * 7, scores[number * 7 : number * 7 + 7])
    if not listed:
        before = (folder / MANIFEST).read_bytes()
        recording.add(stop, stop * 7, scores[stop * 7 : stop * 7 + 7])
        (folder / MANIFEST).write_bytes(before)
    (folder / ".shard_000009.77.tmp.safetensors").write_bytes(b"half")
    kept = {name: (folder / name).stat().st_mtime_ns for name in [f"shard_{n:06d}.safetensors" for n in range(stop)]}
    with pytest.raises(UserError, match="unfinished"):
        Record(folder)
    write(folder, scores)
    assert contents(folder) == contents(tmp_path / "whole")
    assert all((folder / name).stat().st_mtime_ns == time for name, time in kept.items())


def test_a_damaged_shard_is_recorded_again(tmp_path, caplog):
    scores = made_up(40)
    write(tmp_path / "whole", scores)
    write(tmp_path / "r", scores)
    path = tmp_path / "r" / "shard_000002.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with caplog.at_level(logging.WARNING):
        write(tmp_path / "r", scores)
    assert "shard_000002.safetensors has" in caplog.text
    assert contents(tmp_path / "r") == contents(tmp_path / "whole")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "r"
    write(folder, made_up(20))
    return folder


@given(st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_flipped_bit_is_found(damaged, data):
    path = data.draw(st.sampled_from(sorted(damaged.iterdir())))
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    broken = bytearray(whole)
    broken[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(broken)
    try:
        with pytest.raises(UserError) as error:
            Record(damaged)
        assert "\n" not in str(error.value)
    except pytest.fail.Exception:  # only white space between the values of the manifest may change unseen
        assert path.name == MANIFEST
        assert json.loads(broken) == json.loads(whole)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes of"),
        (lambda path: path.write_bytes(b""), "has 0 bytes"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes of"),
    ],
)
def test_missing_and_truncated_shards_are_found(tmp_path, harm, message):
    write(tmp_path / "r", made_up(20))
    harm(tmp_path / "r" / "shard_000001.safetensors")
    with pytest.raises(UserError, match=f"shard_000001.safetensors .*{message}|{message}.*") as error:
        Record(tmp_path / "r")
    assert "\n" not in str(error.value)


def test_a_folder_without_a_record(tmp_path):
    with pytest.raises(UserError, match="no such file; write the folder"):
        Record(tmp_path)
    (tmp_path / MANIFEST).write_text('{"format": 2}')
    with pytest.raises(UserError, match="not a record of format 1"):
        Record(tmp_path)
    (tmp_path / MANIFEST).write_text("[]")
    with pytest.raises(UserError, match="not a record"):
        read_manifest(tmp_path)


def test_other_tokens_than_the_recorded_ones_are_refused(tmp_path):
    scores = made_up(20, longest=40)
    row = max(range(20), key=lambda i: len(scores[i].ids))
    write(tmp_path / "text", scores)
    write(tmp_path / "chat", scores, identity={**IDENTITY, "data.format": "chat"})
    other = RowScores(scores[row].ids + 1, scores[row].label_logp, scores[row].boundary_logp)
    for kind in ("text", "chat"):
        with pytest.raises(UserError, match=f"row {row} was recorded with other tokens"):
            Record(tmp_path / kind).leaves([row], [side(other)], 64)
    with pytest.raises(UserError, match="other tokens"):
        Record(tmp_path / "text").leaves([row], [side(scores[row], 5)], 64)
    cut_short = Record(tmp_path / "chat").leaves([row], [side(scores[row], 5)], 64)
    assert np.array_equal(cut_short["teacher_label_logp"][0, :4].numpy(), scores[row].label_logp[:4])
    assert not cut_short["teacher_label_logp"][0, 4:].any()
    assert np.array_equal(cut_short["teacher_boundary_logp"][0, 1:5].numpy(), scores[row].boundary_logp[:4])


def test_checksums_tell_tokenisations_apart():
    rng = np.random.default_rng(0)
    seen = {row_checksum(rng.integers(0, 300, 20).astype(np.int32)) for _ in range(200)}
    assert len(seen) > 190
    assert row_checksum(np.arange(5, dtype=np.int32)) == row_checksum(np.arange(5, dtype=np.int64))


def test_the_first_difference_is_named():
    check_identity(Path("r"), IDENTITY, {"data.window_bytes": 64})
    with pytest.raises(UserError, match=r"r: recorded with another data.window_bytes \(64 there, 80 here\)"):
        check_identity(Path("r"), IDENTITY, {**IDENTITY, "data.window_bytes": 80, "corpus": "d"})
    with pytest.raises(UserError, match=r"another corpus \('cccccccccccc' there, 'dddddddddddd' here\)"):
        check_identity(Path("r"), IDENTITY, {**IDENTITY, "corpus": "d" * 64})


def test_the_identity_of_rows(bpe, unigram, documents):
    def of(rows, tokenizer=bpe, **changes):
        how = {"format": "text", "window_bytes": 80, "template_options": {}} | changes
        return rows_identity(rows, tokenizer, **how)

    rows = cut(documents[:3], 80)
    plain = of(rows)
    assert of(cut(documents[:3], 80)) == plain
    changed = [
        of(rows[:-1]),
        of([*rows[1:], rows[0]]),
        of(cut([documents[0] + "!", *documents[1:3]], 80)),
        of(rows, unigram),
        of(rows, window_bytes=81),
    ]
    assert all(other != plain for other in changed)
    assert of(rows, template_options={"a": 1}) == plain  # text has no template
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat = [Dialogue(0, said)]
    talk = of(chat, format="chat")
    assert of([Dialogue(0, [said[0], {**said[1], "content": "c"}])], format="chat")["corpus"] != talk["corpus"]
    assert of([Dialogue(0, said, [{"name": "f"}])], format="chat")["corpus"] != talk["corpus"]
    assert of(chat, format="chat", template_options={"a": 1}) != talk


def test_the_same_rows_give_the_same_bytes(tmp_path):
    write(tmp_path / "a", made_up(20))
    write(tmp_path / "b", made_up(20))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    shard = read_manifest(tmp_path / "a").shards[1]
    assert hashlib.sha256((tmp_path / "a" / shard.file).read_bytes()).hexdigest() == shard.sha256
