"""Exactly the layers that are named are adapted, and a name that fits nothing is an error that says what would."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tokenkit.config import UserError, build
from tokenkit.models.lora import adapters, attach_lora
from tokenkit.models.lora_config import LoraConfig
from tokenkit.models.lora_targets import layer_numbers, target_layers, whole_modules

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 12}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))


def named(layers: range | list[int], parts: tuple[str, ...]) -> list[str]:
    return [f"model.layers.{i}.{'self_attn' if p in ATTENTION else 'mlp'}.{p}" for i in layers for p in parts]


def test_all_linear_is_every_layer_but_the_head(llama) -> None:
    assert target_layers(llama) == named(range(12), ATTENTION + MLP)


def test_last_parts_and_globs(llama) -> None:
    assert target_layers(llama, targets=["q_proj"]) == named(range(12), ("q_proj",))
    assert target_layers(llama, targets=["model.layers.1?.*.up_proj"]) == named([10, 11], ("up_proj",))
    with pytest.raises(UserError, match=r"'w_proj' is no linear layer here; known: down_proj, gate_proj, k_proj"):
        target_layers(llama, targets=["q_proj", "w_proj"])
    with pytest.raises(UserError, match="'lm_head' is no linear layer here"):
        target_layers(llama, targets=["lm_head"])


def test_regular_expressions_match_whole_names(llama) -> None:
    assert target_layers(llama, target_regex=[r".*attn.*_proj"]) == named(range(12), ATTENTION)
    both = target_layers(llama, target_regex=[r".*\.q_proj", r".*\.[37]\.mlp\..*"])
    assert both == sorted(named(range(12), ("q_proj",)) + named([3, 7], MLP), key=target_layers(llama).index)
    with pytest.raises(UserError, match=r"'attn.\*_proj' matches no linear layer as a whole.*such as model\.layers\.0"):
        target_layers(llama, target_regex=[r"attn.*_proj"])  # found inside names, which is not enough
    with pytest.raises(UserError, match=r"'\*_proj' is no regular expression: nothing to repeat"):
        target_layers(llama, target_regex=["*_proj"])


def test_layers_are_ranges_with_both_ends(llama) -> None:
    assert target_layers(llama, layers=["0-2", "11"], targets=["k_proj"]) == named([0, 1, 2, 11], ("k_proj",))
    assert target_layers(llama, layers=["1"]) == named([1], ATTENTION + MLP)  # and neither 10 nor 11
    assert layer_numbers(["0-2", " 2 - 3 ", "5"], 6) == {0, 1, 2, 3, 5}
    for wrong in ("12", "5-12", "3-1", "-1", "1-", "a", "", "1.5"):
        with pytest.raises(UserError, match=r"has layers 0 to 11; write ranges with both ends such as '0-11'"):
            target_layers(llama, layers=["0", wrong])
    with pytest.raises(UserError, match=r"lora layers: 3 have none of the targets: q_proj"):
        target_layers(llama, targets=["model.layers.1.*.q_proj"], layers=["3"])


def test_gpt2_has_layers_of_another_kind() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=2, n_positions=16))
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert target_layers(model) == [f"transformer.h.{i}.{part}" for i in range(3) for part in parts]
    assert target_layers(model, targets=["c_fc"], layers=["1-2"]) == [f"transformer.h.{i}.mlp.c_fc" for i in (1, 2)]


def test_modules_trained_whole_are_those_that_are_named(llama) -> None:
    assert whole_modules(llama, []) == []
    assert whole_modules(llama, ["norm", "embed_tokens"]) == ["model.embed_tokens", "model.norm"]
    assert whole_modules(llama, ["model.layers.3.mlp", "up_proj"])[3:5] == ["model.layers.3.mlp", *named([4], MLP[1:2])]
    with pytest.raises(UserError, match=r"'embed_token' is no module with weights here; did you mean embed_tokens"):
        whole_modules(llama, ["embed_token"])
    with pytest.raises(UserError, match=r"'xyz' is no module with weights here; known: down_proj"):
        whole_modules(llama, ["xyz"])


def test_what_is_trained_whole_is_not_adapted() -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    attach_lora(model, rank=2, alpha=2, layers=["0"], modules_to_save=["norm", "up_proj"])
    assert list(adapters(model)) == [name for name in named([0], ATTENTION + MLP) if "up_proj" not in name]
    whole = {"model.norm.weight", *(f"{name}.weight" for name in named(range(2), ("up_proj",)))}
    trained = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert trained == whole
    assert torch.is_grad_enabled()
    with pytest.raises(UserError, match="'up_proj' is no linear layer here"):
        target_layers(model, targets=["up_proj"], leave_out=named(range(2), ("up_proj",)))


def test_targets_and_regular_expressions_are_not_given_both() -> None:
    with pytest.raises(UserError, match=r"train\.lora\.target_regex: \.\*_proj beside targets; give one of the two"):
        build(LoraConfig, {"targets": ["q_proj"], "target_regex": [".*_proj"]})
    assert build(LoraConfig, {"target_regex": [".*_proj"]}).targets == "all-linear"
