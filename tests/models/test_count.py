"""Counts are exact, parameters once; what a file holds beside them is told apart."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MixtralConfig,
)

from tokenkit.config import UserError
from tokenkit.models.count import config_parameters, inventory_of, inventory_of_model, unique_parameters

SMOL = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
SMALL = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_hidden_layers": 3}


def kinds(inventory):
    found = {}
    for entry in inventory.entries:
        found[entry.kind] = found.get(entry.kind, 0) + entry.elements
    return found


@pytest.mark.parametrize(("layers", "parameters"), [(6, 81_912_576), (12, 124_439_808)])
def test_gpt2_by_its_configuration(layers, parameters):
    found = inventory_of(f"gpt2:n_layer={layers}")
    assert found.parameters == found.stored_elements == parameters
    assert found.stored_bytes == 4 * parameters
    assert config_parameters(GPT2Config(n_layer=layers)) == parameters
    block = [entry for entry in found.entries if entry.name.split(".")[:2] == ["h", "0"]]
    assert sum(entry.elements for entry in block) == 7_087_872
    assert parameters == 50257 * 768 + 1024 * 768 + layers * 7_087_872 + 2 * 768


def test_smollm_with_half_its_layers():
    shape = ",".join(f"{key}={value}" for key, value in SMOL.items())
    found = inventory_of(f"llama:{shape},vocab_size=49152,tie_word_embeddings=true,num_hidden_layers=15")
    assert found.parameters == 81_413_568
    block = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576
    assert found.parameters == 49152 * 576 + 15 * block + 576


@pytest.mark.parametrize("kind", [MambaConfig, MixtralConfig])
def test_a_count_on_no_memory_is_the_count_in_memory(kind):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 50}
    if kind is MixtralConfig:
        sizes |= {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    before = torch.get_rng_state()
    counted = config_parameters(kind(**sizes))
    assert torch.equal(torch.get_rng_state(), before)
    model = AutoModelForCausalLM.from_config(kind(**sizes))
    assert counted == unique_parameters(model) == sum(p.numel() for p in dict.fromkeys(model.parameters()))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}])
def test_a_file_holds_what_its_configuration_makes(tmp_path, tie, shards):
    model = LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=90, tie_word_embeddings=tie)).to(torch.bfloat16)
    model.save_pretrained(tmp_path, **shards)
    found = inventory_of(str(tmp_path))
    assert found.source == "file"
    assert found.parameters == found.stored_elements == unique_parameters(model)
    assert found.stored_bytes == 2 * found.stored_elements
    assert kinds(found).get("tied duplicate", 0) == (90 * 24 if tie else 0)
    assert kinds(found)["non-persistent buffer"] == 6  # two rotary tables of three angles
    written = sum(tensor.numel() for path in tmp_path.glob("*.safetensors") for tensor in load_file(path).values())
    assert written == found.stored_elements
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    alone = inventory_of(str(tmp_path))
    assert alone.source == "configuration"
    assert alone.parameters == found.parameters
    assert {(e.name, e.shape, e.kind, e.stored) for e in alone.entries} == {
        (e.name, e.shape, e.kind, e.stored) for e in found.entries
    }


def test_masks_and_a_second_head_in_an_old_file(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, n_positions=16, vocab_size=40))
    # old files lack the prefix of the body
    tensors = {name.removeprefix("transformer."): p.detach().clone() for name, p in model.named_parameters()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in range(2)}
    masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    save_file(tensors | masks | {"lm_head.weight": tensors["wte.weight"] + 0}, tmp_path / "model.safetensors")
    without = inventory_of(str(tmp_path / "model.safetensors"))  # nothing says that the head is tied
    assert without.parameters == unique_parameters(model) + 40 * 8
    model.config.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        found = inventory_of(str(source))
        assert found.parameters == unique_parameters(model)
        assert kinds(found)["persistent buffer"] == 2 * 256 + 2
        assert kinds(found)["tied duplicate"] == 40 * 8
        assert found.stored_elements == found.parameters + 2 * 256 + 2 + 40 * 8


def test_frozen_and_tied_in_a_model_in_memory():
    model = LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=90, tie_word_embeddings=True))
    model.model.layers[0].mlp.requires_grad_(False)
    found = inventory_of_model(model, "student")
    assert kinds(found)["frozen"] == 3 * 24 * 40
    assert kinds(found)["trainable"] + kinds(found)["frozen"] == found.parameters == unique_parameters(model)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gpt9", "no causal language model"),
        ("gpt2:n_layers=2", "gpt2.n_layers: unknown key of 'gpt2'; did you mean 'n_layer'"),
        ("gpt2:n_layer", "no KEY=VALUE"),
        ("gpt2:n_layer=x", "expected int"),
        ("llama:hidden_size=100,num_attention_heads=3", "not a multiple"),
        ("some/where", "no such folder"),
        ("/nowhere", "no such folder"),
    ],
)
def test_mistakes_are_one_line(source, message):
    with pytest.raises(UserError, match=message) as caught:
        inventory_of(source)
    assert "\n" not in str(caught.value)


def test_broken_folders_are_one_line(tmp_path):
    def complaint():
        with pytest.raises(UserError) as caught:
            inventory_of(str(tmp_path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "neither config.json nor" in complaint()
    (tmp_path / "config.json").write_text("[]", "utf-8")
    assert "holds no object" in complaint()
    (tmp_path / "config.json").write_text('{"model_type": "strange"}', "utf-8")
    assert "not known here" in complaint()
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": "x"}', "utf-8")
    assert "no configuration that can be used" in complaint()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "strange"}), "utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"no")
    assert "not a safetensors file" in complaint()


def test_a_value_with_commas():
    found = inventory_of("qwen2:num_hidden_layers=2,layer_types=[full_attention,full_attention],hidden_size=64")
    assert found.vocabulary == 151936
