"""`tokenkit export`: a model folder in, the same model in another container out, verified by whoever will load it."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from transformers import PreTrainedModel

from tokenkit.config import Config, UserError
from tokenkit.data.source import SourceConfig, read_documents
from tokenkit.export.expanded import export_model
from tokenkit.export.forced import forced_ternary
from tokenkit.export.hub import HubConfig, check_push, push
from tokenkit.export.huggingface import SHARD_BYTES, TEXTS, refuse_existing
from tokenkit.export.quieted import clears_up
from tokenkit.export.ternary import export_latent, export_ternary
from tokenkit.export.unpacked import export_unpacked
from tokenkit.export.verify import ExportError
from tokenkit.models.bitlinear import ternary_layers
from tokenkit.models.expand import expansion_of
from tokenkit.report.export_card import render_export_card
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.train.folder import write_text
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.model import DTYPES, ExportType, ModelChoice, load_pair


class ExportRun(Config):
    """A run file of `tokenkit export`."""

    output: Path
    """A new folder; for `gguf` a new file that ends in .gguf, for `torch_export` in .pt2. For `onnx` a folder with the
    tokenizer beside the model, or only the model where it ends in .onnx."""
    model: ModelChoice
    format: Literal["huggingface", "ternary", "latent", "unpacked", "gguf", "onnx", "torch_export", "int8", "int4"]
    """huggingface: as it is. ternary: four trits a byte, for stock transformers. latent: the matrices of a ternary
    model as they are trained, to go on with. unpacked: a packed folder as an ordinary one. gguf: for llama.cpp. onnx:
    for onnxruntime, with a key-value cache. torch_export: a program of torch.export. int8, int4: matrices of 8 or 4
    bits, for stock transformers."""
    dtype: ExportType | None = None
    """Number format of what is not ternary or quantised; by default bfloat16 for `ternary` and `unpacked`, else
    float32. Not for `gguf`."""
    linear_class: Literal["bitlinear", "autobitlinear"] = "bitlinear"
    """`ternary`: which layer of transformers unpacks: at every call, or once on loading, which saves no memory."""
    type: Literal["f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0"] | None = None
    """`gguf`: type of the matrices; by default tq2_0 for a ternary model, else f16."""
    embedding_type: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    """`gguf`: type of embeddings and head; by default `type`, and q8_0 where that is ternary."""
    dynamic_axes: bool = True
    """`onnx`, `torch_export`: any batch, length and cache. false: one row of `sequence_length` tokens, no cache."""
    sequence_length: int | None = Field(None, ge=1)
    """With `dynamic_axes: false`: tokens of the row, padding on the left included."""
    group_size: int = Field(32, ge=1)
    """`int4`: weights of a row that share a scale."""
    int4_layout: Literal["packed", "tiled"] = "packed"
    """`int4`: packed, of compressed-tensors, for any device and for vLLM; tiled, of torchao, for its CUDA kernels."""
    skip: list[str] = []
    """`int8`, `int4`: layers that stay as they are: the last part of a name (`down_proj`), or a glob."""
    max_rise: float | None = Field(None, ge=0)
    """`int8`, `int4`: share by which bits per byte on `corpus` may rise; by default 0.01 and 0.1. More is refused."""
    max_shard_bytes: int = Field(SHARD_BYTES, ge=1)
    """Weights are cut into files of at most this size, or one tensor."""
    force_ptq: bool = False
    """Round a model to ternary that was not trained so. It breaks: the damage is measured and printed."""
    corpus: SourceConfig | None = None
    """Text for what is measured (`force_ptq`, `int8`, `int4`); by default a few lines."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    push_to_hub: bool = False
    """Also upload the folder, with a card of the figures."""
    hub: HubConfig | None = None

    @model_validator(mode="after")
    def _whole(self) -> "ExportRun":
        check_push(self.push_to_hub, self.hub)
        if self.push_to_hub and self.output.suffix in (".gguf", ".onnx", ".pt2"):
            raise UserError(f"push_to_hub: {self.output} is one file; only a folder is uploaded")
        return self


def export(run: ExportRun) -> dict[str, Any]:
    """Writes and verifies, and uploads if told to; what was written, and the figures of the comparison."""
    refuse_existing(run.output)
    try:
        with clears_up():
            figures = _exported(run)
    except ExportError as error:
        raise UserError(f"export: nothing was written: {error}") from None
    if run.push_to_hub and run.hub is not None:
        local = Path(run.model.source).exists()
        base = Path(run.model.source).resolve().name if local else run.model.source
        write_text(run.output / "README.md", render_export_card(run.output.name, base, not local, figures))
        figures["hub"] = push(run.output, run.hub)
    return figures


def _exported(run: ExportRun) -> dict[str, Any]:
    figures: dict[str, Any] = {"output": str(run.output), "format": run.format}
    if run.format == "unpacked":
        dtype = DTYPES[run.dtype or "bfloat16"]
        source = Path(run.model.source)
        return figures | export_unpacked(source, run.output, dtype=dtype, max_shard_bytes=run.max_shard_bytes)
    if run.format in ("ternary", "latent"):
        _need("accelerate", "transformers loads ternary folders with it")
    if run.format == "gguf":
        _need("gguf", "it writes the file")
    if run.format in ("int8", "int4"):
        packed = run.format == "int4" and run.int4_layout == "packed"
        _need("compressed-tensors" if packed else "torchao", "transformers loads such folders with it")
    if run.format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            _need(package, "a graph is written with onnx and onnxscript and checked with onnxruntime")
    traced = run.format in ("onnx", "torch_export")  # a graph keeps the device it was traced on
    model, tokenizer = load_pair(run.model, "cpu" if traced else pick_device(run.device))
    if expansion_of(model) is not None and run.format != "huggingface":
        raise UserError(f"{run.model.source}: its inputs are expanded, which only format=huggingface can say")
    if run.force_ptq and not ternary_layers(model):
        documents = TEXTS if run.corpus is None else read_documents(run.corpus)
        model, damage = forced_ternary(model, tokenizer, documents)
        figures["damage"] = damage
    return figures | FORMATS[run.format](run, model, tokenizer)


def _need(package: str, why: str) -> None:
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        raise UserError(f"export: needs {package} ({why}); pip install {package}")


def _huggingface(run: ExportRun, model: PreTrainedModel, tokenizer: Tokenizer) -> dict[str, Any]:
    if ternary_layers(model):
        raise UserError("export: the model is ternary; write format=ternary, latent or gguf")
    dtype = DTYPES[run.dtype or "float32"]
    export_model(model, tokenizer, run.output, dtype=dtype, max_shard_bytes=run.max_shard_bytes)
    return {"dtype": run.dtype or "float32"}


def _ternary(run: ExportRun, model: PreTrainedModel, tokenizer: Tokenizer) -> dict[str, Any]:
    dtype = None if run.dtype is None else DTYPES[run.dtype]
    options = {"linear_class": run.linear_class, "dtype": dtype, "max_shard_bytes": run.max_shard_bytes}
    return export_ternary(model, tokenizer, run.output, **options)


def _latent(run: ExportRun, model: PreTrainedModel, tokenizer: Tokenizer) -> dict[str, Any]:
    dtype = DTYPES[run.dtype or "float32"]
    return export_latent(model, tokenizer, run.output, dtype=dtype, max_shard_bytes=run.max_shard_bytes)


def _gguf(run: ExportRun, model: PreTrainedModel, tokenizer: Tokenizer) -> dict[str, Any]:
    from tokenkit.export.gguf_file import export_gguf  # needs a package that not everybody has

    kind = run.type or ("tq2_0" if ternary_layers(model) else "f16")
    return {"type": kind, **export_gguf(model, tokenizer, run.output, type=kind, embeddings=run.embedding_type)}


def _onnx(run: ExportRun, model: PreTrainedModel, tokenizer: Tokenizer) -> dict[str, Any]:
    from tokenkit.export.onnx_file import export_onnx  # needs packages that not everybody has

    return export_onnx(model, tokenizer, run.output, dtype=DTYPES[run.dtype or "float32"], length=_length(run))


def _torch_export(run: ExportRun, model: PreTrainedModel, tokenizer: Tokenizer) -> dict[str, Any]:
    from tokenkit.export.torch_export import export_torch  # slow to import

    return export_torch(model, tokenizer, run.output, dtype=DTYPES[run.dtype or "float32"], length=_length(run))


def _length(run: ExportRun) -> int | None:
    if run.dynamic_axes and run.sequence_length is not None:
        raise UserError("sequence_length: only with dynamic_axes=false, or leave it out")
    if not run.dynamic_axes and run.sequence_length is None:
        raise UserError("dynamic_axes: false fixes the shape, so write sequence_length=128 or another length with it")
    return run.sequence_length


def _quantized(run: ExportRun, model: PreTrainedModel, tokenizer: Tokenizer) -> dict[str, Any]:
    from tokenkit.export.quantized import export_quantized  # needs packages that not everybody has

    tiled = run.format == "int4" and run.int4_layout == "tiled"
    options: dict[str, Any] = {} if run.corpus is None else {"documents": read_documents(run.corpus)}
    return export_quantized(
        model,
        tokenizer,
        run.output,
        scheme="int4_tiled" if tiled else run.format,  # pyrefly: ignore [bad-argument-type] (int8 or int4 here)
        group_size=run.group_size,
        skip=run.skip,
        dtype=DTYPES[run.dtype or ("bfloat16" if tiled else "float32")],
        max_shard_bytes=run.max_shard_bytes,
        max_rise=run.max_rise,
        **options,
    )


FORMATS: dict[str, Callable[[ExportRun, PreTrainedModel, Tokenizer], dict[str, Any]]] = {
    "huggingface": _huggingface,
    "int8": _quantized,
    "int4": _quantized,
    "ternary": _ternary,
    "latent": _latent,
    "gguf": _gguf,
    "onnx": _onnx,
    "torch_export": _torch_export,
}
