"""One record, three students: the same loss curve as under the live teacher, and never a teacher in memory."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenkit.config import UserError, build, dump_yaml, resolved
from tokenkit.data.records import MANIFEST, Record, Recording, read_manifest
from tokenkit.tokenizers.train import train_tokenizer
from tokenkit.verbs import prepare as prepare_verb
from tokenkit.verbs.distill import distill
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.record import RecordRun, record


@pytest.fixture
def runs(tmp_path, model_folder, corpus):
    """(record run, distill run) makers on the same model and text."""
    source = {"path": str(corpus), "separator": "\n\n"}
    held_out = {"source": {**source, "max_bytes": 300}, "context_tokens": 64}
    data = {"source": source, "window_bytes": 80}

    def recording(**changes):
        values = {"output": tmp_path / "record", "teacher": {"source": str(model_folder)}, "data": data}
        return build(RecordRun, values | {"shard_rows": 40} | changes)

    def distilling(**changes):
        train = {"steps": 6, "batch_size": 4, "log_every": 1, "optimizer": {"learning_rate": 1e-2}}
        values = {
            "output": tmp_path / "out",
            "model": {"source": str(model_folder)},
            "target_tokenizer": "byte",
            "losses": {"alm": {}, "clm": {"weight": 0.1}},
            "data": data,
            "train": train | changes.pop("train", {}),
            "eval": held_out,
        }
        return build(DistillRun, values | changes)

    return recording, distilling


def losses(folder: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return [{key: value for key, value in line.items() if key.startswith("loss")} for line in lines if "loss" in line]


def same_curve(a: Path, b: Path) -> bool:
    one, other = losses(a), losses(b)
    assert len(one) == len(other) == 6
    assert len({row["loss"] for row in one}) == 6  # it moves
    return all(x[key] == pytest.approx(y[key], abs=1e-5) for x, y in zip(one, other, strict=True) for key in x)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "run.yaml"}


@pytest.fixture
def no_teacher(monkeypatch):
    """Counts the models that a distilling run loads."""
    loaded = []
    load = prepare_verb.load_pair
    monkeypatch.setattr(
        prepare_verb, "load_pair", lambda *args, **options: loaded.append(args[0].source) or load(*args, **options)
    )
    monkeypatch.setattr(prepare_verb, "copy", None)  # nor is one copied
    return loaded


def test_three_students_of_one_record_learn_as_under_the_live_teacher(
    runs, tmp_path, documents, unigram, model_folder, no_teacher
):
    recording, distilling = runs
    record(recording(), quiet=True)
    small = train_tokenizer(documents, "bpe", 290)
    unigram.save(tmp_path / "unigram")
    small.save(tmp_path / "small")
    for number, target in enumerate(("byte", str(tmp_path / "unigram"), str(tmp_path / "small"))):
        live, taught = tmp_path / f"live{number}", tmp_path / f"taught{number}"
        teacher = {"source": str(model_folder)}
        distill(distilling(output=live, target_tokenizer=target, teacher=teacher), quiet=True)
        no_teacher.clear()
        distill(distilling(output=taught, target_tokenizer=target, record=tmp_path / "record"), quiet=True)
        assert no_teacher == [str(model_folder)]  # the student
        assert same_curve(live, taught)


PROJECTED = {"hidden_states": {"project": True, "chunks": "space"}}


@pytest.mark.parametrize(
    ("recorded", "losses", "target", "width"),
    [
        ({}, {"alm": {}, "clm": {"weight": 0.1}}, "byte", 32),
        ({"top_k": 16}, {"top_k_kl": {"top_k": 16}}, None, 32),
        ({"top_k": 20}, {"top_k_kl": {"top_k": 16}, "clm": {}}, None, 32),
        ({"hidden": True}, {"hidden_states": {}}, "byte", 32),
        ({"hidden": True}, {**PROJECTED, "alm": {}}, "byte", 48),
        ({"top_k": 16, "hidden": True}, {**PROJECTED, "top_k_kl": {"top_k": 16}}, None, 48),
    ],
    ids=["alm", "top_k", "fewer", "hidden", "projected", "both"],
)
def test_the_record_is_what_teaches(runs, tmp_path, model_folder, recorded, losses, target, width):
    """Another model's record: the curve of that teacher, gone by then, and not that of the student's own past."""
    recording, distilling = runs
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    torch.manual_seed(5)
    LlamaForCausalLM(LlamaConfig.from_pretrained(model_folder, hidden_size=width)).save_pretrained(other)
    record(recording(teacher={"source": str(other)}, **recorded), quiet=True)
    changes = {"losses": losses, "target_tokenizer": target, "train": {"accumulation": 2}}
    distill(distilling(output=tmp_path / "self", **changes), quiet=True)
    distill(distilling(output=tmp_path / "live", teacher={"source": str(other)}, **changes), quiet=True)
    shutil.rmtree(other)
    distill(distilling(output=tmp_path / "taught", record=tmp_path / "record", **changes), quiet=True)
    assert same_curve(tmp_path / "live", tmp_path / "taught")
    assert not same_curve(tmp_path / "self", tmp_path / "taught")


@pytest.mark.parametrize("mode", ["full", "lora", "embeddings"])
def test_a_model_is_taught_by_what_it_was(runs, tmp_path, mode):
    """Self-distillation, where the live teacher shares the student's body or is a copy of it."""
    recording, distilling = runs
    record(recording(batch_size=7), quiet=True)
    train = {"mode": mode, "accumulation": 2, "lora": {"rank": 2}}
    live = distill(distilling(output=tmp_path / "live", train=train), quiet=True)
    taught = distill(distilling(output=tmp_path / "taught", train=train, record=tmp_path / "record"), quiet=True)
    assert same_curve(tmp_path / "live", tmp_path / "taught")
    assert taught["trained_bits_per_byte"] == pytest.approx(live["trained_bits_per_byte"], abs=1e-5)


def test_the_teacher_may_be_gone(runs, tmp_path, model_folder):
    recording, distilling = runs
    shutil.copytree(model_folder, tmp_path / "teacher")
    record(recording(teacher={"source": str(tmp_path / "teacher")}), quiet=True)
    shutil.rmtree(tmp_path / "teacher")
    results = distill(distilling(record=tmp_path / "record"), quiet=True)
    assert results["teacher_bits_per_byte"] is None
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert [bar["kind"] for bar in report["bars"]] == ["zero_shot", "trained"]
    assert {"name": "teacher", "value": "recorded: teacher"} in report["facts"]
    assert report["aligned"] == []


def test_the_teachers_bits_per_byte_go_with_the_record(runs, tmp_path):
    recording, distilling = runs
    held_out = {k: v for k, v in resolved(distilling().eval).items() if k not in ("harness", "metrics")}
    found = record(recording(eval=held_out), quiet=True)
    live = distill(distilling(output=tmp_path / "live"), quiet=True)
    taught = distill(distilling(record=tmp_path / "record"), quiet=True)
    assert found["teacher_bits_per_byte"] == taught["teacher_bits_per_byte"] == live["teacher_bits_per_byte"]
    other = {**held_out, "context_tokens": 32}
    assert (
        distill(distilling(output=tmp_path / "b", record=tmp_path / "record", eval=other), quiet=True)[
            "teacher_bits_per_byte"
        ]
        is None
    )  # measured in another context


CHAT = """{%- for m in messages %}{{ '<|endoftext|>' + m.role + ': ' + m.content + '<|endoftext|>' }}{% endfor %}"""


@pytest.fixture
def chat(tmp_path, model_folder):
    """A teacher with a chat template, and data of conversations that do not all fit their rows."""
    folder = tmp_path / "chat"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").write_text(CHAT, "utf-8")
    rows = [
        [("user", f"the {word}"), ("assistant", f"{word} sat on a mat {'and then ran home ' * n}")]
        for n, word in enumerate(("cat", "fish", "home", "mat", "green"))
    ]
    lines = tmp_path / "rows.jsonl"
    said = [[{"role": role, "content": text} for role, text in row] for row in rows]
    lines.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in said), "utf-8")
    return folder, {"source": {"path": str(lines)}, "format": "chat", "window_bytes": 48}


HIDDEN = pytest.param({"hidden_states": {}}, marks=pytest.mark.slow)  # hidden states are taught from a record above


@pytest.mark.parametrize("extra", [{}, HIDDEN], ids=["alm", "hidden"])
def test_conversations_that_students_cut_in_different_places(runs, tmp_path, chat, extra):
    """A byte student's rows end long before the teacher's; what a student learns is not the record's business."""
    recording, distilling = runs
    folder, data = chat
    record(recording(teacher={"source": str(folder)}, data=data, hidden=bool(extra)), quiet=True)
    for number, train_on in enumerate(("assistant", "all")):
        changes = {"model": {"source": str(folder)}, "data": {**data, "train_on": train_on}}
        changes["losses"] = {"alm": {}, "clm": {"weight": 0.1}, **extra}
        changes["target_tokenizer"] = "byte:target=Qwen2"
        live, taught = tmp_path / f"live{number}", tmp_path / f"taught{number}"
        distill(distilling(output=live, **changes), quiet=True)
        distill(distilling(output=taught, record=tmp_path / "record", **changes), quiet=True)
        assert same_curve(live, taught)


def test_another_template_is_refused(runs, tmp_path, chat):
    recording, distilling = runs
    folder, data = chat
    record(recording(teacher={"source": str(folder)}, data=data), quiet=True)
    changes = {"model": {"source": str(folder)}, "record": tmp_path / "record", "target_tokenizer": "byte:target=Qwen2"}
    with pytest.raises(UserError, match=r"another data.template_options \('\{\}' there"):
        distill(distilling(**changes, data={**data, "template_options": {"date_string": "1 May"}}), quiet=True)
    template = tmp_path / "record" / "tokenizer" / "chat_template.jinja"
    template.write_text(CHAT.replace(": ", " : "), "utf-8")
    with pytest.raises(UserError, match="another chat template"):
        distill(distilling(**changes, data=data), quiet=True)
    assert not (tmp_path / "out").exists()


def test_another_corpus_or_cut_is_refused_before_anything_is_written(runs, tmp_path, corpus):
    recording, distilling = runs
    record(recording(), quiet=True)
    source = {"path": str(corpus), "separator": "\n\n"}
    for data, message in (
        ({"source": source, "window_bytes": 81}, "another data.window_bytes .80 there, 81 here"),
        ({"source": {**source, "max_bytes": 2000}, "window_bytes": 80}, "another corpus"),
        ({"source": {"path": str(corpus)}, "window_bytes": 80}, "another corpus"),
    ):
        with pytest.raises(UserError, match=message) as error:
            distill(distilling(record=tmp_path / "record", data=data), quiet=True)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_named_teacher_must_be_the_recorded_one(runs, tmp_path, model_folder, unigram):
    recording, distilling = runs
    record(recording(), quiet=True)
    same = tmp_path / "same"
    shutil.copytree(model_folder, same)
    distill(distilling(record=tmp_path / "record", teacher={"source": str(same)}), quiet=True)
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="another teacher weights"):
        distill(distilling(output=tmp_path / "b", record=tmp_path / "record", teacher={"source": str(other)}))
    unigram.save(tmp_path / "unigram")
    wrong = {"source": str(same), "tokenizer": {"name": str(tmp_path / "unigram")}}
    with pytest.raises(UserError, match="another teacher tokenizer"):
        distill(distilling(output=tmp_path / "b", record=tmp_path / "record", teacher=wrong), quiet=True)


@pytest.mark.parametrize(
    ("recorded", "losses", "message"),
    [
        ({}, {"forward_kl": {}}, r"teacher's logits, but .* holds label_logp and boundary_logp only; only a live"),
        ({}, {"top_k_kl": {"top_k": 16}}, r"teacher's tail_logp, top_ids, top_logp, .*; record again with top_k=16$"),
        ({}, {"hidden_states": {}}, r"teacher's hidden, .*; record again with hidden=true$"),
        ({"top_k": 8}, {"top_k_kl": {"top_k": 16}}, r"16 best ids, but .* holds 8; write 8 or less .* with top_k=16$"),
        ({"hidden": True}, {"hidden_states": {"states": "all"}}, r"teacher's layers, but .*; only a live teacher"),
    ],
    ids=["logits", "top_k", "hidden", "more", "layers"],
)
def test_losses_that_want_more_are_told_what_there_is(runs, tmp_path, recorded, losses, message):
    recording, distilling = runs
    record(recording(**recorded), quiet=True)
    with pytest.raises(UserError, match=message) as error:
        distill(distilling(target_tokenizer=None, losses=losses, record=tmp_path / "record"), quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_what_a_teacher_cannot_say_is_refused(runs, tmp_path, model_folder, bpe):
    recording, _ = runs
    with pytest.raises(UserError, match=f"top_k: 500, but the teacher has {bpe.vocab_size} ids"):
        record(recording(top_k=500), quiet=True)
    with pytest.raises(UserError, match="top_k"):
        recording(top_k=0)
    assert not (tmp_path / "record").exists()
    loud = LlamaForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        loud.model.norm.weight.fill_(1e5)
    loud.save_pretrained(tmp_path / "loud")
    bpe.save(tmp_path / "loud")
    changes = {"teacher": {"source": str(tmp_path / "loud")}, "hidden": True}
    with pytest.raises(
        UserError, match=r"float16 ends at 65,504, but the teacher's hidden reaches \d+,\d+; write store"
    ):
        record(recording(store="float16", **changes), quiet=True)


def test_training_finds_damage_before_it_begins(runs, tmp_path):
    recording, distilling = runs
    record(recording(), quiet=True)
    path = tmp_path / "record" / "shard_000001.safetensors"
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 4
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"shard_000001\.safetensors does not have the checksum"):
        distill(distilling(record=tmp_path / "record"), quiet=True)
    assert not (tmp_path / "out").exists()
    record(recording(), resume=True, quiet=True)
    distill(distilling(record=tmp_path / "record"), quiet=True)


@pytest.mark.parametrize(
    ("more", "most"),
    [
        ({}, 8),
        ({"top_k": 16}, 8 + 4 + 16 * 6),
        ({"top_k": 16, "store": "float16"}, 8 + 4 + 16 * 4),
        ({"hidden": True}, 8 + 32 * 4),
        ({"hidden": True, "store": "float16"}, 8 + 32 * 2),
    ],
)
def test_at_most_eight_bytes_per_token_and_what_is_asked_for(runs, tmp_path, more, most):
    recording, _ = runs
    found = record(recording(shard_rows=8192, **more), quiet=True)
    shards = sum(path.stat().st_size for path in (tmp_path / "record").glob("shard_*"))
    manifest = read_manifest(tmp_path / "record")
    assert found["bytes_per_token"] == manifest.bytes_per_token == pytest.approx(shards / manifest.tokens, abs=1e-6)
    assert most * 0.9 < found["bytes_per_token"] <= most


EVERYTHING = {"top_k": 16, "hidden": True, "store": "float16"}


@pytest.mark.parametrize("more", [{}, EVERYTHING], ids=["alm", "all"])
def test_an_interrupted_recording_goes_on_and_is_the_same(runs, tmp_path, monkeypatch, more):
    make, _ = runs
    recording = partial(make, **more)
    whole = record(recording(output=tmp_path / "whole"), quiet=True)
    add = Recording.add

    def stop(self, number, first, rows):
        if number == 2:
            raise KeyboardInterrupt
        add(self, number, first, rows)

    monkeypatch.setattr(Recording, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        record(recording(), quiet=True)
    with pytest.raises(UserError, match="add --resume"):
        record(recording(), quiet=True)
    with pytest.raises(UserError, match="cannot resume with another config: shard_rows"):
        record(recording(shard_rows=50), resume=True, quiet=True)
    for other in ({"top_k": 4}, {"hidden": not more}, {"store": "float32" if more else "float16"}):
        with pytest.raises(UserError, match=f"cannot resume with another config: {next(iter(other))}"):
            record(recording(**other), resume=True, quiet=True)
    numbers = []
    monkeypatch.setattr(Recording, "add", lambda self, n, *rest: (numbers.append(n), add(self, n, *rest)))
    assert record(recording(), resume=True, quiet=True) | {"record": ""} == whole | {"record": ""}
    assert numbers == list(range(2, whole["shards"]))
    assert contents(tmp_path / "record") == contents(tmp_path / "whole")


def test_resuming_under_a_changed_corpus_is_refused(runs, tmp_path, corpus):
    recording, _ = runs
    text = tmp_path / "text.txt"
    text.write_text(corpus.read_text("utf-8"), "utf-8")
    data = {"source": {"path": str(text)}, "window_bytes": 80}
    record(recording(data=data), quiet=True)
    text.write_text(corpus.read_text("utf-8") + "and more", "utf-8")
    with pytest.raises(UserError, match="another corpus"):
        record(recording(data=data), resume=True, quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, EVERYTHING], ids=["alm", "all"])
def test_a_killed_recording_goes_on_and_is_the_same(runs, tmp_path, more):
    recording = partial(runs[0], **more)
    run = recording(output=tmp_path / "killed", shard_rows=2, batch_size=1)
    file = tmp_path / "run.yaml"
    file.write_text(dump_yaml(resolved(run)), "utf-8")
    command = [sys.executable, "-m", "tokenkit.cli", "record", str(file), "-q"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    third = tmp_path / "killed" / "shard_000002.safetensors"
    while not third.exists():
        assert process.poll() is None, "it was over before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(UserError, match="unfinished"):
        Record(tmp_path / "killed")
    assert not read_manifest(tmp_path / "killed").complete
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("shard_*")}
    record(run, resume=True, quiet=True)
    listed = read_manifest(tmp_path / "killed").shards
    assert sum(shard.rows for shard in listed) == Record(tmp_path / "killed").manifest.rows  # no row twice
    again = [n for n, t in kept.items() if (tmp_path / "killed" / n).stat().st_mtime_ns != t]
    assert len(again) <= 1  # written, but not listed yet
    record(recording(output=tmp_path / "whole", shard_rows=2, batch_size=1), quiet=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert MANIFEST in contents(tmp_path / "whole")
