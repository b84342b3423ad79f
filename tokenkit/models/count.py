"""What a checkpoint, a configuration or a model holds, tensor by tensor: parameters once, and what is stored with them.

A file may hold more than parameters: causal masks that old files kept as buffers, a second copy of a tied table. Those
are not counted as parameters here; every element is told apart.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tokenkit.config import UserError, parse_yaml
from tokenkit.models.load import quiet
from tokenkit.models.shape import BAD_VALUES, new_config, reason
from tokenkit.models.tensor_files import read_header

Kind = Literal["trainable", "frozen", "tied duplicate", "persistent buffer", "non-persistent buffer"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Headers = dict[str, tuple[tuple[int, ...], tuple[str, int]]]  # name: shape, (dtype, bytes per element)
TABLES_OF_OLD_FILES = ("masked_bias", "inv_freq", "position_ids")  # buffers that files held once


@dataclass(frozen=True)
class Entry:
    """One tensor."""

    name: str
    """Without the prefix of the model's body, which old files lack."""
    shape: tuple[int, ...]
    dtype: str
    itemsize: int
    kind: Kind
    stored: bool
    """Whether it is in the file, or would be."""

    @property
    def elements(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def pattern(self) -> str:
        """The name with the numbers of layers left out."""
        return pattern_of(self.name)


@dataclass(frozen=True)
class Inventory:
    """The tensors of one checkpoint or configuration."""

    name: str
    source: Literal["file", "configuration", "model"]
    entries: tuple[Entry, ...]
    vocabulary: int | None
    positions: int | None

    @property
    def parameters(self) -> int:
        """Parameters, each counted once."""
        return sum(entry.elements for entry in self.entries if entry.kind in ("trainable", "frozen"))

    @property
    def stored(self) -> tuple[Entry, ...]:
        """What is in the file, or would be."""
        return tuple(entry for entry in self.entries if entry.stored)

    @property
    def stored_elements(self) -> int:
        """Numbers in all that is stored."""
        return sum(entry.elements for entry in self.stored)

    @property
    def stored_bytes(self) -> int:
        """Bytes of tensors, without the header of the file."""
        return sum(entry.elements * entry.itemsize for entry in self.stored)


def pattern_of(name: str) -> str:
    """A dotted name with a star for every number."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def unique_parameters(model: nn.Module) -> int:
    """Parameters of a model, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def config_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the model that a configuration makes, shared ones once; no memory is taken."""
    return unique_parameters(_on_meta(config, config.model_type))


def inventory_of_model(model: PreTrainedModel, name: str) -> Inventory:
    """The tensors of a model in memory; a tied table counts under its first name."""
    return _inventory(model, name, "model")


def inventory_of(source: str) -> Inventory:
    """The tensors of a folder or a .safetensors file, of which only headers are read; or of `TYPE:KEY=VALUE,...`.

    The latter is the default configuration of a `model_type` with keys changed: `gpt2:n_layer=6`.
    """
    path = Path(source)
    if path.is_dir() or path.suffix == ".safetensors":
        return _of_files(path)
    model_type, _, rest = source.partition(":")
    if path.is_absolute() or "/" in model_type or model_type in (".", "..", "~"):
        raise UserError(f"{source}: no such folder; write a folder, a .safetensors file, or a type: gpt2:n_layer=6")
    overrides: dict[str, Any] = {}
    for word in filter(None, _split(rest)):
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{source}: {word!r} is no KEY=VALUE; write {model_type}:KEY=VALUE,KEY=VALUE")
        overrides[key] = parse_yaml(value, source)
    config = new_config(model_type, overrides, model_type)
    return _inventory(_on_meta(config, model_type), source, "configuration")


def _split(text: str) -> list[str]:
    """Words between commas that stand in no bracket."""
    words, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            words.append("")
        else:
            words[-1] += character
    return words


def _on_meta(config: PreTrainedConfig, key: str) -> PreTrainedModel:
    """The model of a configuration, without memory."""
    try:
        with torch.device("meta"), quiet():
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except BAD_VALUES as error:
        raise UserError(f"{key}: {config.model_type} cannot be built so: {reason(error)}") from None


def _inventory(model: PreTrainedModel, name: str, source: Literal["configuration", "model"]) -> Inventory:
    stored = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    entries = []
    for key, parameter in model.named_parameters(remove_duplicate=False):
        again = id(parameter) in seen
        seen.add(id(parameter))
        kind = "tied duplicate" if again else "trainable" if parameter.requires_grad else "frozen"
        copied = stored[key] is not parameter  # shared layers are written whole
        entries.append(_entry(model, key, parameter, kind, stored=copied or not again))
    for key, buffer in model.named_buffers():
        kind = "persistent buffer" if key in stored else "non-persistent buffer"
        entries.append(_entry(model, key, buffer, kind, stored=key in stored))
    return Inventory(name, source, tuple(entries), *_tables(model.config.get_text_config().to_dict()))


def _entry(model: PreTrainedModel, name: str, tensor: torch.Tensor, kind: Kind, *, stored: bool) -> Entry:
    dtype = str(tensor.dtype).removeprefix("torch.")
    short = name.removeprefix(f"{model.base_model_prefix}.")
    return Entry(short, tuple(tensor.shape), dtype, tensor.element_size(), kind, stored)


def _tables(config: dict[str, Any]) -> tuple[int | None, int | None]:
    """Rows of the token table and of a position table, as a configuration has them."""
    return config.get("vocab_size"), config.get("max_position_embeddings", config.get("n_positions"))


def _of_files(path: Path) -> Inventory:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    folder = path if path.is_dir() else path.parent
    config = _read_config(folder / "config.json")
    if not files and config is None:
        raise UserError(f"{path}: neither config.json nor *.safetensors inside; write the folder of a model")
    model = None
    if config is not None and config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        model = _on_meta(_config_from(config, folder), str(folder))
    if files:
        headers = _headers(files)
        entries = _plain_entries(headers) if model is None else _entries_of_files(headers, model)
        return Inventory(str(path), "file", entries, *_tables({} if config is None else config))
    if model is None:
        raise UserError(f"{path}: its model_type is not known here, and there are no *.safetensors to look into")
    return _inventory(model, str(path), "configuration")


def _plain_entries(headers: Headers) -> tuple[Entry, ...]:
    """The tensors of files of which no configuration says what they are."""
    return tuple(
        Entry(name, shape, *dtype, "persistent buffer" if _is_old_buffer(name, shape) else "trainable", stored=True)
        for name, (shape, dtype) in headers.items()
    )


def _entries_of_files(headers: Headers, model: PreTrainedModel) -> tuple[Entry, ...]:
    """The tensors of files in the order of the model, and what the model has beside them."""
    made = {entry.name: entry for entry in _inventory(model, "", "configuration").entries}
    short = {name.removeprefix(f"{model.base_model_prefix}."): header for name, header in headers.items()}
    again = {name for group in _same_tensor(model) for name in [name for name in group if name in short][1:]}
    entries = []
    for name in [*(name for name in made if name in short), *(name for name in short if name not in made)]:
        shape, dtype = short[name]
        buffer = made[name].kind == "persistent buffer" if name in made else _is_old_buffer(name, shape)
        kind: Kind = "persistent buffer" if buffer else "tied duplicate" if name in again else "trainable"
        entries.append(Entry(name, shape, *dtype, kind, stored=True))
    unsaved = ("tied duplicate", "non-persistent buffer")
    return (*entries, *(entry for name, entry in made.items() if entry.kind in unsaved and name not in short))


def _config_from(values: dict[str, Any], folder: Path) -> PreTrainedConfig:
    try:
        return CONFIG_MAPPING[values["model_type"]].from_dict(values)
    except BAD_VALUES as error:
        raise UserError(f"{folder / 'config.json'}: no configuration that can be used: {reason(error)}") from None


def _same_tensor(model: PreTrainedModel) -> list[tuple[str, ...]]:
    """The names, without the body's prefix, of every parameter that has more than one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.removeprefix(f"{model.base_model_prefix}."))
    return [tuple(group) for group in names.values() if len(group) > 1]


def _is_old_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of a file is a causal mask, or another constant that old files held."""
    return is_mask(name, shape) or name.rpartition(".")[2] in TABLES_OF_OLD_FILES


def is_mask(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a causal mask (1 x 1 x n x n), or the number that stands where it masks."""
    square = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return square or name.rpartition(".")[2] == "masked_bias"


def _read_config(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds no object; write the folder of a Hugging Face model")
    return config


def _headers(files: list[Path]) -> Headers:
    """Shape, type and bytes per element of every tensor of the files."""
    entries = [entry for path in files for entry in read_header(path).entries]
    return {entry.name: (entry.shape, (entry.torch_name, entry.itemsize)) for entry in entries}
