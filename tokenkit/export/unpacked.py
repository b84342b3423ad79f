"""A packed ternary folder as an ordinary one: every matrix is its trits times their scale, in bfloat16 or float32.

For tools that know no ternary layers. Its activations are not rounded to 8 bits, so it answers a little differently.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM

from tokenkit.config import UserError
from tokenkit.export.huggingface import drafted
from tokenkit.export.ternary_verify import read_config, stored_tensors
from tokenkit.export.trits import unpack_trits
from tokenkit.export.verify import ExportError
from tokenkit.models.load import quiet
from tokenkit.models.ternary_saved import QUANTIZATION

WEIGHTS = ("model.safetensors.index.json", ".safetensors")  # what is written anew, by name or suffix


def export_unpacked(
    source: Path, folder: Path, *, dtype: torch.dtype = torch.bfloat16, max_shard_bytes: int = 5_000_000_000
) -> dict[str, Any]:
    """Writes the ordinary folder, loads it with stock transformers, compares every tensor; its figures."""
    config = _packed_config(source)
    settings = config.pop(QUANTIZATION)
    config["dtype"] = str(dtype).removeprefix("torch.")
    tensors, layers = _dequantised(source, settings.get("linear_class", "bitlinear") == "bitlinear", dtype)
    with drafted(folder) as draft:
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name not in WEIGHTS and path.suffix not in WEIGHTS:
                shutil.copyfile(path, draft / path.name)
        (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        save_torch_state_dict(tensors, draft, max_shard_size=max_shard_bytes, metadata={"format": "pt"})
        _verify(draft, tensors, dtype)
    return {"ternary_layers": layers, "bytes": sum(tensor.nbytes for tensor in tensors.values())}


def _packed_config(source: Path) -> dict[str, Any]:
    if not (source / "config.json").is_file():
        raise UserError(f"{source}: no config.json inside; write the folder of a packed ternary model")
    config = read_config(source)
    settings = config.get(QUANTIZATION) or {}
    if settings.get("quant_method") != "bitnet" or settings.get("quantization_mode", "offline") != "offline":
        raise UserError(
            f"{source}: not a packed ternary model (no offline bitnet quantization_config); unpacking is for folders "
            "of `tokenkit export format=ternary`"
        )
    if settings.get("use_rms_norm"):
        raise UserError(
            f"{source}: has a norm inside every ternary layer (use_rms_norm), which no ordinary model has; "
            "keep the packed folder"
        )
    return config


def _dequantised(source: Path, reciprocal: bool, dtype: torch.dtype) -> tuple[dict[str, Tensor], int]:
    """Every tensor of the ordinary model, and how many of them were packed."""
    scales = {name: tensor.float() for name, tensor in stored_tensors(source) if tensor.numel() == 1}
    tensors, layers = {}, 0
    for name, tensor in stored_tensors(source):
        scale = scales.get(f"{name}_scale")
        if scale is not None:
            gamma = scale.reciprocal() if reciprocal else scale
            tensors[name] = (unpack_trits(tensor) * gamma).to(dtype)
            layers += 1
        elif name not in scales:
            tensors[name] = tensor.to(dtype)
    return tensors, layers


def _verify(folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    with quiet():
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    if loading["missing_keys"] or loading["unexpected_keys"]:
        raise ExportError(f"{folder.name}: the reloaded model lacks tensors, or has others")
    found = model.state_dict()
    for name, tensor in tensors.items():
        if not torch.equal(found[name].cpu(), tensor):
            raise ExportError(f"{folder.name}: the tensor {name} is not the same after reloading")
