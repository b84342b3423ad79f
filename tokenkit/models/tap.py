"""What layers compute on the way, taken by hooks: queries, keys, values, outputs of attention and MLP."""

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.quantities import TAPPED

PROJECTIONS = (  # names of the linear layers of one attention block, in the order of their outputs
    ("q_proj", "k_proj", "v_proj"),  # Llama and most others
    ("query", "key", "value"),
    ("qkv_proj",),  # Phi 3
    ("query_key_value",),  # GPT-NeoX, BLOOM, Falcon
    ("c_attn",),  # GPT-2
)
BY_HEAD = ("gpt_neox", "bloom")  # one layer's output is query, key and value of the first head, then of the second
OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense")  # of an attention block
MLPS = ("mlp", "feed_forward", "block_sparse_moe", "ffn")  # beside it in a layer
SPLIT = ("queries", "keys", "values")


class Tapped:
    """Outputs of the tapped modules, as they come: for every leaf that is wanted the modules of each layer."""

    def __init__(self, model: PreTrainedModel, wanted: AbstractSet[str]):
        self.model = model
        self.wanted = wanted & TAPPED
        self.modules: dict[str, list[list[nn.Module]]] = {}
        if self.wanted & {"qkv", *SPLIT}:
            self.modules["qkv"] = attention_projections(model)
        if "attention_output" in self.wanted:
            self.modules["attention_output"] = [[m] for m in _beside(model, "attention_output", OUTPUTS)]
        if "mlp_output" in self.wanted:
            self.modules["mlp_output"] = [[m] for m in _beside(model, "mlp_output", MLPS)]
        self._outputs: dict[nn.Module, Tensor] = {}

    def keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """The hook of one module; a mixture of experts also returns what its router said."""
        self._outputs[module] = output[0] if isinstance(output, tuple) else output

    def leaves(self) -> dict[str, Float[Tensor, "B T L D"]]:
        """The wanted leaves of the forward pass that has just ended, every layer's side by side."""
        found = {}
        for name, layers in self.modules.items():
            per_layer = [torch.cat([self._outputs[m] for m in modules], -1) for modules in layers]
            if name in self.wanted:
                found[name] = torch.stack(per_layer, 2)
            if name == "qkv" and self.wanted & {*SPLIT}:
                parts = [self._split([self._outputs[m] for m in modules]) for modules in layers]
                found |= {k: torch.stack(p, 2) for k, p in zip(SPLIT, zip(*parts)) if k in self.wanted}
        return found

    def _split(self, outputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of one layer, whatever the number of its linear layers."""
        if len(outputs) == 3:
            return outputs[0], outputs[1], outputs[2]
        fused, config = outputs[0], self.model.config.get_text_config()
        heads = config.num_attention_heads
        if config.model_type in BY_HEAD:
            query, key, value = fused.unflatten(-1, (heads, 3, -1)).unbind(-2)
            return query.flatten(-2), key.flatten(-2), value.flatten(-2)
        # grouped heads, where a config knows them: keys and values are narrower than queries
        settings = config.to_dict()
        groups = settings.get("num_key_value_heads") or heads
        width = fused.shape[-1] // (heads + 2 * groups)
        query, key, value = fused.split([heads * width, groups * width, groups * width], -1)
        return query, key, value


@contextmanager
def tapped(model: PreTrainedModel, wanted: AbstractSet[str]) -> Iterator[Tapped]:
    """Inside the block a forward pass leaves behind what is wanted of `TAPPED`; the attention kernel stays as it is."""
    tap = Tapped(model, wanted)
    modules = {module for layers in tap.modules.values() for layer in layers for module in layer}
    handles = [module.register_forward_hook(tap.keep) for module in modules]
    try:
        yield tap
    finally:
        for handle in handles:
            handle.remove()


def attention_projections(model: PreTrainedModel) -> list[list[nn.Module]]:
    """The linear layers of each attention block, first layer first; UserError where none has a known name."""
    return [[children[name] for name in names] for _, children, names in _attention_blocks(model)]


def _attention_blocks(model: PreTrainedModel) -> list[tuple[str, dict[str, nn.Module], tuple[str, ...]]]:
    """Dotted name, children, and which of them make queries, keys and values, of every attention block."""
    blocks: list[tuple[str, dict[str, nn.Module], tuple[str, ...]]] = []
    for path, module in model.base_model.named_modules():
        children = dict(module.named_children())
        names = next((group for group in PROJECTIONS if all(name in children for name in group)), None)
        if names:
            blocks.append((path, children, names))
    if not blocks:
        raise UserError(
            f"losses: no query, key and value layers are known in {model.config.model_type}; take a loss over hidden "
            "states or logits"
        )
    return blocks


def _beside(model: PreTrainedModel, leaf: str, names: tuple[str, ...]) -> list[nn.Module]:
    """Of every layer the output module of its attention block, or the MLP that stands beside it."""
    found = []
    for path, children, _ in _attention_blocks(model):
        inside = children if leaf == "attention_output" else _children(model, path.rpartition(".")[0])
        module = next((inside[name] for name in names if name in inside), None)
        if module is None:
            what = "output of the attention" if leaf == "attention_output" else "MLP"
            raise UserError(
                f"losses: no {what} is known in {model.config.model_type} (looked for {', '.join(names)} in layer "
                f"{path.rpartition('.')[0]}); write of=block"
            )
        found.append(module)
    return found


def _children(model: PreTrainedModel, path: str) -> dict[str, nn.Module]:
    return dict(model.base_model.get_submodule(path).named_children())
