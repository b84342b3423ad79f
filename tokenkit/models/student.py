"""A student made of its teacher: another configuration, fewer layers, pruned widths, copied and fresh weights.

Order: built → begun with the teacher's weights → some modules fresh again → some copied → blocks shared → frozen.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from jaxtyping import Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tokenkit.config import Config, UserError
from tokenkit.models.blocks import block_list
from tokenkit.models.count import pattern_of, unique_parameters
from tokenkit.models.load import input_matrix, output_head, quiet
from tokenkit.models.prune import WIDTHS, Kept, PruneConfig, keep_sets
from tokenkit.models.shape import BAD_VALUES, LAYERS, changed_config, other_config, own_names, reason
from tokenkit.models.sharing import share_blocks

KEY = "student.config"


class StudentConfig(Config):
    """How the student's shape differs from its teacher's, and where its weights come from."""

    config: dict[str, Any] = {}
    """Keys of the model's configuration that change, under its own names or transformers' general ones (GPT-2's n_layer
    is num_hidden_layers too). `model_type`: another architecture, which keeps vocabulary, special ids and sizes."""
    layers: int | list[int] | None = None
    """How many layers, or which of the teacher's (from 0; one may stand twice)."""
    copy_layers: Literal["uniform", "first", "last"] = "uniform"
    """Which of the teacher's layers fewer layers begin as: spread evenly with the first and the last among them, the
    first ones, or the last ones."""
    start: Literal["copy", "random"] = "copy"
    """All weights begin as the teacher's, or fresh."""
    reinitialize: list[str] = []
    """Modules that begin fresh all the same: dotted names, their last parts, or globs (`*.mlp`)."""
    initializer: Literal["own", "xavier", "normal"] = "own"
    """How matrices that are not copied begin: as the architecture says, Xavier-uniform, or normal of its deviation."""
    copy_modules: list[str] = []
    """Modules that are copied from the teacher in any case: dotted names, their last parts, or globs."""
    freeze: list[str] = []
    """Modules that are not trained: dotted names, their last parts, or globs."""
    share_layers: int | None = Field(None, ge=1)
    """So many different blocks: neighbouring layers use the same weights, as in ALBERT (1909.11942)."""
    prune: PruneConfig | None = None

    @model_validator(mode="after")
    def _one_way(self) -> "StudentConfig":
        other = self.start == "random" or self.layers is not None or "model_type" in self.config
        if self.prune is not None and other:
            raise UserError("student.prune: keeps what the teacher has; leave out start=random, layers, model_type")
        if isinstance(self.layers, list) and not self.layers:
            raise UserError("student.layers: an empty list; write the numbers of the teacher's layers, from 0")
        return self


@dataclass(frozen=True)
class BuiltStudent:
    """A student in evaluation mode, and what was done to make it."""

    model: PreTrainedModel
    report: dict[str, Any] = field(default_factory=dict)


def build_student(
    teacher: PreTrainedModel, config: StudentConfig, *, seed: int, calibration: Sequence[Int[Tensor, "1 _"]] = ()
) -> BuiltStudent:
    """The student, on the teacher's device and in its dtype; the teacher stays as it is.

    `calibration` are texts, in the teacher's ids, on which `prune` scores what to keep.
    """
    kept = None if config.prune is None else keep_sets(teacher, config.prune, calibration)
    settings, sources = _settings(teacher, config, kept)
    student = _fresh(teacher, settings, seed, KEY if kept is None else "student.prune")
    tensors = _Sources(teacher, student, sources, kept)
    copied = _copied_names(student, config)
    begun = {id(parameter) for parameter in copied.values()}
    random = [name for name, parameter in student.named_parameters() if id(parameter) not in begun]
    _reset(student, random, config.initializer, seed)
    with torch.no_grad():
        for name, parameter in copied.items():
            parameter.copy_(tensors.of(name, parameter))
        if config.start == "copy":
            for name, buffer in _saved_buffers(student).items():
                buffer.copy_(tensors.of(name, buffer))
    if config.share_layers is not None:
        share_blocks(student, config.share_layers)
    frozen = _freeze(student, config.freeze)
    report = {
        "parameters_before": unique_parameters(teacher),
        "parameters_after": unique_parameters(student),
        "layers": sources,
        "copied": sorted({pattern_of(name) for name in copied}),
        "random": sorted({pattern_of(name) for name in random}),
        "frozen": frozen,
        "shared_blocks": config.share_layers,
        "pruned": None if kept is None else {"layers": kept.layers, **kept.sizes, "heads": kept.heads},
    }
    student.to(teacher.device)  # pyrefly: ignore [bad-argument-type] (a decorator hides the signature)
    return BuiltStudent(student.eval(), report)


def chosen_layers(layers: int | list[int] | None, teacher_layers: int, how: str) -> list[int]:
    """The teacher's layer that each layer of the student begins as."""
    if isinstance(layers, list):
        wrong = [layer for layer in layers if not 0 <= layer < teacher_layers]
        if wrong:
            raise UserError(f"student.layers: {wrong[0]} of a teacher with layers 0 to {teacher_layers - 1}")
        return layers
    count = teacher_layers if layers is None else layers
    if not 1 <= count <= teacher_layers:
        raise UserError(
            f"student.layers: {count} from a teacher's {teacher_layers}; write start=random, or say which: "
            f"layers=[0, 0, 1, 1, ...]"
        )
    if how == "uniform":
        last, steps = teacher_layers - 1, max(count - 1, 1)
        return [(2 * place * last + steps) // (2 * steps) for place in range(count)]
    return [*range(count)] if how == "first" else [*range(teacher_layers - count, teacher_layers)]


def _settings(
    teacher: PreTrainedModel, config: StudentConfig, kept: Kept | None
) -> tuple[PreTrainedConfig, list[int] | None]:
    """The student's configuration, and the teacher's layer that each of its layers begins as (None: fresh ones)."""
    before, given = teacher.config, dict(config.config)
    kind = type(before)
    if given.get("vocab_size", len(input_matrix(teacher))) != len(input_matrix(teacher)):
        raise UserError(f"{KEY}.vocab_size: a student keeps its vocabulary here; write target_tokenizer to change it")
    model_type = given.pop("model_type", before.model_type)
    named = {LAYERS: config.layers} if isinstance(config.layers, int) else {}
    if model_type != before.model_type:
        if config.start == "copy" or isinstance(config.layers, list):
            raise UserError(
                f"{KEY}.model_type: a {model_type} cannot begin as a {before.model_type}; write student.start=random"
            )
        return other_config(before, model_type, {**given, **named}, KEY), None
    changes = own_names(kind, given, KEY)
    count = changes.pop(kind.attribute_map.get(LAYERS, LAYERS), None)
    if count is not None and not isinstance(count, int):
        raise UserError(f"{KEY}.{LAYERS}: {count!r}, where a whole number is needed")
    if count is not None and config.layers not in (None, count):
        raise UserError(f"student.layers: {config.layers}, and {KEY} has {LAYERS}={count}; keep one")
    if kept is not None:
        _check_sizes_are_free(kind, changes, count)
        changes |= {kind.attribute_map.get(name, name): size for name, size in kept.sizes.items()}
        return changed_config(before, changes, kept.layers, "student.prune"), kept.layers
    layers = count if config.layers is None else config.layers
    if config.start == "random" and isinstance(layers, int) and layers > before.num_hidden_layers:
        deeper = {kind.attribute_map.get(LAYERS, LAYERS): layers}
        return changed_config(before, {**changes, **deeper}, None, KEY), None
    sources = chosen_layers(layers, before.num_hidden_layers, config.copy_layers)
    return changed_config(before, changes, sources, KEY), sources


def _check_sizes_are_free(kind: type[PreTrainedConfig], changes: Mapping[str, Any], count: int | None) -> None:
    sizes = [name for name in (*WIDTHS, "head_dim") if kind.attribute_map.get(name, name) in changes]
    if sizes or count is not None:
        name = sizes[0] if sizes else LAYERS
        raise UserError(f"{KEY}.{name}: beside student.prune, which sets the sizes; write it there, or leave prune out")


def _fresh(teacher: PreTrainedModel, settings: PreTrainedConfig, seed: int, key: str) -> PreTrainedModel:
    """A model of the configuration with the architecture's own initialisation, drawn from the seed."""
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        try:
            if settings.model_type == teacher.config.model_type:
                student = type(teacher)(settings)
            else:
                student = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
        except BAD_VALUES as error:
            raise UserError(f"{key}: {settings.model_type} cannot be built so: {reason(error)}") from None
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.to(teacher.dtype)  # pyrefly: ignore [bad-argument-type] (a decorator hides the signature)


class _Sources:
    """The teacher's tensor for each of the student's, found by name, by layer and by the role of the tables."""

    def __init__(
        self, teacher: PreTrainedModel, student: PreTrainedModel, layers: list[int] | None, kept: Kept | None
    ) -> None:
        self.tensors = {**dict(teacher.named_parameters(remove_duplicate=False)), **_saved_buffers(teacher)}
        self.kept = kept
        self.names: dict[str, tuple[str, int]] = {}
        """The teacher's name, and the number of the student's layer, of tensors that have another name or a layer."""
        if layers is not None:
            prefix, blocks = block_list(student)
            self.names = {
                f"{prefix}.{number}.{part}": (f"{prefix}.{layers[number]}.{part}", number)
                for number, block in enumerate(blocks)
                for part in (*dict(block.named_parameters()), *dict(block.named_buffers()))
            }
        for mine, theirs in zip(_tables(student), _tables(teacher), strict=True):
            for part, _ in mine.named_parameters():
                self.names[f"{_name_of(student, mine)}.{part}"] = f"{_name_of(teacher, theirs)}.{part}", 0

    def of(self, name: str, into: Tensor) -> Tensor:
        """The tensor that goes into the student's of that name; UserError where there is none of its shape."""
        theirs, layer = self.names.get(name, (name, 0))
        if theirs not in self.tensors:
            raise UserError(f"student: the teacher has no {theirs} to copy into {name}; write it into reinitialize")
        tensor = self.tensors[theirs]
        if self.kept is not None:
            tensor = self.kept.cut(theirs, tensor, layer)
        if tensor.shape != into.shape:
            raise UserError(
                f"student: {name} is {[*into.shape]}, the teacher's {[*tensor.shape]}; write it into reinitialize, or "
                "start=random, or prune"
            )
        return tensor


def _tables(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    return model.get_input_embeddings(), output_head(model)


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a checkpoint holds."""
    state = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in state}


def _copied_names(student: PreTrainedModel, config: StudentConfig) -> dict[str, nn.Parameter]:
    """The names under which tensors are copied. A table that is also the head is copied from the teacher's input table,
    or from its head if that alone is asked for.
    """
    fresh = matching(student, config.reinitialize, "student.reinitialize")
    asked = matching(student, config.copy_modules, "student.copy_modules")
    found: dict[str, nn.Parameter] = {}
    for name, parameter in student.named_parameters():
        names = [other for other, same in student.named_parameters(remove_duplicate=False) if same is parameter]
        named = [other for other in names if other in asked]
        if named:
            found[named[0]] = parameter
        elif config.start == "copy" and not any(other in fresh for other in names):
            found[name] = parameter
    return found


def matching(model: nn.Module, globs: Iterable[str], key: str) -> dict[str, nn.Parameter]:
    """The parameters, under all their names, of the modules that are named; UserError for a name of nothing.

    A name is the dotted one of a module or tensor, its last part, or a glob over the dotted name.
    """
    found: dict[str, nn.Parameter] = {}
    for glob in globs:
        some = {
            name: parameter
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if any(fnmatchcase(part, glob) or part.rpartition(".")[2] == glob for part in _above(name))
        }
        if not some:
            known = sorted({part for name, _ in model.named_parameters() for part in name.split(".")[:-1]})
            names = ", ".join(part for part in known if not part.isdigit())
            raise UserError(f"{key}: {glob!r} is no module of the student; known: {names}")
        found |= some
    return found


def _above(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: depth + 1]) for depth in range(len(parts))]


@torch.no_grad()
def _reset(student: PreTrainedModel, names: Sequence[str], initializer: str, seed: int) -> None:
    """Draws the matrices among the named tensors anew; vectors and what is no `weight` stay as the architecture has it.

    A stack of matrices, as of experts, is drawn matrix by matrix.
    """
    if initializer == "own":
        return
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(student.named_parameters())
    for name in names:
        parameter, plain = parameters[name], name.rpartition(".")[2] == "weight"
        if parameter.ndim < 2 or not (plain or parameter.ndim == 3):
            continue
        drawn = torch.empty(parameter.shape)
        if initializer == "normal":
            drawn.normal_(std=_deviation(student.config), generator=generator)
        else:
            for matrix in [drawn] if plain else drawn:
                nn.init.xavier_uniform_(matrix, generator=generator)
        parameter.copy_(drawn)


def _deviation(config: PreTrainedConfig) -> float:
    values = config.to_dict()
    if "initializer_range" not in values:
        raise UserError(f"student.initializer: {config.model_type} names no deviation; write initializer=xavier or own")
    return values["initializer_range"]


def _freeze(student: PreTrainedModel, globs: Sequence[str]) -> list[str]:
    """The names of all tensors that are now frozen; of a tied table both."""
    for parameter in matching(student, globs, "student.freeze").values():
        parameter.requires_grad_(False)
    return [name for name, p in student.named_parameters(remove_duplicate=False) if not p.requires_grad]
