"""Matrices of 8 or 4 bits in a folder that stock transformers loads: torchao's int8, compressed-tensors' packed int4.

Embeddings, the output head, norms and biases stay as they are, in `dtype`. Nothing is calibrated: the largest weight of
a row says what its levels are (int8), or the least squared error of a group (int4). torchao's own int4 for a CPU can be
stored in no safetensors file that transformers 5 reads, and what can be takes a byte a weight; hence the other layout.
"""

import copy
import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tokenkit.config import UserError
from tokenkit.export.huggingface import SHARD_BYTES, drafted, write_settings, write_tokenizer
from tokenkit.export.nibbles import PER_WORD, dequantise_groups, packed_tensors, quantise_groups
from tokenkit.export.quality import LINES
from tokenkit.export.quantized_verify import verify_quantized
from tokenkit.models.bitlinear import ternary_layers
from tokenkit.models.load import input_matrix
from tokenkit.tokenizers.base import Tokenizer

Scheme = Literal["int8", "int4", "int4_tiled"]
MAX_RISE = {"int8": 0.01, "int4": 0.1, "int4_tiled": 0.1}  # of bits per byte, as a share
FILENAMES = "model{suffix}.safetensors"


@dataclass(frozen=True)
class Quantized:
    """A model with rounded matrices, and what is written of it."""

    model: PreTrainedModel
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    settings: dict[str, Any]
    """The `quantization_config` of config.json."""


def export_quantized(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    scheme: Scheme,
    group_size: int = 32,
    skip: list[str] = [],  # noqa: B006 (read only)
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = SHARD_BYTES,
    documents: list[str] = LINES,
    max_rise: float | None = None,
) -> dict[str, Any]:
    """Writes the folder, loads it with stock transformers, compares; the figures. `model` stays as it is.

    `skip` names layers that stay as they are: the last part of a name, or a glob. UserError, and no folder, where bits
    per byte on `documents` rise by more than the share `max_rise`, by default 1 % for int8 and 10 % for int4.
    """
    rows = len(input_matrix(model))
    if rows < tokenizer.vocab_size:
        raise UserError(f"export: {rows} embedding rows for {tokenizer.vocab_size} token ids; transfer the model first")
    layers = quantised_layers(model, skip)
    allowed = MAX_RISE[scheme] if max_rise is None else max_rise
    with drafted(folder) as draft:
        copied = copy.deepcopy(model).to(dtype)  # pyrefly: ignore [bad-argument-type] (a decorator hides the signature)
        rounded = MAKERS[scheme](copied, layers, group_size)
        config = copy.deepcopy(model.config)
        config.quantization_config, config.dtype = rounded.settings, dtype
        _write(rounded, config, tokenizer, draft, max_shard_bytes)
        figures = verify_quantized(draft, model, rounded.model, tokenizer, documents)
        _refuse_rise(figures, allowed, scheme)
    before = sum(parameter.numel() * dtype.itemsize for parameter in model.parameters())
    after = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {"quantized_layers": len(layers), "bytes_unquantized": before, "bytes": after, **figures}


def quantised_layers(model: PreTrainedModel, skip: list[str]) -> list[str]:
    """The dotted names of the linear layers, but the output head and what `skip` matches."""
    if ternary_layers(model):
        raise UserError("export: the model is ternary, which is smaller; write format=ternary or gguf")
    names = _linear(model)
    for pattern in skip:
        if not any(_matches(name, pattern) for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            raise UserError(f"skip: {pattern!r} is no linear layer here; known: {', '.join(known) or 'none'}")
    names = [name for name in names if not any(_matches(name, pattern) for pattern in skip)]
    if not names:
        kind = model.config.model_type
        raise UserError(f"export: {kind} has no linear layer to quantise here; write format=huggingface dtype=bfloat16")
    return names


def _matches(name: str, pattern: str) -> bool:
    return name.rpartition(".")[2] == pattern or fnmatchcase(name, pattern)


def _linear(model: PreTrainedModel) -> list[str]:
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and module is not head]


def _kept(model: PreTrainedModel, layers: list[str]) -> list[str]:
    """Linear layers that stay as they are, the head among them."""
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and name not in layers]


def _refuse_rise(figures: dict[str, Any], allowed: float, scheme: Scheme) -> None:
    rise = figures["bits_per_byte_after"] / figures["bits_per_byte_before"] - 1
    figures["rise"] = rise
    if not rise <= allowed:
        finer = "" if scheme == "int8" else ", or a smaller group_size"
        raise UserError(
            f"export: bits per byte rise from {figures['bits_per_byte_before']:.4f} to "
            f"{figures['bits_per_byte_after']:.4f}, by {rise:.1%}, where max_rise allows {allowed:.1%}; write "
            f"max_rise={rise * 1.1:.2g} to have it anyway, skip=[...] for layers that matter{finer}"
        )


def _stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict without the second name of what is tied."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=True)}
    again = {name for name, _ in model.named_parameters(remove_duplicate=False)} - names
    return {name: tensor for name, tensor in model.state_dict().items() if name not in again}


def _by_torchao(model: PreTrainedModel, layers: list[str], quantization: Any) -> Quantized:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import quantize_
    from transformers import TorchAoConfig

    chosen = set(layers)
    quantize_(model, quantization, filter_fn=lambda module, name: name in chosen)
    settings = TorchAoConfig(quantization, modules_to_not_convert=_kept(model, layers)).to_dict()
    stored: Any = _stored(model)
    tensors, metadata = flatten_tensor_state_dict(stored)
    return Quantized(model, tensors, metadata, settings)


def _int8(model: PreTrainedModel, layers: list[str], group_size: int) -> Quantized:
    """A byte a weight, one float32 scale a row; stays so in memory."""
    from torchao.quantization import Int8WeightOnlyConfig

    return _by_torchao(model, layers, Int8WeightOnlyConfig(set_inductor_config=False))


def _int4_tiled(model: PreTrainedModel, layers: list[str], group_size: int) -> Quantized:
    """What torchao's kernels for CUDA multiply with: bfloat16, compute capability 8 and later."""
    from torchao.quantization import Int4WeightOnlyConfig
    from torchao.quantization.quantize_.workflows.int4.int4_packing_format import Int4PackingFormat

    if model.device.type != "cuda" or model.dtype != torch.bfloat16:
        raise UserError("int4_layout=tiled: needs device=cuda and dtype=bfloat16; int4_layout=packed needs neither")
    _check_widths(model, layers, group_size, (32, 64, 128, 256))
    packing = Int4PackingFormat.TILE_PACKED_TO_4D
    quantization = Int4WeightOnlyConfig(group_size, set_inductor_config=False, int4_packing_format=packing)
    return _by_torchao(model, layers, quantization)


@torch.no_grad()
def _int4(model: PreTrainedModel, layers: list[str], group_size: int) -> Quantized:
    """Half a byte a weight, one scale a group."""
    _check_widths(model, layers, group_size, None)
    packed: dict[str, Tensor] = {}
    for name in layers:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        parts = quantise_groups(layer.weight, group_size, model.dtype)
        layer.weight.copy_(dequantise_groups(*parts))
        packed |= {f"{name}.{key}": tensor for key, tensor in packed_tensors(*parts).items()}
    matrices = {f"{name}.weight" for name in layers}
    plain = {name: tensor for name, tensor in _stored(model).items() if name not in matrices}
    return Quantized(model, plain | packed, {}, _packed_settings(_kept(model, layers), group_size))


def _packed_settings(ignored: list[str], group_size: int) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}},
        "ignore": ignored,
    }


def _check_widths(model: PreTrainedModel, layers: list[str], group_size: int, sizes: tuple[int, ...] | None) -> None:
    if group_size % PER_WORD or (sizes is not None and group_size not in sizes):
        wanted = f"a multiple of {PER_WORD}" if sizes is None else f"one of {', '.join(map(str, sizes))}"
        raise UserError(f"group_size: {group_size}, where {wanted} is needed")
    for name in layers:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        width = layer.in_features
        if width % group_size:
            short = name.rpartition(".")[2]
            raise UserError(
                f"{name}: {width} columns are no multiple of group_size {group_size}; write skip=[{short}] to leave "
                "such layers as they are, or another group_size"
            )


MAKERS = {"int8": _int8, "int4": _int4, "int4_tiled": _int4_tiled}


def _write(
    rounded: Quantized, config: PreTrainedConfig, tokenizer: Tokenizer, draft: Path, max_shard_bytes: int
) -> None:
    write_settings(rounded.model, config, tokenizer, draft)
    write_tokenizer(tokenizer, draft)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in rounded.tensors.items()}
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=FILENAMES, max_shard_size=max_shard_bytes)
    for filename, names in split.filename_to_tensors.items():
        # torchao's loader looks into the metadata of every file, which huggingface_hub's writer leaves out of shards
        part = {name: tensors[name] for name in names}
        save_file(part, draft / filename, metadata={"format": "pt", **rounded.metadata})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (draft / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
