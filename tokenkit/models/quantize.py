"""A model that is only read, with its linear layers in 8 or 4 bits: a teacher that takes less room.

8 bits are torchao's, with a scale for every output. torchao's 4 bits need a GPU of its own kind and packages beside it,
so those are here: groups of 32 inputs, 16 levels between the least and the largest weight of a group, made whole again
for the product of one layer at a time. Embeddings, output head, norms and biases stay as they are.
"""

from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tokenkit.config import UserError

Bits = Literal["int8", "int4"]
GROUP = 32
LEVELS = 15


class Int4Linear(nn.Module):
    """x -> W x + b, where W is two codes a byte, times a scale and above the least weight of each group."""

    packed: UInt8[Tensor, "O half"]
    scale: Float[Tensor, "O G"]
    least: Float[Tensor, "O G"]

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        packed, scale, least = pack(base.weight.detach())
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("least", least)
        self.bias = base.bias

    def whole(self, dtype: torch.dtype) -> Float[Tensor, "O I"]:
        """The matrix that is computed with."""
        codes = torch.stack([self.packed & LEVELS, self.packed >> 4], -1).flatten(-2)
        groups = codes.unflatten(-1, (-1, GROUP)).to(dtype)
        groups = groups * self.scale.to(dtype).unsqueeze(-1) + self.least.to(dtype).unsqueeze(-1)
        return groups.flatten(-2)[:, : self.in_features]

    def forward(self, x: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return nn.functional.linear(x, self.whole(dtype), self.bias)


def pack(
    weight: Float[Tensor, "O I"],
) -> tuple[UInt8[Tensor, "O half"], Float[Tensor, "O G"], Float[Tensor, "O G"]]:
    """Codes, the first of two in the low bits, and scale and least weight of every group.

    Codes are the nearest levels of the rounded scale, so no error is made twice. A last group is filled up with its
    row's last weight.
    """
    columns = weight.shape[1]
    filled = torch.cat([weight.float(), weight[:, -1:].float().expand(-1, -columns % GROUP)], 1)
    groups = filled.unflatten(-1, (-1, GROUP))
    least = groups.amin(-1).bfloat16()
    scale = ((groups.amax(-1) - least.float()) / LEVELS).clamp_min(torch.finfo(torch.bfloat16).tiny).bfloat16()
    codes = ((groups - least.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)).round_().clamp_(0, LEVELS)
    pairs = codes.flatten(-2).to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4, scale, least


def quantised_names(model: PreTrainedModel) -> list[str]:
    """The dotted names of the linear layers, but the output head; also GPT-2's transposed ones."""
    head = model.get_output_embeddings()
    return [name for name, m in model.named_modules() if type(m) in (nn.Linear, Conv1D) and m is not head]


@torch.no_grad()
def quantize_linears(model: PreTrainedModel, bits: Bits) -> list[str]:
    """Replaces the weights of linear layers in place; the names of the layers. UserError where there are none."""
    names = quantised_names(model)
    if not names:
        raise UserError(f"quantize: {model.config.model_type} has no linear layer to quantise here; leave it out")
    for name in names:
        module = model.get_submodule(name)
        linear = _linear_of(module) if isinstance(module, Conv1D) else module
        assert isinstance(linear, nn.Linear)
        model.set_submodule(name, Int4Linear(linear).eval() if bits == "int4" else linear)
    if bits == "int8":
        _by_torchao(model, names)
    return names


def _linear_of(module: Conv1D) -> nn.Linear:
    """GPT-2's layer as an ordinary one."""
    width, outputs = module.weight.shape
    linear = nn.Linear(width, outputs, device="meta")
    linear.weight, linear.bias = nn.Parameter(module.weight.T.contiguous()), module.bias
    return linear.eval()


def _by_torchao(model: PreTrainedModel, names: list[str]) -> None:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise UserError(
            "quantize: int8 is torchao's, which is not installed; pip install torchao (the extra quantize), or write "
            "quantize=int4"
        ) from None
    chosen = set(names)
    quantize_(model, Int8WeightOnlyConfig(version=2), filter_fn=lambda module, name: name in chosen)


def is_quantised(model: nn.Module) -> bool:
    """Whether some of a model's matrices are held in 8 or 4 bits."""
    wrapped = any(is_traceable_wrapper_subclass(parameter) for parameter in model.parameters())
    return wrapped or any(isinstance(module, Int4Linear) for module in model.modules())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of what a model holds, matrices of torchao as they lie in memory; a tied table once."""
    parts = [part for tensor in (*model.parameters(), *model.buffers()) for part in _parts(tensor)]
    return sum(part.numel() * part.element_size() for part in parts)


def _parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor is made of: itself, or what one of torchao's wraps."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(vars(tensor)[name])]
