"""`tokenkit export`: a model folder in, the same model in another container out, verified by whoever will load it."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from transformers import PreTrainedModel

from tokenkit.config import Config, UserError
from tokenkit.data.source import SourceConfig, read_documents
from tokenkit.export.expanded import export_model
from tokenkit.export.forced import forced_ternary
from tokenkit.export.huggingface import TEXTS
from tokenkit.export.ternary import SHARD_BYTES, export_latent, export_ternary
from tokenkit.export.unpacked import export_unpacked
from tokenkit.models.bitlinear import ternary_layers
from tokenkit.models.expand import expansion_of
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.model import DTYPES, ExportType, ModelChoice, load_pair


class ExportRun(Config):
    """A run file of `tokenkit export`."""

    output: Path
    """A new folder; for `gguf` a new file that ends in .gguf, for `torch_export` in .pt2. For `onnx` a folder with the
    tokenizer beside the model, or only the model where it ends in .onnx."""
    model: ModelChoice
    format: Literal["huggingface", "ternary", "latent", "unpacked", "gguf", "onnx", "torch_export"]
    """huggingface: as it is. ternary: four trits a byte, for stock transformers. latent: the matrices of a ternary
    model as they are trained, to go on with. unpacked: a packed folder as an ordinary one. gguf: for llama.cpp. onnx: for onnxruntime, with a
    key-value cache. torch_export: a program of torch.export."""
    dtype: ExportType | None = None
    """Number format of what is not ternary; by default bfloat16 for `ternary` and `unpacked`, else float32. Not for
    `gguf`."""
    linear_class: Literal["bitlinear", "autobitlinear"] = "bitlinear"
    """`ternary`: which layer of transformers unpacks: at every call, or once on loading, which saves no memory."""
    type: Literal["f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0"] | None = None
    """`gguf`: type of the matrices; by default tq2_0 for a ternary model, else f16."""
    embedding_type: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    """`gguf`: type of embeddings and head; by default `type`, and q8_0 where that is ternary."""
    dynamic_axes: bool = True
    """`onnx`, `torch_export`: any batch, length and cache. false: one row of `sequence_length` tokens, without a cache."""
    sequence_length: int | None = Field(None, ge=1)
    """With `dynamic_axes: false`: tokens of the row, padding on the left included."""
    max_shard_bytes: int = Field(SHARD_BYTES, ge=1)
    """Weights are cut into files of at most this size, or one tensor."""
    force_ptq: bool = False
    """Round a model to ternary that was not trained so. It breaks: the damage is measured and printed."""
    corpus: SourceConfig | None = None
    """Text for that measurement; by default a few lines."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def export(run: ExportRun) -> dict[str, Any]:
    """Writes and verifies; what was written, and the figures of the comparison."""
    figures: dict[str, Any] = {"output": str(run.output), "format": run.format}
    if run.format == "unpacked":
        dtype = DTYPES[run.dtype or "bfloat16"]
        source = Path(run.model.source)
        return figures | export_unpacked(source, run.output, dtype=dtype, max_shard_bytes=run.max_shard_bytes)
    if run.format in ("ternary", "latent"):
        _need("accelerate", "transformers loads ternary folders with it")
    if run.format == "gguf":
        _need("gguf", "it writes the file")
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
    if importlib.util.find_spec(package) is None:
        raise UserError(f"export: needs {package} ({why}); pip install {package}")


def _huggingface(run: ExportRun, model: PreTrainedModel, tokenizer: Tokenizer) -> dict[str, Any]:
    if ternary_layers(model):
        raise UserError("export: the model is ternary; write format=ternary, latent or gguf")
    export_model(model, tokenizer, run.output, dtype=DTYPES[run.dtype or "float32"])
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


FORMATS: dict[str, Callable[[ExportRun, PreTrainedModel, Tokenizer], dict[str, Any]]] = {
    "huggingface": _huggingface,
    "ternary": _ternary,
    "latent": _latent,
    "gguf": _gguf,
    "onnx": _onnx,
    "torch_export": _torch_export,
}
