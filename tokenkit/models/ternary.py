"""A model made ternary from outside: which layers, with which norms, and how fast. BitNet b1.58 and BitDistill.

Ma+ 2024, 2402.17764; Wu+ 2025, 2510.13998.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from jaxtyping import Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tokenkit.config import Config, UserError
from tokenkit.models.bitlinear import Backward, Scale, TernaryLinear, latent_of, ternary_layers
from tokenkit.models.lora import adapters
from tokenkit.models.sub_norm import linear_layers, measured_gains, new_norm, output_places

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
STEEPNESS = {"exponential": 5.0, "sigmoid": 10.0}


class TernaryConfig(Config):
    """Which weights become -1, 0 or 1, and how."""

    skip: list[str] = []
    """Linear layers that stay as they are: last parts of names, or globs over dotted names. The output head, routers of
    experts and whatever is no linear layer (embeddings, norms) always stay."""
    sub_norm: Literal["none", "o_down", "every"] = "o_down"
    """Norms put before the matrices that end attention and MLP, or before every ternary matrix."""
    calibrate: bool = True
    """Begin these norms with the gains that change the model least, measured on some rows of its data."""
    activation_bits: Literal[8] | None = 8
    """What ternary matrices read is rounded to so many bits, per token; null: not at all."""
    scale: Scale = "mean"
    """What weights are measured by before they are rounded: mean or median of their sizes."""
    warmup: Literal["linear", "exponential", "sigmoid"] = "linear"
    """Course from the model as it was to the ternary one; exponential is fast first, sigmoid in the middle."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of this course; 0: ternary from the first step on."""
    backward: Backward = "float32"
    """saved_int8 keeps int8 instead of float32 for the backward pass; int8 also rounds gradients, at random."""
    seed: int = 0
    """Decides the random rounding of `backward: int8`, together with the seed of the run."""

    @model_validator(mode="after")
    def _kept(self) -> "TernaryConfig":
        if self.activation_bits is None and self.backward != "float32":
            raise UserError(
                f"ternary.backward: {self.backward} keeps int8 activations; write activation_bits: 8, "
                "or backward: float32"
            )
        return self


@dataclass(frozen=True)
class TernaryReport:
    """What was converted, and what was not."""

    converted: tuple[str, ...]
    kept: tuple[str, ...]
    """Linear layers that stayed."""
    norms: tuple[str, ...]
    """Layers that got a norm before them."""
    ternary_weights: int
    parameters: int
    """All of the model's, each counted once."""
    calibration_tokens: int

    def sentence(self) -> str:
        """One line for a terminal."""
        share = self.ternary_weights / self.parameters
        norms = f", {len(self.norms)} norms put before them" if self.norms else ""
        return (
            f"ternary: {len(self.converted)} linear layers ({self.ternary_weights:,} of {self.parameters:,} weights, "
            f"{share:.1%}){norms}; {len(self.kept)} kept"
        )


def strength_at(config: TernaryConfig, step: int) -> float:
    """How ternary the layers are at a step counted from 0: from 0 to exactly 1 at `warmup_steps`, and 1 from there on.

    With s the share of the warm-up: s; (1 - e^-5s) / (1 - e^-5); or the logistic function of 10 (s - 1/2), stretched to
    reach 0 and 1.
    """
    if step >= config.warmup_steps:
        return 1.0
    share = step / config.warmup_steps
    if config.warmup == "linear":
        return share
    steepness = STEEPNESS[config.warmup]
    if config.warmup == "exponential":
        return math.expm1(-steepness * share) / math.expm1(-steepness)
    return (math.tanh(steepness * (share - 0.5) / 2) / math.tanh(steepness / 4) + 1) / 2


def set_strength(model: nn.Module, value: float) -> None:
    """How ternary every ternary layer of the model is from now on, 0 to 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"a strength is a number from 0 to 1, not {value}")
    for layer in ternary_layers(model).values():
        layer.strength = value


def attach_ternary(
    model: PreTrainedModel, config: TernaryConfig, *, calibration: Sequence[Int[Tensor, "1 _"]] = ()
) -> TernaryReport:
    """Puts a ternary layer, with the same weights, in the place of every linear layer that the config does not skip.

    In place. `calibration` are ids of texts, of which gains are measured where norms are put in. A model that is
    ternary already keeps its layers and their norms, and is trained on as the config says.
    """
    if adapters(model):
        raise UserError("ternary: the model has LoRA adapters; merge them first, or write train.mode: full")
    if ternary_layers(model):
        return _trained_on(model, config)
    linear, kept = chosen_layers(model, config.skip)
    places = {"none": [], "o_down": output_places(model) if config.sub_norm == "o_down" else [], "every": list(linear)}
    norms = [name for name in places[config.sub_norm] if name in linear]
    gains: dict[str, Tensor] = {}
    if norms and config.calibrate:
        if not calibration:
            raise UserError("ternary.calibrate: needs texts to measure gains on; give some, or write calibrate: false")
        gains = measured_gains(model, norms, calibration)
    for name, layer in linear.items():
        made = _ternary(model, layer, config, name in norms, gains.get(name))
        _replace(model, layer, made)
    return _report(model, kept, sum(ids.numel() for ids in calibration) if gains else 0)


def _trained_on(model: PreTrainedModel, config: TernaryConfig) -> TernaryReport:
    layers = ternary_layers(model).values()
    inside = model.config.model_type == "bitnet" and config.sub_norm == "o_down"  # its own modules are these norms
    if config.sub_norm != "none" and not inside and all(layer.norm is None for layer in layers):
        raise UserError("ternary.sub_norm: the model is ternary already, without norms; write sub_norm: none")
    for layer in layers:
        layer.scale, layer.activation_bits = config.scale, config.activation_bits
        layer.backward, layer.seed, layer.strength = config.backward, config.seed, strength_at(config, 0)
    return _report(model, list(linear_layers(model)), 0)


def _report(model: PreTrainedModel, kept: list[str], calibration_tokens: int) -> TernaryReport:
    layers = ternary_layers(model)
    return TernaryReport(
        converted=tuple(layers),
        kept=tuple(kept),
        norms=tuple(name for name, layer in layers.items() if layer.norm is not None),
        ternary_weights=sum(weight.numel() for weight in {layer.weight for layer in layers.values()}),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        calibration_tokens=calibration_tokens,
    )


def chosen_layers(model: PreTrainedModel, skip: Sequence[str]) -> tuple[dict[str, nn.Linear | Conv1D], list[str]]:
    """The linear layers that can become ternary, by name, and the names of those that stay."""
    every = linear_layers(model)
    stacks = _stacks(model)
    for pattern in skip:
        if not any(_matches(name, pattern) for name in [*every, *stacks]):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in every}))
            raise UserError(f"ternary.skip: {pattern!r} is no linear layer here; known: {known or 'none'}")
    always = {model.get_output_embeddings(), *_routers(model, every.values())}
    kept = [name for name, module in every.items() if module in always or any(_matches(name, p) for p in skip)]
    if len(kept) == len(every):
        raise UserError(
            f"ternary: none of the {len(every)} linear layers of this {model.config.model_type} model would become "
            "ternary; shorten ternary.skip, or take another model"
        )
    whole = [name for name in stacks if not any(_matches(name, pattern) for pattern in skip)]
    if whole:
        globs = sorted({"*." + ".".join(name.split(".")[-2:]) for name in whole})
        raise UserError(
            f"ternary: {whole[0]} holds several matrices in one tensor, which cannot be made ternary; "
            f"write ternary.skip: {globs} to leave such tensors as they are"
        )
    return {name: module for name, module in every.items() if name not in kept}, kept


def _matches(name: str, pattern: str) -> bool:
    return name.rpartition(".")[2] == pattern or fnmatchcase(name, pattern)


def _routers(model: PreTrainedModel, layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Linear layers that make one number per expert, or one number: they choose, and are small."""
    config = model.config.get_text_config().to_dict()
    counts = {config[key] for key in EXPERT_COUNTS if config.get(key)}
    if not counts:
        return []
    return [layer for layer in layers if isinstance(layer, nn.Linear) and layer.out_features in {1, *counts}]


def _stacks(model: PreTrainedModel) -> list[str]:
    """Names of parameters that hold the matrices of several experts."""
    convolutions = {p for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d)) for p in m.parameters()}
    return [name for name, p in model.named_parameters() if p.ndim > 2 and p not in convolutions]


def _ternary(
    model: PreTrainedModel, layer: nn.Linear | Conv1D, config: TernaryConfig, normed: bool, gain: Tensor | None
) -> TernaryLinear:
    weight = latent_of(layer)
    bias = layer.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    made = TernaryLinear(
        weight,
        bias,
        norm=new_norm(model, weight, gain) if normed else None,
        scale=config.scale,
        activation_bits=config.activation_bits,
        backward=config.backward,
        seed=config.seed,
    )
    made.strength = strength_at(config, 0)
    return made.train(layer.training)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """In every place where it stands: models that share layers name one more than once."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(name, new)
