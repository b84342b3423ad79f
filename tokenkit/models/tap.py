"""What attention layers compute on the way: queries, keys and values, taken at the output of their linear layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenkit.config import UserError

PROJECTIONS = (  # names of the linear layers of one attention block, in the order of their outputs
    ("q_proj", "k_proj", "v_proj"),  # Llama and most others
    ("query", "key", "value"),
    ("qkv_proj",),  # Phi 3
    ("query_key_value",),  # GPT-NeoX, BLOOM, Falcon
    ("c_attn",),  # GPT-2
)


class Tapped:
    """Outputs of the tapped layers, as they come."""

    def __init__(self, blocks: list[list[nn.Module]]):
        self.blocks = blocks
        self._outputs: dict[nn.Module, Tensor] = {}

    def keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """The hook of one linear layer."""
        self._outputs[module] = output

    def stacked(self) -> Float[Tensor, "B T L D"]:
        """Query, key and value of every layer side by side."""
        return torch.stack([torch.cat([self._outputs[m] for m in block], -1) for block in self.blocks], 2)


@contextmanager
def queries_keys_values(model: PreTrainedModel, wanted: bool) -> Iterator[Tapped]:
    """Inside the block a forward pass leaves its queries, keys and values behind, if they are wanted."""
    tapped = Tapped(attention_projections(model) if wanted else [])
    handles = [module.register_forward_hook(tapped.keep) for block in tapped.blocks for module in block]
    try:
        yield tapped
    finally:
        for handle in handles:
            handle.remove()


def attention_projections(model: PreTrainedModel) -> list[list[nn.Module]]:
    """The linear layers of each attention block, first layer first; UserError where none has a known name."""
    blocks = []
    for module in model.base_model.modules():
        children = dict(module.named_children())
        names = next((group for group in PROJECTIONS if all(name in children for name in group)), None)
        if names:
            blocks.append([children[name] for name in names])
    if not blocks:
        raise UserError(
            f"losses.hidden_states.states: no query, key and value layers are known in {model.config.model_type}; "
            "write states=last or states=all"
        )
    return blocks
