"""A model and its tokenizer as one GGUF file, for llama.cpp: read again, dequantised and compared before it has a name.

Ternary matrices become blocks of 256 trits with one float16 scale each (tq1_0: 1.69 bits a weight, tq2_0: 2.06),
made of the trits themselves: nothing is rounded but the scale.
"""

import math
import uuid
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from numpy import ndarray
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.export.gguf_names import Plan, Ternary, gguf_plan
from tokenkit.export.gguf_tokenizer import add_vocabulary, gguf_vocabulary, verify_vocabulary
from tokenkit.export.verify import ExportError
from tokenkit.models.bitlinear import ternary_layers
from tokenkit.models.load import input_matrix
from tokenkit.tokenizers.base import Tokenizer

GGUFType = Literal["f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0"]
EmbeddingType = Literal["f32", "f16", "bf16", "q8_0"]
Kind = gguf.GGMLQuantizationType
KINDS = {name: Kind[name.upper()] for name in ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0")}
FILE_TYPES = {name: gguf.LlamaFileType[f"{'ALL' if name == 'f32' else 'MOSTLY'}_{name.upper()}"] for name in KINDS}
TERNARY = (Kind.TQ1_0, Kind.TQ2_0)
BLOCKS = {Kind.Q8_0: 32, Kind.TQ1_0: 256, Kind.TQ2_0: 256}  # weights of a row that share a scale
POSITIONS = "position_embd.weight"
EMBEDDINGS = ("token_embd.weight", "output.weight")


def export_gguf(
    model: PreTrainedModel, tokenizer: Tokenizer, path: Path, *, type: GGUFType, embeddings: EmbeddingType | None = None
) -> dict[str, Any]:
    """Writes the file; its figures. A ternary model is its trits times their scale in whatever `type`.

    `embeddings` is the type of input embeddings and output head; by default `type`, and q8_0 where that is ternary.
    """
    if path.exists():
        raise UserError(f"{path}: exists already; write the name of a new file, or move this one away")
    if path.suffix != ".gguf":
        raise UserError(f"{path}: write a file name that ends in .gguf")
    kind = KINDS[type]
    if kind in TERNARY and not ternary_layers(model):
        raise UserError(
            f"export: type {type} is for a model whose layers were trained ternary; write type=q8_0, or force_ptq=true"
        )
    vocabulary = gguf_vocabulary(tokenizer, len(input_matrix(model)))
    plan = gguf_plan(model)
    kinds = _kinds(plan, kind, KINDS[embeddings or ("q8_0" if kind in TERNARY else type)])
    draft = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        writer = gguf.GGUFWriter(draft, gguf.MODEL_ARCH_NAMES[plan.arch])
        writer.add_name(path.stem)
        writer.add_file_type(FILE_TYPES[type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for add, value in plan.numbers:
            add(writer, value)
        add_vocabulary(writer, vocabulary, tokenizer)
        for name, value in plan.tensors.items():
            writer.add_tensor(name, _encoded(value, kinds[name]), raw_dtype=kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        figures = {"texts": verify_vocabulary(draft, vocabulary, tokenizer), **_verify_tensors(draft, plan, kinds)}
        draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)
    wide = [name for name, found in kinds.items() if found == Kind.F16 and kind == Kind.Q8_0]
    notes = [*vocabulary.notes, *([f"f16, as their rows do not divide by 32: {len(wide)} matrices"] if wide else [])]
    names = {"architecture": gguf.MODEL_ARCH_NAMES[plan.arch], "tokenizer": vocabulary.model, "pre": vocabulary.pre}
    return {**names, **figures, "bytes": path.stat().st_size, "notes": notes}


def _kinds(plan: Plan, kind: Kind, embeddings: Kind) -> dict[str, Kind]:
    """The type of every tensor; UserError for a row that cannot be cut into blocks."""
    kinds: dict[str, Kind] = {}
    for name, value in plan.tensors.items():
        shape = value.trits.shape if isinstance(value, Ternary) else value.shape
        if len(shape) < 2:
            kinds[name] = Kind.F32
        elif name in EMBEDDINGS:
            kinds[name] = embeddings
        else:
            kinds[name] = Kind.F16 if kind in TERNARY and not isinstance(value, Ternary) else kind
        block = BLOCKS.get(kinds[name], 1)
        if shape[-1] % block and kinds[name] in TERNARY:
            raise UserError(
                f"{name}: rows of {shape[-1]}, and {kinds[name].name.lower()} needs a multiple of {block}; take widths "
                f"divisible by {block}, or type=q8_0 or f16"
            )
        if shape[-1] % block or name == POSITIONS:
            kinds[name] = Kind.F32 if name == POSITIONS else Kind.F16  # as llama.cpp's own quantiser does
    return kinds


def _encoded(value: torch.Tensor | Ternary, kind: Kind) -> ndarray:
    """The tensor's numbers, or bytes of its blocks."""
    if isinstance(value, Ternary) and kind in TERNARY:
        blocks = gguf.quants.quantize(value.trits.cpu().numpy().astype(np.float32), kind)
        scale = np.array([value.gamma], np.float16).view(np.uint8)
        size = gguf.GGML_QUANT_SIZES[kind][1]
        by_block = blocks.reshape(len(blocks), -1, size)
        by_block[..., -2:] = scale  # of a block of zeros too
        return by_block.reshape(len(blocks), -1)
    numbers = _numbers(value)
    return numbers.astype(np.float16) if kind == Kind.F16 else gguf.quants.quantize(numbers, kind)


def _numbers(value: torch.Tensor | Ternary) -> ndarray:
    """What the tensor means, in float32."""
    if isinstance(value, Ternary):
        return (value.trits.float() * value.gamma).cpu().numpy()
    return value.detach().float().cpu().numpy()


def _verify_tensors(path: Path, plan: Plan, kinds: dict[str, Kind]) -> dict[str, Any]:
    """Every tensor read again is what was meant, to the rounding of its type."""
    reader = gguf.GGUFReader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    if stored.keys() != plan.tensors.keys():
        raise ExportError(f"{path.name}: holds other tensors than were written")
    ternary_bytes = 0
    for name, value in plan.tensors.items():
        tensor, wanted = stored[name], _numbers(value)
        if isinstance(value, Ternary):
            ternary_bytes += int(tensor.n_bytes)
            if kinds[name] in TERNARY:
                wanted = value.trits.cpu().numpy() * np.float32(np.float16(value.gamma))
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(wanted.shape)
        if tensor.tensor_type != kinds[name] or not _equal(wanted, found, kinds[name]):
            raise ExportError(f"{path.name}: the tensor {name} is not the same after reading it again")
    return {"tensors": len(stored), "ternary_bytes": ternary_bytes}


def _equal(wanted: ndarray, found: ndarray, kind: Kind) -> bool:
    """Whether two tensors are equal but for rounding to a type: none, relative, or half a step of a block's scale."""
    if kind in (Kind.F32, *TERNARY):
        return np.array_equal(wanted, found)
    if kind in (Kind.F16, Kind.BF16):
        return np.allclose(wanted, found, rtol=2.0**-8 if kind == Kind.BF16 else 2.0**-11, atol=2.0**-24)
    blocks = (*wanted.shape[:-1], wanted.shape[-1] // BLOCKS[kind], BLOCKS[kind])
    largest = np.abs(wanted.reshape(blocks)).max(-1, keepdims=True)
    difference = np.abs(wanted - found).reshape(blocks)
    return bool((difference <= largest / 127 * 0.51 + largest * 2.0**-10 + math.ulp(0.0)).all())
