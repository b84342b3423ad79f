"""Layers that use the same weights. ALBERT, 1909.11942."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.models.blocks import block_list


def share_blocks(model: PreTrainedModel, count: int) -> None:
    """Gives the model's layers `count` sets of weights, in place; neighbours share, those of the first of each group.

    Parameters are counted and trained once. Files have every layer whole, so that any loader reads them.
    """
    name, blocks = block_list(model)
    if count > len(blocks):
        raise UserError(f"student.share_layers: {count} of {len(blocks)} layers; write 1 to {len(blocks)}")
    first: dict[int, nn.Module] = {}
    for number, block in enumerate(blocks):
        leader = first.setdefault(number * count // len(blocks), block)
        if leader is not block:
            _use(block, leader, f"{name}.{number}")
    model.register_state_dict_post_hook(_whole)


def _use(block: nn.Module, leader: nn.Module, name: str) -> None:
    theirs = dict(leader.named_parameters())
    own = {part: tensor.shape for part, tensor in block.named_parameters()}
    if own != {part: tensor.shape for part, tensor in theirs.items()}:
        raise UserError(f"student.share_layers: {name} is built differently from the layer before it; leave this out")
    for part in own:
        holder, _, last = part.rpartition(".")
        block.get_submodule(holder).register_parameter(last, theirs[part])


def _whole(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """A copy for every further name of a tensor, but for the tied tables, which transformers leaves out itself."""
    seen: set[int] = set()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or name in _tied(module):
            continue
        if tensor.data_ptr() in seen and tensor.numel():
            state[name] = tensor.clone()
        seen.add(tensor.data_ptr())


def _tied(module: nn.Module) -> frozenset[str]:
    assert isinstance(module, PreTrainedModel)
    return frozenset(module.all_tied_weights_keys)
