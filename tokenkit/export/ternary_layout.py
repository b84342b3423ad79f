"""A ternary model in the names of the stock class that will load it: which class, which tensors, which matrices."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitNetConfig, BitNetForCausalLM, PreTrainedConfig, PreTrainedModel

from tokenkit.config import UserError
from tokenkit.models.bitlinear import TernaryLinear, ternary_layers
from tokenkit.models.load import quiet

SUB_NORMS = {"self_attn.o_proj": "self_attn.attn_sub_norm", "mlp.down_proj": "mlp.ffn_sub_norm"}  # places in a block
AS_BITNET = ("llama", "mistral", "qwen2")  # what differs from transformers' "bitnet" class by the two norms alone
SHARED_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "attention_dropout",
    "rope_parameters",
)


@dataclass(frozen=True)
class Layout:
    """The parts of a ternary model by the names of the class that stock transformers will build."""

    config: PreTrainedConfig
    stock: type[PreTrainedModel]
    tensors: dict[str, Tensor]
    """All but the ternary matrices; a tied head is left out."""
    layers: dict[str, TernaryLinear]
    dense: list[str]
    """The linear layers that are not ternary."""
    inner_eps: float | None
    """Epsilon of the norms inside every ternary layer, where there are any."""
    norms: dict[str, str]
    """Of ternary layers with SubLN, the stock module that stands before them for it."""


def stock_layout(model: PreTrainedModel) -> Layout:
    """Where stock transformers keeps what this model has; UserError where it has no place for something."""
    layers = ternary_layers(model)
    _refuse_unfinished(layers)
    normed = {name: layer.norm for name, layer in layers.items() if layer.norm is not None}
    config, stock = copy.deepcopy(model.config), type(model)
    renamed: dict[str, str] = {}
    before: dict[str, str] = {}
    inner_eps = None
    places = _sub_norm_places(config)
    if normed and len(normed) == len(layers):
        inner_eps = _one_epsilon(normed)
        renamed = {f"{name}.norm.weight": f"{name}.rms_norm.weight" for name in normed}
    elif normed and normed.keys() == places.keys():
        config, stock = _bitnet_config(model, layers, _one_epsilon(normed)), BitNetForCausalLM
        before = places
        renamed = {f"{name}.norm.weight": f"{norm}.weight" for name, norm in before.items()}
    elif normed:
        raise UserError(
            f"{next(iter(normed))}: a norm inside some of the ternary layers, and transformers has places for norms "
            "in all of them or before o_proj and down_proj of every block; train with ternary.sub_norm=every or o_down"
        )
    tensors = _tensors(model, layers, renamed)
    if stock is BitNetForCausalLM and config.attention_bias:
        for name in _block_names(config, "self_attn.o_proj"):  # the class has biases on all four, or on none
            tensors.setdefault(f"{name}.bias", torch.zeros(config.hidden_size))
    dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    layout = Layout(config, stock, tensors, layers, dense, inner_eps, before)
    _check_places(layout)
    return layout


def quantization_config(layout: Layout, linear_class: str, mode: str) -> dict[str, Any]:
    """What tells stock transformers how the matrices are stored."""
    return {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": mode,
        "modules_to_not_convert": layout.dense,
        "use_rms_norm": layout.inner_eps is not None,
        "rms_norm_eps": 1e-6 if layout.inner_eps is None else layout.inner_eps,
    }


def _refuse_unfinished(layers: Mapping[str, TernaryLinear]) -> None:
    for name, layer in layers.items():
        if layer.strength != 1:
            raise UserError(
                f"{name}: its ternary strength is {layer.strength:g}, so its weights are not ternary yet; train to the "
                "end of ternary.warmup_steps"
            )


def _one_epsilon(norms: Mapping[str, nn.RMSNorm]) -> float:
    found = {norm.eps for norm in norms.values()}
    if len(found) > 1 or None in found:
        raise UserError(
            f"ternary norms with epsilons {sorted(map(str, found))}; transformers keeps one for all: "
            "export format=latent"
        )
    return float(found.pop() or 0.0)


def _block_names(config: PreTrainedConfig, place: str) -> list[str]:
    return [f"model.layers.{number}.{place}" for number in range(config.get_text_config().num_hidden_layers)]


def _sub_norm_places(config: PreTrainedConfig) -> dict[str, str]:
    """The layers before which the "bitnet" class has a norm, and the name of that norm."""
    pairs = [zip(_block_names(config, at), _block_names(config, norm)) for at, norm in SUB_NORMS.items()]
    return {layer: norm for pair in pairs for layer, norm in pair}


def _bitnet_config(model: PreTrainedModel, layers: Mapping[str, TernaryLinear], epsilon: float) -> PreTrainedConfig:
    """The configuration of the "bitnet" class for a model with SubLN; UserError for what the class cannot be."""
    config = model.config.get_text_config()
    kind, width = config.model_type, config.hidden_size
    elsewhere = "; GGUF has none either, so train with ternary.sub_norm=none or every"
    if kind not in AS_BITNET:
        raise UserError(
            f"model_type {kind}: SubLN before o_proj and down_proj has no place in a stock class{elsewhere}"
        )
    values = config.to_dict()
    head = values.get("head_dim") or width // config.num_attention_heads
    if head * config.num_attention_heads != width:
        raise UserError(
            f"{config.num_attention_heads} heads of {head} are not the width {width}: SubLN has no place in a stock "
            f"class then{elsewhere}"
        )
    if values.get("mlp_bias") or values.get("use_sliding_window") or (kind == "mistral" and values["sliding_window"]):
        raise UserError(f"model_type {kind}: MLP biases or sliding windows beside SubLN have no stock class{elsewhere}")
    if epsilon != config.rms_norm_eps:
        raise UserError(
            f"SubLN has epsilon {epsilon:g} and the model rms_norm_eps {config.rms_norm_eps:g}; transformers' bitnet "
            "class keeps one for both; train with ternary.sub_norm=none or every, or export format=latent"
        )
    bias = any(layers[name].bias is not None for name in _block_names(config, "self_attn.q_proj") if name in layers)
    settings = {key: values[key] for key in SHARED_SETTINGS if key in values}
    return BitNetConfig(**settings, attention_bias=bias, bos_token_id=None, eos_token_id=None)


def _tensors(
    model: PreTrainedModel, layers: Mapping[str, TernaryLinear], renamed: Mapping[str, str]
) -> dict[str, Tensor]:
    """Every tensor once, the latent matrices of ternary layers left out."""
    matrices = {f"{name}.weight" for name in layers}
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in matrices and id(tensor) not in seen:
            found[renamed.get(name, name)] = tensor.detach()
        seen.add(id(tensor))
    return found


def _check_places(layout: Layout) -> None:
    """UserError where the stock class has no such tensor, or not of this shape, or where it has more."""
    with torch.device("meta"), quiet():
        stock = layout.stock(layout.config)
    modules, wanted = dict(stock.named_modules()), stock.state_dict()
    kind = layout.config.model_type
    for name, layer in layout.layers.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear) or module.weight.shape != layer.weight.shape:
            raise UserError(
                f"{name}: no nn.Linear of this shape in transformers' {kind}, which can hence not be ternary there; "
                "distil into a student of Llama's shape"
            )
    found = {name: tensor.shape for name, tensor in layout.tensors.items()}
    found |= {f"{name}.weight": layer.weight.shape for name, layer in layout.layers.items()}
    norms = {f"{name}.rms_norm.weight" for name in layout.layers if layout.inner_eps is not None}
    for name, shape in found.items():
        if name not in norms and (name not in wanted or wanted[name].shape != shape):
            raise UserError(f"{name}: transformers' {kind} has no place for it; train without it to export this model")
    tied = {"lm_head.weight"} if layout.config.tie_word_embeddings else set()
    missing = sorted(wanted.keys() - found.keys() - tied)
    if missing:
        raise UserError(
            f"{missing[0]}: transformers' {kind} has it and this model does not; export format=latent, which packs "
            "nothing"
        )
