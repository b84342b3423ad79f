"""The adapters of a model in PEFT's file format, both ways."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tokenkit.config import UserError
from tokenkit.models.adapter import PREFIX, SETTINGS, WEIGHTS, Adapter, Update, put_whole, read_adapter
from tokenkit.models.lora import LoRALinear, adapters


def save_lora(
    model: PreTrainedModel, folder: Path, *, base: str | None = None, revision: str | None = None, tables: bool = False
) -> None:
    """Writes what is trained beside a base as PEFT writes it: adapters, and the modules that are trained whole.

    `base` is where that model is found. Embedding and output matrix are written where they are trained, and with
    `tables` in any case, as PEFT does for a vocabulary that has changed (`save_embedding_layers`).
    """
    layers = adapters(model)
    if not layers:
        raise UserError("lora: the model has no adapters to save")
    tensors = {f"{name}.{part}": tensor for name, layer in layers.items() for part, tensor in layer.adapter().items()}
    ends = _ends(model)
    trained = {name.rpartition(".")[0] for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    saved = [name for name, module in model.named_modules() if name in trained - ends and not _part(name, layers)]
    for name in [*saved, *sorted(ends if tables or trained & ends else ())]:
        tensors |= {f"{name}.{part}": tensor for part, tensor in model.get_submodule(name).named_parameters()}
    folder.mkdir(parents=True, exist_ok=True)
    copies = {f"{PREFIX}{name}": tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(copies, folder / WEIGHTS, metadata={"format": "pt"})
    settings = _settings(layers, saved) | {"base_model_name_or_path": base, "revision": revision}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def _ends(model: PreTrainedModel) -> set[str]:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name for name, module in model.named_modules() if any(module is end for end in ends)}


def _part(name: str, layers: Mapping[str, LoRALinear]) -> bool:
    """Whether a module is an adapted layer or inside one."""
    return name in layers or name.rpartition(".")[0] in layers


def _settings(layers: Mapping[str, LoRALinear], saved: Sequence[str]) -> dict[str, Any]:
    """The adapter_config.json: the commonest rank and alpha, and those of the layers that have others."""
    first = next(iter(layers.values()))
    (rank, alpha), _ = Counter((layer.rank, layer.alpha) for layer in layers.values()).most_common(1)[0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(name): layer.rank for name, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {re.escape(name): layer.alpha for name, layer in layers.items() if layer.alpha != alpha},
        "lora_dropout": first.dropout.p,
        "use_rslora": first.rslora,
        "use_dora": first.lora_magnitude_vector is not None,
        "target_modules": list(layers),
        "modules_to_save": list(saved) or None,
        "bias": "none",
        "fan_in_fan_out": first.transposed,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def load_lora(model: PreTrainedModel, folder: Path) -> list[str]:
    """Attaches the adapters that a folder holds, ours or PEFT's, to be trained on, and returns the adapted names.

    Tensors that were trained whole are put in place and trained on too. UserError for what can only be merged.
    """
    if adapters(model):
        raise UserError("lora: the model already has adapters; merge them first")
    adapter = read_adapter(folder)
    if adapter.settings.get("bias", "none") != "none":
        raise UserError(f"{folder}: bias is {adapter.settings['bias']!r}, which can be merged, and not trained on here")
    bases = {name: _base(model, adapter, name) for name in adapter.updates}
    put_whole(model, adapter)
    model.requires_grad_(False)
    for name, update in adapter.updates.items():
        layer = LoRALinear(
            bases[name],
            rank=len(update.a),
            alpha=update.alpha,
            dropout=float(adapter.settings.get("lora_dropout", 0.0)),
            rslora=bool(adapter.settings.get("use_rslora", False)),
            dora=update.magnitude is not None,
        )
        _fill(layer, update)
        model.set_submodule(name, layer.train(model.training))
    for name in adapter.whole:
        model.get_parameter(name).requires_grad_(True)
    return list(adapters(model))


def _base(model: PreTrainedModel, adapter: Adapter, name: str) -> nn.Linear | Conv1D:
    module = dict(model.named_modules()).get(name)
    if not isinstance(module, nn.Linear | Conv1D):
        found = "nothing" if module is None else f"a {type(module).__name__}"
        raise UserError(f"{adapter.folder}: {name} is {found} in this model, where a linear layer is adapted")
    update, shape = adapter.updates[name], tuple(module.weight.shape)
    if isinstance(module, Conv1D):
        shape = shape[::-1]
    if (len(update.b), update.a.shape[1]) != shape:
        raise UserError(
            f"{adapter.folder}: {name} adapts a matrix of {len(update.b)} x {update.a.shape[1]}, where the model has "
            f"{shape[0]} x {shape[1]}; these adapters belong to another model"
        )
    return module


@torch.no_grad()
def _fill(layer: LoRALinear, update: Update) -> None:
    layer.lora_A.weight.copy_(update.a)
    layer.lora_B.weight.copy_(update.b)
    if layer.lora_magnitude_vector is not None and update.magnitude is not None:
        layer.lora_magnitude_vector.copy_(update.magnitude)
