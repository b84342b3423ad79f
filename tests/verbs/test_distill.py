"""What a distilling run is made of: one weight copy, a teacher that never moves, and laws of the whole way."""

import json
import shutil

import pytest
import torch

from tokenkit.config import UserError, build
from tokenkit.models.load import head_matrix, input_matrix, load_model
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.verbs.distill import DistillRun, distill, prepare


@pytest.fixture
def run(tmp_path, model_folder, corpus):
    def make(**changes):
        source = {"path": str(corpus), "separator": "\n\n"}
        train = {"steps": 4, "batch_size": 4, "optimizer": {"learning_rate": 1e-2}} | changes.pop("train", {})
        values = {
            "output": tmp_path / "out",
            "model": {"source": str(model_folder)},
            "target_tokenizer": "byte",
            "losses": {"alm": {}},
            "data": {"source": source, "window_bytes": 80},
            "train": train,
            "eval": {"source": {**source, "max_bytes": 300}, "context_tokens": 64},
        }
        return build(DistillRun, values | changes)

    return make


def logits(view, ids):
    with torch.no_grad():
        return view.hidden(ids) @ view.head().T


@pytest.mark.parametrize("mode", ["full", "lora", "embeddings"])
@pytest.mark.parametrize("untie", [False, True])
def test_the_teacher_is_the_model_before_the_change_and_stays_it(run, model_folder, mode, untie):
    original = ModelView(load_model(str(model_folder)))
    sides = prepare(run(train={"mode": mode}, transfer={"untie": untie}))
    ids = torch.arange(40).view(2, 20)
    assert torch.equal(logits(sides.teacher, ids), logits(original, ids))
    assert (sides.teacher.model is sides.student.model) == (mode != "full")
    for parameter in sides.student.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    assert torch.equal(logits(sides.teacher, ids), logits(original, ids))
    tied = input_matrix(sides.student.model) is head_matrix(sides.student.model)
    assert tied != untie


@pytest.mark.parametrize(("mode", "trained"), [("embeddings", {"embed"}), ("lora", {"embed", "lora"}), ("full", None)])
def test_what_is_trained(run, mode, trained):
    sides = prepare(run(train={"mode": mode, "lora": {"rank": 2}}))
    names = {name for name, p in sides.student.model.named_parameters() if p.requires_grad}
    if trained is None:
        assert names == {name for name, _ in sides.student.model.named_parameters()}
    else:
        assert {kind for kind in ("embed", "lora") for name in names if kind in name} == trained
        assert all("embed" in name or "lora" in name for name in names)


def test_training_moves_the_student_towards_the_teacher(run, tmp_path):
    results = distill(run(train={"steps": 30, "mode": "full"}), quiet=True)
    assert results["trained_bits_per_byte"] < results["zero_shot_bits_per_byte"]
    lines = (tmp_path / "out/metrics.jsonl").read_text("utf-8").splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert losses[-1] < losses[0]


def test_another_teacher_with_another_tokenizer(run, model_folder, tmp_path, bpe):
    student = tmp_path / "student"
    distill(run(output=student), quiet=True)
    results = distill(
        run(
            model={"source": str(student / "model")},
            teacher={"source": str(model_folder)},
            target_tokenizer=None,
            losses={"alm": {}, "clm": {"weight": 0.1}},
        ),
        quiet=True,
    )
    assert results["transfer"] is None
    assert load_tokenizer(str(tmp_path / "out/model")).vocab_size == load_tokenizer("byte").vocab_size


def test_bfloat16_and_gradient_checkpointing_learn_the_same_thing(run, tmp_path):
    plain = distill(run(output=tmp_path / "a"), quiet=True)
    half = distill(run(output=tmp_path / "b", train={"precision": "bfloat16"}), quiet=True)
    again = distill(run(output=tmp_path / "c", train={"gradient_checkpointing": True}), quiet=True)
    assert half["trained_bits_per_byte"] == pytest.approx(plain["trained_bits_per_byte"], rel=2e-2)
    assert again["trained_bits_per_byte"] == pytest.approx(plain["trained_bits_per_byte"], rel=1e-5)


CHAT = """{%- for m in messages %}{{ '<|endoftext|>' + m.role + ': ' + m.content + '<|endoftext|>' }}{% endfor %}"""


def test_conversations_are_distilled_across_families(run, tmp_path, bpe):
    """A teacher with a template of its own teaches a byte student that writes turns as Qwen2 does."""
    folder = tmp_path / "chat"
    shutil.copytree(run().model.source, folder)
    (folder / "chat_template.jinja").write_text(CHAT, "utf-8")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"the {word}"},
                {"role": "assistant", "content": f"{word} sat on a mat"},
            ]
        }
        for word in ("cat", "fish", "home", "mat")
    ]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    results = distill(
        run(
            model={"source": str(folder)},
            target_tokenizer="byte:target=Qwen2",
            losses={"alm": {}, "clm": {"weight": 0.1}},
            data={"source": {"path": str(lines)}, "format": "chat", "window_bytes": 64},
            train={"steps": 20},
        ),
        quiet=True,
    )
    learnt = sum(len(row["messages"][1]["content"]) for row in rows)
    assert results["bytes"] == 20 * learnt  # every step reads all four rows, and counts what was learnt
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    assert losses[-1] < 0.95 * losses[0]
    student = load_tokenizer(str(tmp_path / "out/model"))
    assert {"<|im_start|>", "<|im_end|>"} <= student.special_tokens.keys()


def test_a_balance_without_a_trained_layer_is_refused_before_anything_is_written(run, tmp_path):
    with pytest.raises(UserError, match="nothing is trained in the last layer"):
        distill(run(train={"mode": "embeddings", "balance": "gradnorm"}), quiet=True)
    assert not (tmp_path / "out").exists()
