"""Low-rank adapters put on a model from outside, in PEFT's file format. Hu+ 2021, 2106.09685."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenkit.config import UserError

PREFIX = "base_model.model."  # what PEFT writes before every module name
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class LoRALinear(nn.Module):
    """x -> W x + b + (alpha / rank) B A dropout(x). W and b keep their names; A and B are at least float32."""

    def __init__(self, base: nn.Linear, *, rank: int, alpha: int | float, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha, self.enabled = rank, alpha, True
        device, dtype = base.weight.device, torch.promote_types(base.weight.dtype, torch.float32)
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, device=device, dtype=dtype)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        plain = nn.functional.linear(x, self.weight, self.bias)
        if not self.enabled:
            return plain
        update = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))))
        return plain + (update * (self.alpha / self.rank)).to(plain.dtype)

    def matrices(self) -> dict[str, Tensor]:
        """A and B under the names they have in files."""
        return {"lora_A": self.lora_A.weight, "lora_B": self.lora_B.weight}

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain linear layer over the same parameters, the update added to the weight in place."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        update = (self.lora_B.weight @ self.lora_A.weight) * (self.alpha / self.rank)
        self.weight.copy_((self.weight.to(update.dtype) + update).to(self.weight.dtype))
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of a model by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def attach_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: int | float,
    dropout: float = 0.0,
    targets: list[str] | Literal["all-linear"] = "all-linear",
) -> list[str]:
    """Freezes the model, adapts every matching linear layer but the output matrix, and returns their dotted names.

    A target is the last part of a name (`q_proj`) or a glob over all of it (`model.layers.1?.*`).
    """
    if rank < 1:
        raise UserError(f"lora rank: {rank}, where a whole number from 1 is needed")
    if adapters(model):
        raise UserError("lora: the model already has adapters; merge them first")
    head = model.get_output_embeddings()
    linear = {
        name: module for name, module in model.named_modules() if type(module) is nn.Linear and module is not head
    }
    wanted = ["*"] if targets == "all-linear" else targets
    for target in wanted:
        if not any(_matches(name, target) for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(f"lora targets: {target!r} is no linear layer here; known: {', '.join(known) or 'none'}")
    names = [name for name in linear if any(_matches(name, target) for target in wanted)]
    model.requires_grad_(False)
    for name in names:
        adapter = LoRALinear(linear[name], rank=rank, alpha=alpha, dropout=dropout)
        model.set_submodule(name, adapter.train(model.training))
    return names


def _matches(name: str, target: str) -> bool:
    return name.rpartition(".")[2] == target or fnmatchcase(name, target)


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes exactly what it computed without adapters."""
    layers = list(adapters(model).values())
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def merge_lora(model: nn.Module) -> None:
    """Folds every adapter into its weight and puts plain linear layers back."""
    for name, layer in adapters(model).items():
        model.set_submodule(name, layer.merged())


def save_lora(model: nn.Module, folder: Path) -> None:
    """Writes the adapters of a model as PEFT writes them."""
    layers = adapters(model)
    if not layers:
        raise UserError("lora: the model has no adapters to save")
    first = next(iter(layers.values()))
    tensors = {
        f"{PREFIX}{name}.{part}.weight": matrix.detach().cpu().contiguous()
        for name, layer in layers.items()
        for part, matrix in layer.matrices().items()
    }
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout.p,
        "target_modules": list(layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def load_lora(model: PreTrainedModel, folder: Path) -> list[str]:
    """Attaches the adapters that a folder holds, ours or PEFT's, and returns the adapted names."""
    settings = _settings(folder)
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
    names = sorted({key.rpartition(".lora_")[0] for key in tensors})
    expected = {f"{name}.lora_{part}.weight" for name in names for part in "AB"}
    if not names or expected != tensors.keys():
        odd = min(expected ^ tensors.keys(), default="nothing")
        raise UserError(f"{folder}: {WEIGHTS} holds {odd}, where lora_A and lora_B of linear layers are expected")
    rank, dropout = settings["r"], float(settings.get("lora_dropout", 0.0))
    attached = attach_lora(model, rank=rank, alpha=settings["lora_alpha"], dropout=dropout, targets=names)
    for name, layer in adapters(model).items():
        for part, matrix in layer.matrices().items():
            tensor = tensors[f"{name}.{part}.weight"]
            if tensor.shape != matrix.shape:
                shapes = f"{tuple(tensor.shape)} instead of {tuple(matrix.shape)}"
                raise UserError(f"{folder}: {name}.{part} is {shapes}; these adapters belong to another model")
            matrix.data.copy_(tensor)
    return attached


def _settings(folder: Path) -> dict[str, Any]:
    for name in (SETTINGS, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name} inside; write a folder that PEFT or save_lora wrote")
    settings = json.loads((folder / SETTINGS).read_text("utf-8"))
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{folder}: peft_type is {settings.get('peft_type')!r}; only LORA adapters can be loaded")
    plain = {"bias": "none", "use_dora": False, "use_rslora": False, "lora_bias": False, "fan_in_fan_out": False}
    plain |= {"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}
    for key, value in plain.items():
        if settings.get(key, value) != value:
            raise UserError(f"{folder}: {key} is {settings[key]!r}; only plain LoRA ({key}: {value!r}) can be loaded")
    return settings
