"""Which layers of a model are adapted, and which modules are trained whole beside them."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tokenkit.config import UserError
from tokenkit.models.blocks import block_list

RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")
SHOWN = 12  # names in an error


def target_layers(
    model: PreTrainedModel,
    *,
    targets: Sequence[str] | Literal["all-linear"] = "all-linear",
    target_regex: Sequence[str] = (),
    layers: Sequence[str] = (),
    leave_out: Iterable[str] = (),
) -> list[str]:
    """Dotted names of the linear layers that are adapted, in the order of the model; the output matrix is none.

    A target is the last part of a name (`q_proj`) or a glob over all of it (`model.layers.1?.*`); a regular expression
    matches the whole name. `leave_out` are modules whose layers are trained whole. UserError for what fits nothing.
    """
    head, outside = model.get_output_embeddings(), tuple(leave_out)
    linear = [
        name
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and module is not head and not _inside(name, outside)
    ]
    if target_regex:
        patterns = [_compiled(pattern) for pattern in target_regex]
        missed = [pattern.pattern for pattern in patterns if not any(map(pattern.fullmatch, linear))]
        if missed:
            raise UserError(
                f"lora target_regex: {missed[0]!r} matches no linear layer as a whole; names here are such as "
                f"{', '.join(linear[:SHOWN]) or 'none'}"
            )
        chosen = [name for name in linear if any(pattern.fullmatch(name) for pattern in patterns)]
    else:
        wanted = ["*"] if targets == "all-linear" else targets
        for target in wanted:
            if not any(_matches(name, target) for name in linear):
                raise UserError(f"lora targets: {target!r} is no linear layer here; known: {_last_parts(linear)}")
        chosen = [name for name in linear if any(_matches(name, target) for target in wanted)]
    return _in_layers(model, chosen, layers) if layers else chosen


def whole_modules(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Dotted names of the modules that are trained whole: those whose last part, or whole name, is among `names`.

    A module inside another one of them is not named a second time. UserError, with what may have been meant, for a name
    that fits nothing.
    """
    with_weights = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    for wanted in names:
        if not any(_matches(name, wanted) for name in with_weights):
            known = sorted({name.rpartition(".")[2] for name in with_weights if not name.rpartition(".")[2].isdigit()})
            close = get_close_matches(wanted, known, 3, 0.5)
            meant = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
            raise UserError(f"lora modules_to_save: {wanted!r} is no module with weights here; {meant}")
    found: list[str] = []
    for name in with_weights:
        if any(_matches(name, wanted) for wanted in names) and not _inside(name, found):
            found.append(name)
    return found


def layer_numbers(ranges: Sequence[str], count: int) -> set[int]:
    """The numbers that ranges such as `0-8` and `12` name, of `count` layers; UserError for others than there are."""
    found: set[int] = set()
    for text in ranges:
        match = RANGE.fullmatch(text.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < count:
            raise UserError(
                f"lora layers: {text!r}, where the model has layers 0 to {count - 1}; write ranges with both ends such "
                f"as '0-{count - 1}', or single numbers"
            )
        found |= set(range(first, last + 1))
    return found


def layer_prefixes(model: PreTrainedModel, numbers: Iterable[int]) -> tuple[str, ...]:
    """The dotted names of these layers, each with the dot that follows."""
    name, _ = block_list(model)
    return tuple(f"{name}.{number}." for number in sorted(numbers))


def _in_layers(model: PreTrainedModel, chosen: list[str], ranges: Sequence[str]) -> list[str]:
    _, blocks = block_list(model)
    prefixes = layer_prefixes(model, layer_numbers(ranges, len(blocks)))
    found = [name for name in chosen if name.startswith(prefixes)]
    if not found:
        raise UserError(f"lora layers: {', '.join(ranges)} have none of the targets: {_last_parts(chosen)}")
    return found


def _matches(name: str, target: str) -> bool:
    return name.rpartition(".")[2] == target or fnmatchcase(name, target)


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"lora target_regex: {pattern!r} is no regular expression: {error}") from None


def _last_parts(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"
