"""`tokenkit pretrain` makes a model that loads, and the embedded one is what its run file says."""

import json

import pytest
import torch

from tokenkit.config import UserError, build, load, parse_yaml
from tokenkit.models.load import load_model
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.verbs.demo import ASSETS, TARGETS, demo, demo_run
from tokenkit.verbs.pretrain import PretrainRun, pretrain


def values(tmp_path, corpus):
    source = {"path": str(corpus), "separator": "\n\n"}
    return {
        "output": tmp_path / "out",
        "tokenizer": {"train": {"kind": "bpe", "vocab_size": 320}},
        "model": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        "data": {"source": source, "window_bytes": 120},
        "train": {"steps": 20, "batch_size": 4, "optimizer": {"learning_rate": 1e-2}},
        "eval": {"source": {**source, "max_bytes": 500}, "context_tokens": 64},
    }


def test_a_small_model_from_nothing(tmp_path, corpus):
    run = build(PretrainRun, values(tmp_path, corpus) | {"export_dtype": "float32"})
    results = pretrain(run, quiet=True)
    assert results["steps"] == 20
    folder = tmp_path / "out" / "model"
    assert load_model(str(folder)).config.vocab_size == load_tokenizer(str(folder)).vocab_size == 320
    lines = (tmp_path / "out/metrics.jsonl").read_text("utf-8").splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert losses[-1] < losses[0]


def test_a_tokenizer_alone(tmp_path, corpus):
    whole = values(tmp_path, corpus)
    del whole["model"], whole["train"]
    results = pretrain(build(PretrainRun, whole), quiet=True)
    assert results["vocab_size"] == 320
    assert load_tokenizer(str(tmp_path / "out" / "tokenizer")).encode("the cat").ids.size
    with pytest.raises(UserError, match="give both model and train, or neither"):
        build(PretrainRun, values(tmp_path, corpus) | {"model": None})


def test_the_embedded_models_are_those_of_their_run_files():
    runs = ASSETS.parents[1] / "runs" / "pretrain"
    for name in ("demo_teacher", "demo_unigram"):
        shipped = parse_yaml((ASSETS / name / "run.yaml").read_text("utf-8"))
        assert build(PretrainRun, shipped) == load(PretrainRun, [str(runs / f"{name}.yaml")])
    teacher = load_model(str(ASSETS / "demo_teacher"))
    assert sum(p.numel() for p in teacher.parameters()) == 4_262_144
    assert (ASSETS / "demo_teacher" / "model.safetensors").stat().st_size <= 12_000_000
    assert torch.isfinite(teacher.lm_head.weight).all()
    assert load_tokenizer(TARGETS["unigram"]).vocab_size == 3000


@pytest.mark.slow
def test_the_demo_small(tmp_path, capsys):
    words = [f"output={tmp_path / 'demo'}", "train.steps=2", "train.eval_at=[]", "eval.source.max_bytes=600"]
    run = demo_run(words)
    assert run.train.batch_size == 4  # what is not overridden is the embedded run file's
    results = demo(run, quiet=True)
    found = json.loads((tmp_path / "demo" / "results.json").read_text("utf-8"))
    assert found == results
    assert set(found["targets"]) == {"unigram", "byte"}
    for entry in found["targets"].values():
        assert found["teacher_bpb"] < entry["alm_bpb"]
        assert entry["clm_bpb"] < entry["zero_shot_bpb"]
    assert (tmp_path / "demo" / "report.html").stat().st_size > 20_000
    again = capsys.readouterr().out
    assert demo(run, quiet=True) == results
    assert "2 steps ..." in again
    assert "2 steps ..." not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"another config: train.steps differ"):
        demo(demo_run([*words, "train.steps=3"]), quiet=True)
