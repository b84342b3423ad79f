"""A checkpoint on disk as tensors that are read by rows: no weight is in memory that nobody asked for."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tokenkit.config import UserError
from tokenkit.models.load import head_matrix, input_matrix, output_head, quiet
from tokenkit.models.tensor_files import COPY_BYTES, DTYPES, Entry, Header, fill, read_bytes, read_header

FLOATS = ("F64", "F32", "F16", "BF16")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.xz", "LICENSE*", "NOTICE*", "USE_POLICY*"]


@dataclass(frozen=True, eq=False)
class FileRows:
    """The rows of a matrix in a safetensors file, or of its first `rows` ones."""

    entry: Entry

    def __post_init__(self) -> None:
        if self.entry.dtype not in FLOATS or not 1 <= len(self.entry.shape) <= 2:
            raise UserError(
                f"{self.entry.path}: {self.entry.name} is {self.entry.dtype} of shape {list(self.entry.shape)}; "
                f"embeddings are read as {', '.join(FLOATS)} matrices, so take the model before it was quantised"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width; a vector has rows of one number."""
        return self.entry.shape[0], self.entry.shape[1] if len(self.entry.shape) == 2 else 1

    @property
    def dtype(self) -> torch.dtype:
        """As it is stored."""
        return DTYPES[self.entry.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.shape[1] * self.dtype.itemsize

    def raw(self, ids: Int64[ndarray, "N"]) -> Float[Tensor, "N D"]:
        """The rows of these ids, as they are stored."""
        distinct, place = np.unique(ids, return_inverse=True)
        buffer = np.empty((len(distinct), self.row_bytes), np.uint8)
        try:
            with open(self.entry.path, "rb", buffering=0) as file:
                for first, last in runs(distinct):
                    part = buffer[first:last].reshape(-1).data
                    fill(file.fileno(), part, self.entry.begin + int(distinct[first]) * self.row_bytes, self.entry)
        except OSError as error:
            raise UserError(f"{self.entry.path}: cannot be read ({error.strerror}); fetch it again") from None
        rows = torch.from_numpy(buffer.reshape(-1)).view(self.dtype).reshape(len(distinct), self.shape[1])
        return rows if len(ids) == len(distinct) and np.array_equal(ids, distinct) else rows[torch.from_numpy(place)]

    def gather(self, ids: Int64[ndarray, "N"]) -> Float[Tensor, "N D"]:
        """The rows of these ids, in at least float32."""
        rows = self.raw(ids)
        return rows.to(torch.promote_types(rows.dtype, torch.float32))


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A folder of a causal language model: its configuration, its files, and where each tensor lies."""

    folder: Path
    config: PreTrainedConfig
    files: Mapping[Path, Header]
    entries: Mapping[str, Entry]

    @cached_property
    def tables(self) -> "Tables":
        """Which tensors have a row per id."""
        return _tables(self)

    def rows(self, name: str) -> FileRows:
        """A matrix of the checkpoint."""
        return FileRows(self.entries[name])


@dataclass(frozen=True)
class Tables:
    """Names, as the files have them, of the tensors with a row per id."""

    input: str
    head: str | None
    """Of an output matrix of its own."""
    bias: str | None
    twins: tuple[str, ...]
    """Further copies of the input matrix: a head that is tied to it, and was stored all the same."""
    input_name: str
    head_name: str
    """What input and output matrix are called where each is one of its own."""

    @property
    def tied(self) -> bool:
        """Whether one matrix serves as both."""
        return self.head is None


def local_folder(source: str, revision: str | None = None) -> Path:
    """The folder of a model; that of a hub id is fetched, safetensors and JSON only."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise UserError(f"{source}: no such folder; write the folder of a Hugging Face model, or a hub id owner/name")
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=WANTED))
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: neither a folder nor a model that the hub gives: {_first(error)}") from None


def open_checkpoint(folder: Path) -> Checkpoint:
    """What a folder holds, of which headers alone are read; UserError for what is no checkpoint in safetensors."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json inside; write the folder of a Hugging Face model")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: no configuration that can be used: {_first(error)}") from None
    files = {path: read_header(path) for path in weight_files(folder)}
    return Checkpoint(folder, config, files, {e.name: e for header in files.values() for e in header.entries})


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, those of its index where it has one; UserError where one is missing."""
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(read_index(index)["weight_map"].values()))
    else:
        names = [SINGLE] if (folder / SINGLE).is_file() else sorted(path.name for path in folder.glob("*.safetensors"))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        lacking = missing[0] if missing else "*.safetensors"
        raise UserError(f"{folder}: no {lacking} inside; take a complete checkpoint, pickled weights are never read")
    return [folder / name for name in names]


def read_index(path: Path) -> dict[str, Any]:
    """The index of a sharded checkpoint."""
    try:
        index = json.loads(path.read_text("utf-8"))
        if isinstance(index["weight_map"], dict):
            return index
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path}: no index of a sharded checkpoint; take a complete checkpoint")


def runs(ids: Int64[ndarray, "N"]) -> Iterator[tuple[int, int]]:
    """Half-open ranges of places at which ascending ids follow each other without a gap."""
    if len(ids) == 0:
        return
    breaks = np.flatnonzero(np.diff(ids) != 1) + 1
    yield from zip([0, *breaks.tolist()], [*breaks.tolist(), len(ids)], strict=True)


def on_meta(config: PreTrainedConfig, where: str) -> PreTrainedModel:
    """The model of a configuration, without memory."""
    try:
        with torch.device("meta"), quiet():
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{where}: no causal language model that can be built: {_first(error)}") from None


def _tables(checkpoint: Checkpoint) -> Tables:
    model, folder = on_meta(checkpoint.config, str(checkpoint.folder)), checkpoint.folder
    inputs = _stored_names(checkpoint, model, input_matrix(model))
    if not inputs:
        raise UserError(f"{folder}: its files have no input embedding; take a complete checkpoint")
    first, *twins = inputs
    heads = [] if head_matrix(model) is input_matrix(model) else _stored_names(checkpoint, model, head_matrix(model))
    if not heads and head_matrix(model) is not input_matrix(model):
        raise UserError(f"{folder}: its files have no output matrix; take a complete checkpoint")
    if twins and not same_bytes(checkpoint.entries[first], checkpoint.entries[twins[0]]):
        heads, twins = twins, []  # the configuration ties them; readers go by what the files hold
    bias = output_head(model).bias
    biases = [] if bias is None else _stored_names(checkpoint, model, bias)
    modules = (model.get_input_embeddings(), output_head(model))
    own = [next(f"{name}.weight" for name, one in model.named_modules() if one is module) for module in modules]
    for name, parameter in ((first, input_matrix(model)), *((name, head_matrix(model)) for name in heads[:1])):
        found = checkpoint.entries[name].shape
        if found != tuple(parameter.shape):
            shape = tuple(parameter.shape)
            raise UserError(f"{folder}: {name} is {found}, and config.json says {shape}; take a complete checkpoint")
    head_and_bias = (heads[0] if heads else None, biases[0] if biases else None)
    return Tables(first, *head_and_bias, tuple(twins), *own)


def _stored_names(checkpoint: Checkpoint, model: PreTrainedModel, parameter: Tensor) -> list[str]:
    """The names of a parameter in the files, which may have the body's prefix or not, or stand in an older order."""
    prefix = f"{model.base_model_prefix}."
    names = [name for name, one in model.named_parameters(remove_duplicate=False) if one is parameter]
    found = [one for name in names for one in (name, name.removeprefix(prefix), prefix + name)]
    found = [name for name in dict.fromkeys(found) if name in checkpoint.entries]
    if not found:
        ends = tuple("." + ".".join(name.split(".")[-2:]) for name in names)
        found = [name for name, e in checkpoint.entries.items() if f".{name}".endswith(ends)]
        found = [name for name in found if checkpoint.entries[name].shape == tuple(parameter.shape)]
        found = found if len(found) == 1 else []
    return found


def same_bytes(a: Entry, b: Entry) -> bool:
    """Whether two tensors are of one type and shape, and equal bit for bit."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    parts = [bytearray(min(COPY_BYTES, max(1, a.num_bytes))) for _ in range(2)]
    for begin in range(0, a.num_bytes, COPY_BYTES):
        count = min(COPY_BYTES, a.num_bytes - begin)
        for entry, part in zip((a, b), parts, strict=True):
            read_bytes(entry, memoryview(part)[:count], begin)
        if memoryview(parts[0])[:count] != memoryview(parts[1])[:count]:
            return False
    return True


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
