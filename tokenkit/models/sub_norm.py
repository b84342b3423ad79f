"""Where BitNet puts norms of its own (SubLN): before the matrix that ends an attention block, and an MLP. 2310.11453.

A norm put into a trained model changes what it computes. Gains measured on some text undo most of that.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tokenkit.config import UserError
from tokenkit.models.tap import PROJECTIONS
from tokenkit.quantities import at_least_float32


def linear_layers(module: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """The plain linear layers inside a module by name, GPT-2's transposed ones too; each once."""
    found: dict[str, nn.Linear | Conv1D] = {}
    for name, inside in module.named_modules():
        if isinstance(inside, Conv1D) or (isinstance(inside, nn.Linear) and _is_plain(inside)):
            found[name] = inside
    return found


@torch.no_grad()
def _is_plain(layer: nn.Linear) -> bool:
    """Whether the layer, or what a model family made of that class, is x -> W x + b."""
    weight, bias = layer.weight, layer.bias
    if type(layer) is nn.Linear or not weight.is_floating_point():
        return type(layer) is nn.Linear
    probe = torch.linspace(-1, 1, layer.in_features, device=weight.device, dtype=weight.dtype).unsqueeze(0)
    return torch.allclose(layer(probe), linear(probe, weight, bias), rtol=1e-2, atol=1e-4)


def output_places(model: PreTrainedModel) -> list[str]:
    """Names of the matrices that end an attention block or an MLP, layer by layer; UserError where they are not known.

    By structure: beside query, key and value an attention block has one more linear layer; in the rest of its layer a
    matrix that makes as many channels ends an MLP, of several in one module the last.
    """
    if model.config.model_type == "bitnet":
        raise UserError("ternary.sub_norm: a bitnet model has these norms already; write sub_norm: none")
    places: list[str] = []
    for name, module in model.named_modules():
        own = {child: inside for child, inside in linear_layers(module).items() if "." not in child}
        group = next((group for group in PROJECTIONS if own.keys() >= set(group)), None)
        if group is None:
            continue
        layer = name.rpartition(".")[0]
        ends = [child for child in own if child not in group]
        found = _mlp_ends(model.get_submodule(layer), module, _outputs(own[ends[0]])) if len(ends) == 1 else []
        if not found:
            raise UserError(_unknown(model))
        places += [f"{name}.{ends[0]}", *(f"{layer}.{end}" for end in found)]
    if not places:
        raise UserError(_unknown(model))
    return places


def _mlp_ends(layer: nn.Module, attention: nn.Module, width: int) -> list[str]:
    """Names within a layer: of the linear layers beside the attention, those that end an MLP."""
    inside = set(attention.modules())
    ends: dict[str, str] = {}
    for name, module in linear_layers(layer).items():
        if module not in inside and _outputs(module) == width:
            ends[name.rpartition(".")[0]] = name
    return list(ends.values())


def _outputs(layer: nn.Linear | Conv1D) -> int:
    return layer.nf if isinstance(layer, Conv1D) else layer.out_features


def _unknown(model: PreTrainedModel) -> str:
    kind = model.config.model_type
    return f"ternary.sub_norm: where attention and MLP end is not known in {kind}; write sub_norm: every, or none"


@torch.no_grad()
def measured_gains(
    model: PreTrainedModel, places: Iterable[str], calibration: Sequence[Int[Tensor, "1 _"]]
) -> dict[str, Float[Tensor, ""]]:
    """The root mean square of each place's input, in the mean over all positions of the texts.

    Of all gains that are one number, this one lets a norm change its input least (in squares).
    """
    sums = {name: torch.zeros((), dtype=torch.float64, device=model.device) for name in places}
    positions = 0

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums[name] += at_least_float32(inputs[0]).square().mean(-1).sqrt().sum()

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(look(name)) for name in sums]
    training = model.training
    model.eval()
    try:
        for ids in calibration:
            model.base_model(input_ids=ids.to(model.device), use_cache=False)
            positions += ids.shape[1]
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return {name: value / max(1, positions) for name, value in sums.items()}


def new_norm(model: PreTrainedModel, weight: Tensor, gain: Tensor | None = None) -> nn.RMSNorm:
    """A norm of what a matrix (out x in) reads, with the epsilon of the model's own norms, and one gain for all: 1."""
    epsilon = model.config.get_text_config().to_dict().get("rms_norm_eps", 1e-6)
    norm = nn.RMSNorm(weight.shape[1], eps=epsilon, device=weight.device, dtype=weight.dtype)
    if gain is not None:
        nn.init.constant_(norm.weight, gain.item())
    return norm
