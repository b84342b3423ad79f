"""`tokenkit doctor`: what it reads of a model, of a corpus and of the command line."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tokenkit.config import UserError
from tokenkit.losses import LOSSES
from tokenkit.transfer import INITIALIZERS
from tokenkit.verbs.doctor import DoctorRun, doctor, read_model_facts


def one_line(result, *parts):
    code, out, error = result
    assert code == 2
    assert out == ""
    assert error.count("\n") == 1, error
    for part in parts:
        assert str(part) in error


def made(folder, tie, dtype=torch.float32, **changes):
    config = LlamaConfig(
        vocab_size=400, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tie,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, **changes)
    return model


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "12KB"}])
def test_model_facts_are_the_models(tmp_path, tie, shards):
    model = made(tmp_path / "m", tie, torch.bfloat16, **shards)
    assert (len(list((tmp_path / "m").glob("*.safetensors"))) > 1) == bool(shards)
    found = read_model_facts(tmp_path / "m")
    assert (found.rows, found.width, found.bytes_per_weight) == (400, 16, 2)
    assert found.matrices == (1 if tie else 2)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_tied_head_that_was_stored_too_counts_once(tmp_path):
    rows = torch.zeros(400, 16)
    save_file({"model.embed_tokens.weight": rows, "lm_head.weight": rows + 1}, tmp_path / "model.safetensors")
    config = {"vocab_size": 400, "hidden_size": 16, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config}), "utf-8")
    found = read_model_facts(tmp_path)
    assert (found.matrices, found.parameters) == (1, 6400)


def test_rows_are_those_of_the_weights_not_of_the_configuration(tmp_path):
    save_file({"embed.weight": torch.zeros(300, 8), "body.weight": torch.zeros(8, 8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"vocab_size": 299, "hidden_size": 8}', "utf-8")
    assert read_model_facts(tmp_path).rows == 300


def broken(tmp_path, config='{"vocab_size": 4, "hidden_size": 2}', weights=b""):
    if config is not None:
        (tmp_path / "config.json").write_text(config, "utf-8")
    if weights is not None:
        (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError) as error:
        read_model_facts(tmp_path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_broken_models_are_one_line(tmp_path):
    assert "no config.json" in broken(tmp_path, None, None)
    assert "no *.safetensors" in broken(tmp_path, weights=None)
    assert "not a safetensors file" in broken(tmp_path)
    assert "not a safetensors file" in broken(tmp_path, weights=(2**31).to_bytes(8, "little") + b"{")
    assert "cannot be read" in broken(tmp_path, config="{")
    assert "holds no object" in broken(tmp_path, config="[]")
    save_file({"body.weight": torch.zeros(3, 2)}, tmp_path / "model.safetensors")
    assert "no matrix of 4 rows" in broken(tmp_path, weights=None)


def test_the_command_line(tokenkit, tmp_path, model_folder, corpus):
    plain = tokenkit("doctor", model_folder, "byte")
    assert plain[0] == 0
    assert "in order" in plain[1]
    assert tokenkit("doctor", f"source={model_folder}", "target=byte") == plain
    code, out, error = tokenkit("doctor", model_folder, "byte", "--model", model_folder, "--corpus", corpus, "--json")
    assert code == 0, error
    found = json.loads(out)
    assert found["corpus"]["bytes"] == len(corpus.read_bytes())
    assert found["model"]["width"] == 32
    topics = {one["topic"]: one for one in found["findings"]}
    assert {"digits", "indentation", "begin of text", "embedding", "memory", "time", "overlap"} <= topics.keys()
    assert all(one["level"] in ("ok", "note", "warning") and one["sentence"] for one in found["findings"])
    assert topics["initialiser"]["numbers"]["initializer"] in INITIALIZERS
    assert set(topics["loss"]["numbers"]["losses"].split(" + ")) <= set(LOSSES)
    one_line(tokenkit("doctor", "byte"), "1 words for 2 names", "write source target")
    one_line(tokenkit("doctor", "byte", "byte", "--model", tmp_path / "no"), "no config.json")
    one_line(tokenkit("doctor", "byte", "byte", "--corpus", tmp_path / "no.txt"), "no.txt")
    one_line(tokenkit("doctor", "byte", tmp_path / "no"), tmp_path / "no")


def test_a_corpus_is_read_as_far_as_its_limit(tmp_path, monkeypatch):
    (tmp_path / "long.txt").write_text("one line of text\n" * 60_000, "utf-8")
    run = DoctorRun(source="byte", target="byte", corpus={"path": str(tmp_path / "long.txt"), "max_bytes": 5000})
    assert doctor(run).facts.corpus.bytes == 5000
    monkeypatch.setattr("tokenkit.verbs.doctor.CORPUS_BYTES", 7000)
    run = DoctorRun(source="byte", target="byte", corpus={"path": str(tmp_path / "long.txt")})
    assert doctor(run).facts.corpus.bytes == 7000
