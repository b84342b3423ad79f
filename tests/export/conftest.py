"""Small ternary models: a few layers of a family, made ternary from outside, with gains and biases not 0 or 1."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tokenkit.models.ternary import TernaryConfig, attach_ternary

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


@pytest.fixture
def dense_model():
    """Makes a random model of a family; `dense_model("llama", hidden_size=256)`."""

    def make(family: str = "llama", **options: object) -> PreTrainedModel:
        config, model = FAMILIES[family]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = model(config(**{**SIZES, **options})).eval()
            with torch.no_grad():
                for parameter in made.parameters():
                    if parameter.dim() == 1:
                        parameter += 0.2 * torch.randn_like(parameter)
        return made

    return make


@pytest.fixture
def ternary_model(dense_model):
    """Makes a ternary model; `ternary_model("qwen2", sub_norm="o_down", tie_word_embeddings=True)`."""

    def make(family: str = "llama", sub_norm: str = "none", skip: tuple[str, ...] = (), **options: object):
        model = dense_model(family, **options)
        attach_ternary(model, TernaryConfig(sub_norm=sub_norm, calibrate=False, skip=list(skip)))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1)
            for name, parameter in model.named_parameters():
                if ".norm." in name:
                    parameter += 0.2 * torch.randn_like(parameter)
        return model.eval()

    return make
