"""What a distilling run is made of: one weight copy, a teacher that never moves, and laws of the whole way."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tokenkit.config import UserError, build
from tokenkit.models.load import head_matrix, input_matrix, load_model
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.train.loop import Interrupted
from tokenkit.verbs.distill import distill
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.prepare import prepare


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


OVER_TWO_VOCABULARIES = {
    "hidden_states": {"states": "qkv", "chunks": "space"},
    "side_path": {"mapping": "mined"},
    "mined": {},
    "dskd": {"causal": True},
    "uld": {},
    "gold": {},
    "p_kl": {},
    "h_kl": {},
}


@pytest.mark.parametrize("name", OVER_TWO_VOCABULARIES)
def test_every_objective_trains_from_a_run_file(run, tmp_path, name):
    results = distill(run(losses={name: OVER_TWO_VOCABULARIES[name]}, train={"steps": 24, "log_every": 1}), quiet=True)
    assert results["losses"] == [name]
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text("utf-8").splitlines()]
    values = [row[f"loss/{name}"] for row in lines if "loss" in row]
    assert len(values) == 24
    assert sum(values[-6:]) < sum(values[:6])


def test_a_student_of_another_shape_learns_hidden_states_through_a_map_and_resumes(run, model_folder, tmp_path, bpe):
    narrow = tmp_path / "narrow"
    config = load_model(str(model_folder)).config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 16, 24, 1
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(narrow)
    bpe.save(narrow)
    common = {"model": {"source": str(narrow)}, "teacher": {"source": str(model_folder)}}
    wrong = common | {"losses": {"hidden_states": {}}}
    with pytest.raises(UserError, match=r"16 channels and the teacher's 32; write .*project=true"):
        distill(run(**wrong), quiet=True)
    deep = common | {"losses": {"hidden_states": {"states": "all"}}}
    with pytest.raises(UserError, match="layers are 2 of 16 channels, the teacher's 3 of 32"):
        distill(run(**deep), quiet=True)
    assert not (tmp_path / "out").exists()
    losses = {"hidden_states": {"project": True}, "dskd": {}, "clm": {}}
    train = {"steps": 6, "save_every": 3}
    whole = distill(run(**common, losses=losses, train=train), quiet=True)
    halves = run(**common, losses=losses, train=train | {"stop_after": 3}, output=tmp_path / "halves")
    with pytest.raises(Interrupted):
        distill(halves, quiet=True)
    again = distill(run(**common, losses=losses, train=train, output=tmp_path / "halves"), resume=True, quiet=True)
    assert again["trained_bits_per_byte"] == whole["trained_bits_per_byte"]
    kept = load_file(tmp_path / "halves/checkpoints/step_00000006/model.safetensors")
    learnt = {name for name in kept if name.startswith("projectors.")}
    assert len(learnt) == 8
    expected = load_file(tmp_path / "out/checkpoints/step_00000006/model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in expected.items())
    exported = load_file(tmp_path / "out/model/model.safetensors")
    assert not any("projector" in name for name in exported)


def test_two_vocabularies_are_told_before_anything_is_written(run, tmp_path):
    with pytest.raises(UserError, match=r"forward_kl: needs one vocabulary.*: alm, dskd, gold, h_kl") as told:
        distill(run(losses={"forward_kl": {}}), quiet=True)
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match="'unbiased' needs the bias of this pair; make it with"):
        distill(run(losses={"side_path": {"mapping": "unbiased"}}), quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("teacher", [{}, {"target_tokenizer": None, "teacher": "byte"}])
def test_two_vocabularies_are_told_before_weights_are_loaded(run, teacher, model_folder, monkeypatch):
    monkeypatch.setattr("tokenkit.verbs.prepare.load_pair", lambda *_, **__: pytest.fail("weights were loaded"))
    if teacher:
        teacher = teacher | {"teacher": {"source": str(model_folder), "tokenizer": "byte"}}
    with pytest.raises(UserError, match="forward_kl: needs one vocabulary"):
        distill(run(losses={"forward_kl": {}}, **teacher), quiet=True)


def test_a_kept_map_is_taken_and_that_of_another_pair_refused(run, tmp_path, tokenkit, model_folder):
    folder = tmp_path / "maps"
    tokenkit("mined-mapping", f"output={folder}", f"teacher={model_folder}", "student=byte")
    source = run().data.model_dump()
    made = distill(run(losses={"mined": {}}, data=source | {"mined": folder}), quiet=True)
    found = distill(run(losses={"mined": {}}, output=tmp_path / "again"), quiet=True)
    assert made["trained_bits_per_byte"] == found["trained_bits_per_byte"]
    other = run(losses={"mined": {}}, target_tokenizer=None, data=source | {"mined": folder}, output=tmp_path / "no")
    with pytest.raises(UserError, match="made for another student than"):
        distill(other, quiet=True)


def test_rows_that_pad_a_head_are_not_compared(run, model_folder, tmp_path, bpe):
    padded = tmp_path / "padded"
    model = load_model(str(model_folder))
    model.resize_token_embeddings(len(input_matrix(model)) + 8, mean_resizing=False)
    model.save_pretrained(padded)
    bpe.save(padded)
    both = {"target_tokenizer": None, "losses": {"top_k_kl": {"top_k": 8}, "forward_kl": {}}}
    found = [
        distill(run(teacher={"source": str(folder)}, output=tmp_path / name, **both), quiet=True)
        for name, folder in (("plain", model_folder), ("wide", padded))
    ]
    assert found[0]["trained_bits_per_byte"] == found[1]["trained_bits_per_byte"]


def test_a_page_names_the_run_that_exported_a_model(run, model_folder, tmp_path):
    distill(run(output=tmp_path / "small"), quiet=True)
    common = {"model": {"source": str(tmp_path / "small/model")}, "target_tokenizer": None}
    distill(run(**common, teacher={"source": str(model_folder)}), quiet=True)
    assert json.loads((tmp_path / "out/report.json").read_text("utf-8"))["title"] == "tiny → small"
