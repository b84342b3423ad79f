"""A folder of PEFT's LoRA adapters, of any kind that has one merged matrix, and that matrix.

Hu+ 2021, 2106.09685; with a scale over the root of the rank (rsLoRA, Kalajdzievski 2023, 2312.03732); with magnitudes
(DoRA, Liu+ 2024, 2402.09353); adapted embeddings; matrices trained whole, such as those of a grown vocabulary.
`models/lora` holds the adapters that are trained here.
"""

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tokenkit.config import UserError
from tokenkit.models.load import head_matrix, input_matrix, output_head

PREFIX = "base_model.model."  # what PEFT writes before every module name
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PART = re.compile(r"(.+)\.lora_(embedding_A|embedding_B|A|B|magnitude_vector)(?:\.weight)?")
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # of init_lora_weights: the base is left as it was
NOT_HERE = {  # keys of adapter_config.json: the only value for which the matrices below are all there is
    "lora_bias": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
}


@dataclass(frozen=True)
class Update:
    """What is added to one matrix: scale times B A, and the length that its rows then get."""

    a: Float[Tensor, "R I"]
    b: Float[Tensor, "O R"]
    scale: float
    magnitude: Float[Tensor, "O"] | None
    alpha: float
    """What the scale was made of."""

    def merged(self, weight: Float[Tensor, "O I"]) -> Float[Tensor, "O I"]:
        """The adapted matrix, in the format of the weight."""
        sum_ = weight.float() + self.scale * (self.b @ self.a)
        if self.magnitude is not None:
            sum_ = sum_ * (self.magnitude / lengths(sum_)).unsqueeze(1)
        return sum_.to(weight.dtype)

    def output(
        self, x: Float[Tensor, "*N I"], plain: Float[Tensor, "*N O"], weight: Float[Tensor, "O I"], bias: Tensor | None
    ) -> Float[Tensor, "*N O"]:
        """What the adapted layer answers to `x`, where the layer as it is answers `plain`; nothing is merged."""
        found = plain if bias is None else plain - bias
        found = found + self.scale * nn.functional.linear(nn.functional.linear(x, self.a), self.b)
        if self.magnitude is not None:
            found = found * (self.magnitude / lengths(weight + self.scale * (self.b @ self.a)))
        return found if bias is None else found + bias


def lengths(matrix: Float[Tensor, "O I"]) -> Float[Tensor, "O"]:
    """Of its rows; of a row of zeros a number so small that what is divided by it stays a row of zeros."""
    return matrix.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class Adapter:
    """Updates of matrices by the names of their modules, and tensors that take the place of others, by name."""

    folder: Path
    updates: dict[str, Update]
    whole: dict[str, Tensor]
    settings: dict[str, Any]


def read_adapter(folder: Path) -> Adapter:
    """The adapter of a folder, PEFT's or ours; UserError for what is none, or cannot be merged."""
    settings = adapter_settings(folder)
    parts: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        name = key.removeprefix(PREFIX)
        match = PART.fullmatch(name)
        if match is not None:
            parts.setdefault(match[1], {})[match[2].removeprefix("embedding_")] = tensor.float()
        elif ".lora_" in name or ".token_adapter." in name:
            raise UserError(f"{folder}: holds {name}, which is no part of LoRA, rsLoRA or DoRA that can be merged")
        else:
            whole[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
    if not parts and not whole:
        raise UserError(f"{folder / WEIGHTS}: holds no tensor")
    updates = {name: _update(folder, name, found, settings) for name, found in parts.items()}
    return Adapter(folder, updates, whole, settings)


def _update(folder: Path, name: str, parts: dict[str, Tensor], settings: dict[str, Any]) -> Update:
    if not {"A", "B"} <= parts.keys() or parts["A"].shape[0] != parts["B"].shape[1]:
        raise UserError(f"{folder}: {name}: lora_A and lora_B that fit each other are not both there")
    rank, alpha = parts["A"].shape[0], settings.get("lora_alpha", 8)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
            break
    scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    magnitude = parts.get("magnitude_vector")
    magnitude = None if magnitude is None else magnitude.flatten()
    return Update(parts["A"], parts["B"], float(scale), magnitude, float(alpha))


def adapter_settings(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder; UserError where it is none of LoRA that can be merged."""
    for name in (SETTINGS, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name} inside; write a folder that PEFT's save_pretrained wrote")
    settings = json.loads((folder / SETTINGS).read_text("utf-8"))
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{folder}: peft_type is {settings.get('peft_type')!r}; only LORA adapters can be merged")
    for key, value in NOT_HERE.items():
        if settings.get(key, value) != value:
            raise UserError(f"{folder}: {key} is {settings[key]!r}, which cannot be merged here; merge it with PEFT")
    if settings.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise UserError(
            f"{folder}: init_lora_weights is {settings['init_lora_weights']!r}, which changed the base as well; save "
            "it with PEFT's path_initial_model_for_weight_conversion, and merge that"
        )
    return settings


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, adapter: Adapter) -> None:
    """Puts the adapter into the model's own matrices; UserError, and a model as it was, where it does not fit."""
    found = {name: _module(model, adapter, name) for name in adapter.updates}
    put_whole(model, adapter)
    for name, module in found.items():
        merged = adapter.updates[name].merged(_matrix(module))
        module.weight.copy_(merged.T if _transposed(module) else merged)


def put_whole(model: PreTrainedModel, adapter: Adapter) -> None:
    """Puts the tensors that the adapter has whole in the place of the model's; the updates are left alone."""
    _check_whole(model, adapter)
    _untie(model, adapter)
    _replace(model, adapter)


def adapted_copy(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """A copy of the model that computes the adapter's updates beside its own matrices, as in training."""
    copied = copy.deepcopy(model)
    _untie(copied, adapter)
    _replace(copied, adapter)
    for name, update in adapter.updates.items():
        _module(copied, adapter, name).register_forward_hook(_hook(update))
    return copied


def _hook(update: Update) -> Any:
    def add(module: nn.Module, inputs: tuple[Tensor, ...], plain: Tensor) -> Tensor:
        if isinstance(module, nn.Embedding):
            return plain + update.scale * update.a.T[inputs[0]] @ update.b.T
        assert isinstance(module, (nn.Linear, Conv1D))
        return update.output(inputs[0], plain, _matrix(module), module.bias)

    return add


def _module(model: PreTrainedModel, adapter: Adapter, name: str) -> nn.Linear | nn.Embedding | Conv1D:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise UserError(f"{adapter.folder}: the base has no layer {name}; take the model it was trained on") from None
    if not isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
        raise UserError(f"{adapter.folder}: {name} is a {type(module).__name__}, whose adapters cannot be merged")
    update, rows = adapter.updates[name], adapter.whole.get(f"{name}.weight")
    shape = tuple((_matrix(module) if rows is None else _oriented(module, rows)).shape)
    if (len(update.b), update.a.shape[1]) != shape:
        raise UserError(
            f"{adapter.folder}: {name} adapts a matrix of {len(update.b)} x {update.a.shape[1]}, where the base has "
            f"{shape[0]} x {shape[1]}; take the model it was trained on"
        )
    if update.magnitude is not None and isinstance(module, nn.Embedding):
        raise UserError(f"{adapter.folder}: {name}: DoRA on an embedding cannot be merged here; merge it with PEFT")
    return module


def _transposed(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, Conv1D))


def _oriented(module: nn.Module, weight: Tensor) -> Tensor:
    return weight.T if _transposed(module) else weight


def _matrix(module: nn.Module) -> Float[Tensor, "O I"]:
    """The matrix as output times input; an embedding's input is the id."""
    assert isinstance(module.weight, Tensor)
    return _oriented(module, module.weight)


def _vocabulary_names(model: PreTrainedModel) -> set[str]:
    """The tensors with one row per id: embedding, head, and the head's bias where it has one."""
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    modules = {name: module for name, module in model.named_modules() if id(module) in ends}
    return {f"{name}.{part}" for name, module in modules.items() for part, _ in module.named_parameters()}


def _check_whole(model: PreTrainedModel, adapter: Adapter) -> None:
    state, growing, rows = model.state_dict(), _vocabulary_names(model), set()
    for name, tensor in adapter.whole.items():
        if name not in state:
            raise UserError(f"{adapter.folder}: the base has no tensor {name}; take the model it was trained on")
        if name in growing and tensor.shape[1:] == state[name].shape[1:]:
            rows.add(len(tensor))
        elif tensor.shape != state[name].shape:
            shapes = f"{tuple(tensor.shape)}, where the base has {tuple(state[name].shape)}"
            raise UserError(f"{adapter.folder}: {name} is {shapes}; take the model it was trained on")
    alone = set() if _tied(model) else {len(state[name]) for name in growing - adapter.whole.keys()}
    if rows and len(rows | alone) > 1:
        raise UserError(
            f"{adapter.folder}: embedding and head would have {' and '.join(map(str, sorted(rows | alone)))} rows; "
            "save both with the adapter (PEFT: save_embedding_layers=True)"
        )


def _tied(model: PreTrainedModel) -> bool:
    return head_matrix(model) is input_matrix(model)


@torch.no_grad()
def _untie(model: PreTrainedModel, adapter: Adapter) -> None:
    """Gives input and head a matrix each where the adapter makes them differ, as it does in training."""
    if not _tied(model):
        return
    changed = {f"{name}.weight" for name in adapter.updates} | adapter.whole.keys()
    touched = sorted(name for name in _vocabulary_names(model) & changed if name.endswith(".weight"))
    matrices = [adapter.whole[name] for name in touched if name in adapter.whole]
    alike = len(matrices) == len(touched) == 2 and torch.equal(*matrices)
    if touched and not alike:
        output_head(model).weight = nn.Parameter(input_matrix(model).detach().clone())
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


@torch.no_grad()
def _replace(model: PreTrainedModel, adapter: Adapter) -> None:
    growing, tied = _vocabulary_names(model), _tied(model)
    for name, tensor in adapter.whole.items():
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        old = module.get_parameter(last)
        new = tensor.to(old.dtype).to(old.device)
        if new.shape == old.shape:
            old.copy_(new)
            continue
        assert name in growing
        setattr(module, last, nn.Parameter(new))
        if isinstance(module, nn.Embedding):
            module.num_embeddings = len(new)
        elif isinstance(module, nn.Linear):
            module.out_features = len(new)
        model.config.get_text_config().vocab_size = len(new)
    if tied:
        output_head(model).weight = input_matrix(model)
