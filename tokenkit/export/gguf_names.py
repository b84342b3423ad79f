"""A model in the words of llama.cpp: which architecture, its numbers, its tensors by their GGUF names.

Rotary embeddings turn pairs of channels. transformers pairs a channel with the one half a head further, as do
llama.cpp's `qwen2`, `qwen3` and `bitnet`; its `llama` pairs neighbours, so rows of queries and keys are put in that
order here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tokenkit.config import UserError
from tokenkit.export.ternary_layout import stock_layout
from tokenkit.models.bitlinear import ternary_layers

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "bitnet": gguf.MODEL_ARCH.BITNET,
}
NEIGHBOURS = (gguf.MODEL_ARCH.LLAMA,)  # architectures that turn neighbouring channels
ACTIVATIONS = {"gpt2": ("gelu_new", "gelu_pytorch_tanh")}  # silu in all others
ROPE_FREQUENCIES = "rope_freqs.weight"
SUB_NORM_NAMES = {  # which the package's own table of names leaves out
    "model.layers.{}.self_attn.attn_sub_norm.weight": "blk.{}.attn_sub_norm.weight",
    "model.layers.{}.mlp.ffn_sub_norm.weight": "blk.{}.ffn_sub_norm.weight",
}


@dataclass(frozen=True)
class Ternary:
    """A matrix of -1, 0 and 1, and its scale."""

    trits: Tensor
    gamma: float


@dataclass(frozen=True)
class Plan:
    """What a GGUF file of a model holds, tokenizer apart."""

    arch: gguf.MODEL_ARCH
    tensors: dict[str, Tensor | Ternary]
    """By GGUF name, in order."""
    numbers: list[tuple[Callable[[gguf.GGUFWriter, Any], None], Any]] = field(default_factory=list)
    """Methods of the writer and what they are given."""


def gguf_plan(model: PreTrainedModel) -> Plan:
    """The file's architecture, numbers and tensors; UserError for a model that llama.cpp would compute otherwise."""
    if ternary_layers(model):
        layout = stock_layout(model)
        if layout.inner_eps is not None:
            raise UserError(
                "export: a norm inside every ternary layer, which no architecture of llama.cpp has; train with "
                "ternary.sub_norm=none, or export format=ternary"
            )
        config = layout.config
        found: dict[str, Tensor | Ternary] = dict(layout.tensors)
        for name, layer in layout.layers.items():
            trits, gamma = layer.trits()
            found[f"{name}.weight"] = Ternary(trits, float(gamma))
    else:
        config, seen = model.config, {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            seen.setdefault(id(tensor), (name, tensor.detach()))
        found = dict(seen.values())
        found |= {f"{name}.weight": layer.weight.detach().T for name, layer in _transposed(model)}
    arch = _architecture(config)
    tensors = _renamed(arch, config, found)
    numbers = _numbers(config)
    if arch == gguf.MODEL_ARCH.GPT2:
        numbers.append((gguf.GGUFWriter.add_layer_norm_eps, config.layer_norm_epsilon))
    else:
        numbers.append((gguf.GGUFWriter.add_layer_norm_rms_eps, config.rms_norm_eps))
        numbers.append((gguf.GGUFWriter.add_rope_dimension_count, _head_size(config)))
        _add_rope(arch, config, numbers, tensors)
    return Plan(arch, tensors, numbers)


def _transposed(model: PreTrainedModel) -> list[tuple[str, Conv1D]]:
    """The layers whose matrices stand the other way round, GPT-2's."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Conv1D)]


def _architecture(config: PreTrainedConfig) -> gguf.MODEL_ARCH:
    kind, values = config.model_type, config.to_dict()
    if kind not in ARCHITECTURES:
        raise UserError(f"export: model_type {kind} cannot be written as GGUF here; {', '.join(ARCHITECTURES)} can")
    problem = None
    wanted = ACTIVATIONS.get(kind, ("silu", "swish"))
    activation = values["activation_function" if kind == "gpt2" else "hidden_act"]
    if activation not in wanted:
        problem = f"hidden_act {activation}, and {wanted[0]} is what is written here"
    elif values.get("use_sliding_window") or (kind == "mistral" and values.get("sliding_window")):
        problem = "a sliding window, which is not written here"
    elif kind == "bitnet" and config.attention_bias:
        problem = "SubLN and attention biases, and llama.cpp's bitnet has none"
    elif kind == "bitnet" and not config.tie_word_embeddings:
        problem = "SubLN and an output head of its own, and llama.cpp's bitnet takes the embeddings"
    if problem:
        raise UserError(f"export: the model has {problem}; export format=ternary or huggingface")
    return ARCHITECTURES[kind]


def _head_size(config: PreTrainedConfig) -> int:
    return config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads


def _renamed(
    arch: gguf.MODEL_ARCH, config: PreTrainedConfig, found: dict[str, Tensor | Ternary]
) -> dict[str, Tensor | Ternary]:
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    blocks = range(config.num_hidden_layers)
    norms = {ours.format(block): theirs.format(block) for ours, theirs in SUB_NORM_NAMES.items() for block in blocks}
    tensors: dict[str, Tensor | Ternary] = {}
    for name, value in found.items():
        new = norms.get(name) or names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise UserError(
                f"{name}: llama.cpp's {gguf.MODEL_ARCH_NAMES[arch]} has no place for it; export another format"
            )
        tensors[new] = value
    if arch in NEIGHBOURS:
        for number in blocks:
            for part, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
                for kind in ("weight", "bias"):
                    name = f"blk.{number}.attn_{part}.{kind}"
                    if name in tensors:
                        tensors[name] = _as_neighbours(tensors[name], heads)
    return tensors


def _as_neighbours(value: Tensor | Ternary, heads: int) -> Tensor | Ternary:
    """Rows of queries or keys, the two halves of every head interleaved."""
    if isinstance(value, Ternary):
        return Ternary(interleaved(value.trits, heads), value.gamma)
    return interleaved(value, heads)


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows 0, H/2, 1, H/2 + 1, ... of every head of H rows."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _numbers(config: PreTrainedConfig) -> list[tuple[Callable[[gguf.GGUFWriter, Any], None], Any]]:
    head, writer, values = _head_size(config), gguf.GGUFWriter, config.to_dict()
    inner = values["n_inner"] or 4 * config.n_embd if "n_inner" in values else config.intermediate_size
    heads = values.get("num_key_value_heads") or config.num_attention_heads
    return [
        (writer.add_vocab_size, config.vocab_size),
        (writer.add_context_length, config.max_position_embeddings),
        (writer.add_embedding_length, config.hidden_size),
        (writer.add_block_count, config.num_hidden_layers),
        (writer.add_feed_forward_length, inner),
        (writer.add_head_count, config.num_attention_heads),
        (writer.add_head_count_kv, heads),
        (writer.add_key_length, head),
        (writer.add_value_length, head),
    ]


def _add_rope(
    arch: gguf.MODEL_ARCH,
    config: PreTrainedConfig,
    numbers: list[tuple[Callable[[gguf.GGUFWriter, Any], None], Any]],
    tensors: dict[str, Tensor | Ternary],
) -> None:
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    numbers.append((gguf.GGUFWriter.add_rope_freq_base, float(rope["rope_theta"])))
    if kind == "linear":
        numbers.append((gguf.GGUFWriter.add_rope_scaling_type, gguf.RopeScalingType.LINEAR))
        numbers.append((gguf.GGUFWriter.add_rope_scaling_factor, float(rope["factor"])))
    elif kind == "llama3" and arch == gguf.MODEL_ARCH.LLAMA:
        tensors[ROPE_FREQUENCIES] = llama3_factors(rope, _head_size(config))
    elif kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"export: rope_type {kind} is not written as GGUF here; default, linear and Llama's llama3 are")


def llama3_factors(rope: dict[str, Any], head: int) -> Tensor:
    """What Llama 3 divides each rotary frequency by: 1 for short waves, `factor` for long ones, between in between."""
    frequencies = rope["rope_theta"] ** -(torch.arange(0, head, 2, dtype=torch.float64) / head)
    waves = 2 * math.pi / frequencies
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    share = ((rope["original_max_position_embeddings"] / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / factor + share)).float()
