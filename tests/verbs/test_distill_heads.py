"""Models with a soft cap, a scale or a bias at the head are moved to another tokenizer, with further options of ALM."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPTJConfig

from tokenkit.config import build, parse_yaml
from tokenkit.models.load import load_model, output_head
from tokenkit.models.view import ModelView
from tokenkit.verbs.distill import distill
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.prepare import prepare

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
GPTJ = {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "n_positions": 256}
CONFIGS = {
    "gemma2": lambda ids: Gemma2Config(**ids, **SIZES, num_key_value_heads=2, head_dim=16, final_logit_softcapping=2.0),
    "cohere": lambda ids: CohereConfig(**ids, **SIZES, logit_scale=0.25),
    "gptj": lambda ids: GPTJConfig(**ids, **GPTJ),
}


@pytest.fixture(params=CONFIGS)
def run(request, tmp_path, corpus, bpe):
    ids = {"vocab_size": bpe.vocab_size, "bos_token_id": bpe.bos_id, "eos_token_id": bpe.eos_id, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param](ids))
    if output_head(model).bias is not None:
        torch.nn.init.normal_(output_head(model).bias)
    model.save_pretrained(tmp_path / "model")
    bpe.save(tmp_path / "model")
    source = {"path": str(corpus), "separator": "\n\n"}
    return build(
        DistillRun,
        {
            "output": tmp_path / "out",
            "model": {"source": str(tmp_path / "model")},
            "target_tokenizer": "byte",
            "losses": {"alm": {"preset": "upstream", "divergence": "kl", "boundary": "eos"}},
            "data": {"source": source, "window_bytes": 80},
            "train": {"steps": 30, "batch_size": 4, "mode": "embeddings", "optimizer": {"learning_rate": 1e-2}},
            "eval": {"source": {**source, "max_bytes": 300}, "context_tokens": 64},
        },
    )


def test_the_loss_falls_the_teacher_stays_and_the_run_shows_the_preset(run, tmp_path):
    sides = prepare(run)
    original = ModelView(load_model(str(tmp_path / "model")))
    ids = torch.arange(40).view(2, 20)
    for parameter in sides.student.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    said = [view.leaves({"label_logp"}, ids, ids)["label_logp"] for view in (sides.teacher, original)]
    torch.testing.assert_close(*said)
    results = distill(run, quiet=True)
    assert results["trained_bits_per_byte"] < results["zero_shot_bits_per_byte"]
    shown = parse_yaml((tmp_path / "out/run.yaml").read_text("utf-8"))["losses"]["alm"]
    assert (shown["divergence"], shown["temperature"], shown["threshold"]) == ("kl", 100.0, 0.1)
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
