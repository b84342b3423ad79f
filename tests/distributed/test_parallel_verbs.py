"""The other commands that train, over two processes: what they learn is what one process learns."""

import json

import pytest
import torch
from parallel_launch import run
from safetensors.torch import load_file

CLOSE = {"rtol": 0, "atol": 1e-5}


def logged(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    return [line["loss"] for line in lines if "loss" in line]


def assert_same_tensors(one, other):
    left, right = load_file(one), load_file(other)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], **CLOSE)


def test_pretraining(corpus, tmp_path):
    words = [
        "pretrain",
        "tokenizer={train: {kind: bpe, vocab_size: 300}}",
        "model={model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, "
        "num_attention_heads: 4, num_key_value_heads: 2, tie_word_embeddings: true}",
        f"data={{source: {{path: {corpus}}}, window_bytes: 64}}",
        "train={steps: 12, batch_size: 8, log_every: 1}",
        f"eval={{source: {{path: {corpus}, max_bytes: 500}}}}",
        "export_dtype=float32",
        "--quiet",
    ]
    for name, count, options in (("one", 0, []), ("two", 2, []), ("four", 4, ["train.parallel.model=2"])):
        run(count, [*words, *options, f"output={tmp_path / name}"], tmp_path / "said")
    for name in ("two", "four"):
        assert logged(tmp_path / "one") == pytest.approx(logged(tmp_path / name), abs=1e-5)
        assert_same_tensors(*(tmp_path / f / "model" / "model.safetensors" for f in ("one", name)))


@pytest.mark.slow
def test_a_hypernetwork(model_folder, unigram, corpus, tmp_path):
    unigram.save(tmp_path / "unigram")
    words = [
        "train-hypernet",
        f"model.source={model_folder}",
        "hypernet={architecture: mlp}",
        "sampler={vocab_size: 300}",
        f"data={{source: {{path: {corpus}}}, window_bytes: 64}}",
        "train={steps: 6, batch_size: 4, log_every: 1, optimizer: {learning_rate: 1e-3}}",
        f"eval={{source: {{path: {corpus}, max_bytes: 500}}, tokenizers: [{tmp_path / 'unigram'}]}}",
        "--quiet",
    ]
    for name, count in (("one", 0), ("two", 2)):
        run(count, [*words, f"output={tmp_path / name}"], tmp_path / "said")
    assert logged(tmp_path / "one") == pytest.approx(logged(tmp_path / "two"), abs=1e-5)
    assert_same_tensors(*(tmp_path / name / "hypernet.safetensors" for name in ("one", "two")))


@pytest.mark.slow
def test_a_learned_tokenizer(corpus, tmp_path):
    words = [
        "tokenizer",
        "pretrain",
        "network=nano",
        f"data={{source: {{path: {corpus}}}, held_out: {{path: {corpus}}}}}",
        "train={steps: 12, batch_size: 16, log_every: 1, eval_every: 6}",
        "pins=100",
        "warm=100",
        "--quiet",
    ]
    for name, count, parts in (("one", 0, 2), ("two", 2, 1)):  # noise is drawn by part of a step
        run(count, [*words, f"output={tmp_path / name}", f"train.accumulation={parts}"], tmp_path / "said")
    assert logged(tmp_path / "one") == pytest.approx(logged(tmp_path / "two"), abs=1e-5)
