"""A model as an ONNX file with a key-value cache, for onnxruntime and what is built on it.

The names of inputs, outputs and sizes are those that optimum and transformers.js read. Only operators of the ONNX
standard are used. Every file is loaded by onnxruntime and compared before it has a name.
"""

import copy
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir
import onnxruntime
import torch
from torch import Tensor
from torch.export import ExportedProgram
from transformers import PreTrainedModel

from tokenkit.export.graph_verify import Call, verify_graph
from tokenkit.export.huggingface import TEXTS, drafted, refuse_existing, write_settings, write_tokenizer
from tokenkit.export.quieted import clears_up, quieted
from tokenkit.export.traced import Signature, graph_model, signature_of, trace, unsupported
from tokenkit.export.verify import ExportError, compare_ids
from tokenkit.tokenizers.base import Tokenizer

OPSET = 18
LARGEST = 1_900_000_000  # bytes of weights that lie in the file itself; protobuf holds 2 GiB
MODEL, DATA = "model.onnx", "_data"  # larger ones lie in model.onnx_data


def export_onnx(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    length: int | None = None,
) -> dict[str, Any]:
    """Writes a folder with model, settings and tokenizer, or where `path` ends in .onnx only that file; its figures.

    With a `length` everything has a fixed shape: one row of so many tokens, padded on the left, and no cache.
    """
    refuse_existing(path)
    alone = path.suffix == ".onnx"
    traced = graph_model(model, tokenizer.vocab_size, dtype)
    signature = signature_of(traced, cached=length is None, length=length)
    with clears_up(), _drafted_file(path) if alone else drafted(path) as draft:
        file = draft / (path.name if alone else MODEL)
        _write(converted(traced, trace(traced, signature), signature), file)
        if not alone:
            write_settings(traced, copy.deepcopy(traced.config), tokenizer, draft)
            write_tokenizer(tokenizer, draft)
            compare_ids(draft, tokenizer, TEXTS)
        rows = [[tokenizer.start_id(), *tokenizer.encode(text).ids.tolist()] for text in TEXTS]
        figures = verify_graph(session_call(file, signature), signature, model, tokenizer, rows, path.name)
        sizes = {part.name: part.stat().st_size for part in sorted(draft.glob("*.onnx*"))}
    return {"opset": OPSET, "dtype": str(dtype).removeprefix("torch."), "bytes": sizes, **figures}


@contextmanager
def _drafted_file(path: Path) -> Iterator[Path]:
    """A folder to write into, whose files take their place beside `path` when the block has ended well."""
    draft = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    draft.mkdir(parents=True)
    moved: list[Path] = []
    try:
        yield draft
        for part in sorted(draft.iterdir(), key=lambda part: part.name == path.name):  # the model itself comes last
            refuse_existing(path.with_name(part.name))
            moved.append(part.rename(path.with_name(part.name)))
        moved.clear()
    finally:
        for part in moved:
            part.unlink()
        shutil.rmtree(draft, ignore_errors=True)


def converted(model: PreTrainedModel, program: ExportedProgram, signature: Signature) -> onnx_ir.Model:
    """The graph in ONNX operators, its dimensions named, without notes of where in which file each node comes from."""
    with quieted():
        try:
            made = torch.onnx.export(
                program,
                input_names=signature.inputs,
                output_names=signature.outputs,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise unsupported(model, error.__cause__ or error) from error
        assert made is not None
        if not signature.length:
            made.rename_axes(_axes(made.model.graph, signature))
    values = [*made.model.graph.initializers.values(), *made.model.graph.inputs]
    for node in made.model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()
    return made.model


def _axes(graph: onnx_ir.Graph, signature: Signature) -> dict[str | onnx_ir.SymbolicDim, str]:
    """The tracer's symbols for the sizes that are open, and what they are called in the file.

    transformers.js makes an empty cache of these names: what is called batch_size is as large as the batch, the rest 0.
    """
    places = [("input_ids", 0, "batch_size"), ("input_ids", 1, "sequence_length")]
    if signature.layers:
        places.append(("past_key_values.0.key", 2, "past_sequence_length"))
    found: dict[str | onnx_ir.SymbolicDim, str] = {}
    shapes = {value.name: value.shape for value in graph.inputs}
    for name, axis, meaning in places:
        shape = shapes[name]
        assert shape is not None
        symbol = shape[axis]
        assert isinstance(symbol, onnx_ir.SymbolicDim)
        found[symbol] = meaning
    return found


def _write(graph: onnx_ir.Model, file: Path) -> None:
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None)
    data = f"{file.name}{DATA}" if size > LARGEST else None
    onnx_ir.save(graph, file, external_data=data)


def session_call(file: Path, signature: Signature) -> Call:
    """The file as a function of named tensors, computed by onnxruntime; ExportError where it does not load."""
    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common base
        raise ExportError(f"{file.name}: onnxruntime does not load it: {str(error).partition(chr(10))[0]}") from error
    names = [[value.name for value in part] for part in (session.get_inputs(), session.get_outputs())]
    if names != [signature.inputs, signature.outputs]:
        raise ExportError(f"{file.name}: inputs and outputs are called {names}")

    def call(given: dict[str, Tensor]) -> list[Tensor]:
        found = session.run(None, {name: value.numpy() for name, value in given.items()})
        return [torch.from_numpy(value) for value in found]

    return call
