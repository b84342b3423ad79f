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
    HIDDEN,
    HOLDS,
    MANIFEST,
    TOP,
    Manifest,
    Record,
    Recording,
    RowScores,
    Wanted,
    check_identity,
    positions,
    read_manifest,
    row_checksum,
    rows_identity,
    sha256_of,
)

IDENTITY = {"data.format": "text", "data.window_bytes": 64, "corpus": "c" * 64}


WIDTH, BEST = 6, 5
MORE = {"holds": (*HOLDS, *TOP, HIDDEN), "top_k": BEST, "hidden_width": WIDTH}


def made_up(rows: int, seed: int = 0, longest: int = 30) -> list[RowScores]:
    rng = np.random.default_rng(seed)
    found = []
    for length in rng.integers(1, longest, rows).tolist():
        scores = -rng.exponential(3, (2, length - 1)).astype(np.float32)
        ids = rng.integers(0, 1000, length).astype(np.int32)
        found.append(RowScores(ids, dict(zip(HOLDS, scores, strict=True))))
    return found


def with_more(scores: list[RowScores], store="float32", ids=np.uint16) -> list[RowScores]:
    """The same rows; their best ids of a vocabulary of nine and their hidden states beside the two floats."""
    rng, found = np.random.default_rng(9), []
    for row in scores:
        logp = np.log(rng.dirichlet(np.ones(9), len(row.ids) - 1).astype(np.float32).reshape(-1, 9))
        order = np.argsort(-logp, 1)
        said = {
            "top_logp": np.take_along_axis(logp, order, 1)[:, :BEST].astype(store),
            "top_ids": (order[:, :BEST] + np.iinfo(ids).max - 9).astype(ids),
            "tail_logp": np.logaddexp.reduce(np.take_along_axis(logp, order, 1)[:, BEST:], 1),
            HIDDEN: rng.normal(size=(len(row.ids), WIDTH)).astype(store),
        }
        found.append(RowScores(row.ids, {**row.said, **said}))
    return found


def write(folder, scores, shard_rows=7, identity=IDENTITY, finish=True, **layout):
    folder.mkdir(exist_ok=True)
    recording = Recording(folder, Manifest(teacher="t", text="x", identity=identity, rows=len(scores), **layout))
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
        one, rest = scores[row].said, width - len(scores[row].ids) + 1
        label = np.concatenate([one["label_logp"], np.zeros(rest, np.float32)])
        mass = np.concatenate([[np.float32(0)], one["boundary_logp"], np.zeros(rest - 1, np.float32)])
        assert np.array_equal(leaves["teacher_label_logp"][place].numpy(), label)
        assert np.array_equal(leaves["teacher_boundary_logp"][place].numpy(), mass)


@pytest.mark.parametrize("shard_rows", [1, 7, 100])
@pytest.mark.parametrize(("store", "ids"), [("float32", np.uint16), ("float16", np.int32)])
def test_best_ids_and_hidden_states_are_read_as_they_were_written(tmp_path, shard_rows, store, ids):
    scores = with_more(made_up(40), store, ids)
    write(tmp_path / "r", scores, shard_rows, store=store, **MORE)
    order = np.random.default_rng(1).permutation(40).tolist()
    wanted = Wanted(frozenset(MORE["holds"]), BEST)
    leaves = Record(tmp_path / "r").leaves(order, [side(scores[row]) for row in order], 32, wanted)
    assert {name.removeprefix("teacher_") for name in leaves} == wanted.names
    for name in wanted.names:
        found = leaves[f"teacher_{name}"].numpy()
        assert found.dtype == (np.int64 if name == "top_ids" else np.float32)  # as a model yields them
        for place, row in enumerate(order):
            said, span = scores[row].said[name], positions(name, len(scores[row].ids) - 1)
            assert len(said) == len(scores[row].ids) - (name != HIDDEN)
            assert np.array_equal(found[place, span], said)
            assert not np.delete(found[place], span, 0).any()


@pytest.mark.parametrize("names", [{"hidden"}, {"top_logp", "top_ids"}, {"tail_logp"}, {"label_logp"}, set()])
def test_only_what_is_wanted_is_read(tmp_path, names):
    scores = with_more(made_up(9))
    write(tmp_path / "r", scores, **MORE)
    leaves = Record(tmp_path / "r").leaves([4], [side(scores[4])], 32, Wanted(frozenset(names), BEST))
    assert set(leaves) == {f"teacher_{name}" for name in names}


@pytest.mark.parametrize("top_k", [1, 3, BEST])
def test_ids_beyond_the_wanted_ones_are_part_of_the_tail(tmp_path, top_k):
    scores = with_more(made_up(9))
    write(tmp_path / "r", scores, **MORE)
    row = max(range(9), key=lambda i: len(scores[i].ids))
    leaves = Record(tmp_path / "r").leaves([row], [side(scores[row])], 32, Wanted(frozenset(TOP), top_k))
    scored, said = len(scores[row].ids) - 1, scores[row].said
    logp, tail = (leaves[f"teacher_{name}"][0, :scored].numpy() for name in ("top_logp", "tail_logp"))
    assert np.array_equal(logp, said["top_logp"][:, :top_k])
    assert np.array_equal(leaves["teacher_top_ids"][0, :scored].numpy(), said["top_ids"][:, :top_k])
    assert leaves["teacher_top_ids"].shape == (1, 32, top_k)
    np.testing.assert_allclose(np.exp(logp).sum(1) + np.exp(tail), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("names", "top_k", "message"),
    [
        (
            {"top_logp", "tail_logp"},
            64,
            r"the teacher's 64 best ids, but .*r holds 5; write 5 or less .* with top_k=64",
        ),
        (
            {"layers", "hidden"},
            None,
            "need the teacher's layers, but .* and hidden only; only a live teacher has layers",
        ),
    ],
)
def test_more_than_was_recorded_is_refused_in_one_line(tmp_path, names, top_k, message):
    write(tmp_path / "r", with_more(made_up(9)), **MORE)
    record = Record(tmp_path / "r")
    record.check_needs(Wanted(frozenset(MORE["holds"]), BEST), ["a"])
    with pytest.raises(UserError, match=rf"losses \(a, b\): .*{message}") as error:
        record.check_needs(Wanted(frozenset(names), top_k), ["a", "b"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "top_k", "message"),
    [
        (
            {"top_logp", "tail_logp"},
            16,
            "tail_logp, top_logp, .* label_logp and boundary_logp only; record again with top_k=16$",
        ),
        ({"label_logp", "hidden"}, None, "hidden, .*; record again with hidden=true$"),
        ({"top_ids", "hidden"}, 8, "hidden, top_ids, .*; record again with top_k=8 hidden=true$"),
        ({"eos_logp", "hidden"}, 8, "only a live teacher has eos_logp: leave record out, or use alm"),
    ],
)
def test_a_record_of_two_floats_says_how_to_record_the_rest(tmp_path, names, top_k, message):
    write(tmp_path / "r", made_up(9))
    with pytest.raises(UserError, match=message):
        Record(tmp_path / "r").check_needs(Wanted(frozenset(names), top_k), ["a"])


@pytest.mark.parametrize("other", [{"top_k": 4}, {"hidden_width": None}, {"store": "float16"}])
def test_a_recording_goes_on_with_what_it_began_to_record(tmp_path, other):
    scores = with_more(made_up(20))
    write(tmp_path / "r", scores, finish=False, **MORE)
    before = contents(tmp_path / "r")
    with pytest.raises(UserError, match=r"recorded with another (top_k|hidden|store) .* there, .* here"):
        write(tmp_path / "r", scores, **{**MORE, **other})
    assert contents(tmp_path / "r") == before


def test_a_record_of_before_there_was_more_is_read(tmp_path):
    """Manifests of format 1 that do not have the newer keys."""
    scores = made_up(20)
    write(tmp_path / "r", scores)
    values = json.loads((tmp_path / "r" / MANIFEST).read_text("utf-8"))
    old = {key: value for key, value in values.items() if key not in ("sha256", "top_k", "store", "hidden_width")}
    (tmp_path / "r" / MANIFEST).write_text(json.dumps({**old, "sha256": sha256_of([json.dumps(old).encode()])}))
    leaves = Record(tmp_path / "r").leaves([2], [side(scores[2])], 32)
    count = len(scores[2].ids) - 1
    assert np.array_equal(leaves["teacher_label_logp"][0, :count].numpy(), scores[2].said["label_logp"])


def test_the_bytes_of_two_floats_are_what_they_were(tmp_path):
    """The shard that the first release of the format wrote for these rows."""
    rows = []
    for length in (1, 4, 2):
        values = np.arange(length - 1, dtype=np.float32)
        said = {"label_logp": -values, "boundary_logp": values / 2 - 9}
        rows.append(RowScores(np.arange(length, dtype=np.int32), said))
    write(tmp_path / "r", rows)
    raw = (tmp_path / "r" / "shard_000000.safetensors").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == "3b436e7596f1723c8b693b769aa5fabe73e3d5cf62ad10f598e279e4e3ea32a5"


def test_what_a_student_does_not_learn_is_zero(tmp_path):
    scores = made_up(5)
    write(tmp_path / "r", scores)
    trained = np.arange(len(scores[3].ids)) % 2 == 0
    leaves = Record(tmp_path / "r").leaves([3], [side(scores[3], trained=trained)], 32)
    assert np.array_equal(
        leaves["teacher_label_logp"][0, : len(trained) - 1].numpy(),
        np.where(trained[1:], scores[3].said["label_logp"], 0),
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
@pytest.mark.parametrize("layout", [{}, MORE], ids=["alm", "all"])
def test_what_was_finished_is_kept_and_the_rest_is_the_same(tmp_path, stop, listed, layout):
    """Killed after a shard was written and before (or after) the manifest listed it."""
    scores = with_more(made_up(40))
    write(tmp_path / "whole", scores, **layout)
    folder = tmp_path / "killed"
    folder.mkdir()
    recording = Recording(folder, Manifest(teacher="t", text="x", identity=IDENTITY, rows=40, **layout))
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
    write(folder, scores, **layout)
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


@pytest.fixture(scope="module", params=[{}, MORE], ids=["alm", "all"])
def damaged(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("damaged") / "r"
    write(folder, with_more(made_up(20)), **request.param)
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
    scores = with_more(made_up(20, longest=40))
    row = max(range(20), key=lambda i: len(scores[i].ids))
    write(tmp_path / "text", scores)
    write(tmp_path / "chat", scores, identity={**IDENTITY, "data.format": "chat"}, **MORE)
    other = RowScores(scores[row].ids + 1, scores[row].said)
    for kind in ("text", "chat"):
        with pytest.raises(UserError, match=f"row {row} was recorded with other tokens"):
            Record(tmp_path / kind).leaves([row], [side(other)], 64)
    with pytest.raises(UserError, match="other tokens"):
        Record(tmp_path / "text").leaves([row], [side(scores[row], 5)], 64)
    wanted = Wanted(frozenset(MORE["holds"]), BEST)
    cut_short = Record(tmp_path / "chat").leaves([row], [side(scores[row], 5)], 64, wanted)
    for name, said in scores[row].said.items():
        values, span = cut_short[f"teacher_{name}"][0].numpy(), positions(name, 4)
        assert np.array_equal(values[span], said[: 5 if name == HIDDEN else 4])
        assert not np.delete(values, span, 0).any()


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
