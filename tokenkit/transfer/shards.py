"""A checkpoint on disk as tensors that are read by rows: no weight is in memory that nobody asked for."""

import json
import os
import struct
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

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HEADER_LIMIT = 100_000_000  # bytes; what the format allows


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file: where its bytes lie."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return self.end - self.begin


@dataclass(frozen=True, eq=False)
class FileRows:
    """The rows of a matrix in a safetensors file, or of its first `rows` ones."""

    entry: Entry

    def __post_init__(self) -> None:
        if self.entry.dtype not in DTYPES or not 1 <= len(self.entry.shape) <= 2:
            raise UserError(
                f"{self.entry.path}: {self.entry.name} is {self.entry.dtype} of shape {list(self.entry.shape)}; "
                f"embeddings are read as {', '.join(DTYPES)} matrices, so take the model before it was quantised"
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
        with open(self.entry.path, "rb", buffering=0) as file:
            for first, last in runs(distinct):
                part = buffer[first:last].reshape(-1).data
                _read(file.fileno(), part, self.entry.begin + int(distinct[first]) * self.row_bytes, self.entry)
        rows = torch.from_numpy(buffer).view(self.dtype)
        return rows if len(ids) == len(distinct) and np.array_equal(ids, distinct) else rows[torch.from_numpy(place)]

    def gather(self, ids: Int64[ndarray, "N"]) -> Float[Tensor, "N D"]:
        """The rows of these ids, in at least float32."""
        rows = self.raw(ids)
        return rows.to(torch.promote_types(rows.dtype, torch.float32))


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A folder of a causal language model: its configuration, and where each tensor lies."""

    folder: Path
    config: PreTrainedConfig
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
    """Names, as the files have them, of the input embedding, the output matrix where it is one of its own, its bias."""

    input: str
    head: str | None
    bias: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """Those that there are."""
        return tuple(name for name in (self.input, self.head, self.bias) if name is not None)


def local_folder(source: str, revision: str | None = None) -> Path:
    """The folder of a model; that of a hub id is fetched, safetensors and JSON only."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise UserError(f"{source}: no such folder; write the folder of a Hugging Face model, or a hub id owner/name")
    try:
        wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        return Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
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
    entries = {entry.name: entry for path in weight_files(folder) for entry in read_header(path)}
    return Checkpoint(folder, config, entries)


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


def read_header(path: Path) -> list[Entry]:
    """The tensors of a safetensors file, in the order of their bytes; UserError where the file is damaged or cut."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(HEADER_LIMIT, size):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        start = 8 + length
        found = [
            Entry(name, path, one["dtype"], tuple(one["shape"]), *(start + offset for offset in one["data_offsets"]))
            for name, one in header.items()
            if name != "__metadata__"
        ]
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a safetensors file ({_first(error)}); fetch it again") from None
    if found and max(entry.end for entry in found) != size:
        raise UserError(f"{path}: {size:,} bytes where its header says {max(e.end for e in found):,}; fetch it again")
    return sorted(found, key=lambda entry: entry.begin)


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
    model = on_meta(checkpoint.config, str(checkpoint.folder))
    input_name = _stored_name(checkpoint, model, input_matrix(model))
    if input_name is None:
        raise UserError(f"{checkpoint.folder}: its files have no input embedding; take a complete checkpoint")
    tied = head_matrix(model) is input_matrix(model)
    head = None if tied else _stored_name(checkpoint, model, head_matrix(model))
    if head is None and not tied:
        raise UserError(f"{checkpoint.folder}: its files have no output matrix; take a complete checkpoint")
    bias = output_head(model).bias
    return Tables(input_name, head, None if bias is None else _stored_name(checkpoint, model, bias))


def _stored_name(checkpoint: Checkpoint, model: PreTrainedModel, parameter: Tensor) -> str | None:
    """The name of a parameter in the files, which may have the body's prefix or not."""
    prefix = f"{model.base_model_prefix}."
    for name, one in model.named_parameters(remove_duplicate=False):
        if one is parameter:
            for choice in (name, name.removeprefix(prefix), prefix + name):
                if choice in checkpoint.entries:
                    return choice
    return None


def _read(descriptor: int, into: memoryview, offset: int, entry: Entry) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done:]], offset + done)
        if count == 0:
            raise UserError(f"{entry.path}: ends inside {entry.name}; fetch it again")
        done += count


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
