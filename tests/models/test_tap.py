"""What hooks take out of a forward pass is what the layers compute, and nothing is left behind."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tokenkit.config import UserError
from tokenkit.models.tap import tapped
from tokenkit.models.view import ModelView

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2}
KINDS = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "phi3": {**GROUPED, "pad_token_id": 0},
    "gpt_neox": SIZES,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}
LEAVES = ("queries", "keys", "values", "attention_output", "mlp_output")


@pytest.fixture(params=KINDS)
def model(request):
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, vocab_size=90, bos_token_id=0, eos_token_id=0, **KINDS[request.param])
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def ids():
    return torch.arange(14).view(2, 7)


def blocks(model):
    body = model.base_model
    return body.h if model.config.model_type == "gpt2" else body.layers


def by_hand(model, ids):
    """The same tensors from the inputs of every layer, with plain matrix products."""
    states = model.base_model(input_ids=ids, output_hidden_states=True).hidden_states
    found = {name: [] for name in ("queries", "keys", "values")}
    for block, entering in zip(blocks(model), states):
        kind = model.config.model_type
        attention = block.attn if kind == "gpt2" else block.attention if kind == "gpt_neox" else block.self_attn
        normed = (block.ln_1 if kind == "gpt2" else block.input_layernorm)(entering)
        if kind == "gpt2":
            parts = (normed @ attention.c_attn.weight + attention.c_attn.bias).split(32, -1)
        elif kind == "gpt_neox":
            fused = attention.query_key_value(normed).view(2, 7, 4, 3, 8)
            parts = [fused[:, :, :, i].reshape(2, 7, 32) for i in range(3)]
        elif kind == "phi3":
            parts = attention.qkv_proj(normed).split([32, 16, 16], -1)
        else:
            parts = [getattr(attention, f"{name}_proj")(normed) for name in "qkv"]
        for name, part in zip(found, parts):
            found[name].append(part)
    return {name: torch.stack(layers, 2) for name, layers in found.items()}


@torch.no_grad()
def test_queries_keys_and_values_are_those_of_the_layers(model, ids):
    before = model.config._attn_implementation
    found = ModelView(model).leaves({*LEAVES[:3]}, ids, ids)
    assert not any(module._forward_hooks for module in model.modules())
    for name, expected in by_hand(model, ids).items():
        torch.testing.assert_close(found[name], expected)
    assert model.config._attn_implementation == before == "sdpa"


@torch.no_grad()
def test_outputs_of_attention_and_mlp_add_up_to_the_next_states(model, ids):
    found = ModelView(model).leaves({"attention_output", "mlp_output", "layers"}, ids, ids)
    layers = found["layers"]
    added = found["attention_output"][:, :, 0] + found["mlp_output"][:, :, 0]
    torch.testing.assert_close(layers[:, :, 0] + added, layers[:, :, 1])  # both kinds of residual block: one sum


@torch.no_grad()
def test_a_model_without_such_layers_is_refused_in_one_line(ids):
    config = AutoConfig.for_model("mamba", vocab_size=90, hidden_size=16, num_hidden_layers=1, state_size=4)
    view = ModelView(AutoModelForCausalLM.from_config(config))
    with pytest.raises(UserError, match="no query, key and value layers are known in mamba"):
        view.leaves({"mlp_output"}, ids, ids)


def test_hooks_are_gone_after_a_mistake_too(model):
    with pytest.raises(RuntimeError, match="stop"), tapped(model, {"keys"}):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in model.modules())
