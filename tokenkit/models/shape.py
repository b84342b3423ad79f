"""The configuration of a student: its teacher's with keys changed and layers cut, or that of another architecture."""

import copy
import dataclasses
import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tokenkit.config import UserError

BAD_VALUES = (StrictDataclassError, ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError)  # as raised
LAYERS, WIDTH, HEADS, GROUPS = "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"
CARRIED = (LAYERS, WIDTH, "intermediate_size", HEADS, GROUPS, "max_position_embeddings")  # into another architecture
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SYNONYMS = {  # what other families call it: for hints, and for sizes that are carried over
    "n_layer": LAYERS,
    "n_embd": WIDTH,
    "n_head": HEADS,
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
}
OF_FILES = ("transformers_version", "architectures", "_name_or_path", "dtype", "model_type")  # no shape of a model
GENERAL = frozenset(field.name for field in dataclasses.fields(PreTrainedConfig))


def config_class_of(model_type: str, key: str) -> type[PreTrainedConfig]:
    """The configuration class of a causal language model's `model_type`; UserError, speaking of the key, if none."""
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "write one, such as 'llama' or 'gpt2'"
        raise UserError(f"{key}: {model_type!r} is no causal language model of transformers; {hint}")
    return CONFIG_MAPPING[model_type]


def known_keys(kind: type[PreTrainedConfig]) -> list[str]:
    """The keys that say what models of a class are like, under the class's own names and the general ones."""
    fields = [field.name for field in dataclasses.fields(kind)]  # and the arguments of a class that is no dataclass
    arguments = [word for word, p in inspect.signature(kind).parameters.items() if p.kind is not p.VAR_KEYWORD]
    return [name for name in dict.fromkeys([*fields, *arguments, *kind.attribute_map]) if name not in GENERAL]


def own_names(kind: type[PreTrainedConfig], overrides: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The overrides under the class's own names; UserError for an unknown key, or for one that stands twice.

    transformers stores an unknown key silently, and the model is then not what was asked for.
    """
    known, named = known_keys(kind), {}
    for name, value in overrides.items():
        if name not in known:
            synonym = next((new for pair in SYNONYMS.items() for new in pair if name in pair and new in known), None)
            close = [synonym] if synonym else difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
            raise UserError(f"{key}.{name}: unknown key of {kind.model_type!r}; {hint}")
        own = kind.attribute_map.get(name, name)
        if own in named:
            raise UserError(f"{key}.{name}: the same as {own!r}, which stands there too; keep one")
        named[own] = value
    return named


def new_config(model_type: str, overrides: Mapping[str, Any], key: str) -> PreTrainedConfig:
    """The default configuration of an architecture with keys changed."""
    kind = config_class_of(model_type, key)
    return _made(kind, own_names(kind, overrides, key), key)


def changed_config(
    config: PreTrainedConfig, overrides: Mapping[str, Any], sources: Sequence[int] | None, key: str
) -> PreTrainedConfig:
    """A deep copy with keys changed, under the class's own names.

    `sources` are the teacher's layers that the student's layers come from, whose per-layer settings go with them; None
    for layers that come from none: such lists are then left to the architecture's own pattern.
    """
    kind = type(config)
    before = config.to_dict()
    values = copy.deepcopy({name: value for name, value in before.items() if name not in OF_FILES})
    for name, value in overrides.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) and values.get(name) else value
    count = before[_own(kind, LAYERS)]
    if sources is None or [*sources] != [*range(count)]:
        values |= _cut_lists(before, overrides, sources, count, key)
    if sources is not None:
        values[_own(kind, LAYERS)] = len(sources)
    return _made(kind, values | _derived(kind, before, overrides), key)


def other_config(config: PreTrainedConfig, model_type: str, overrides: Mapping[str, Any], key: str) -> PreTrainedConfig:
    """The configuration of another architecture: vocabulary, special ids and sizes of this one, then the overrides."""
    kind = config_class_of(model_type, f"{key}.model_type")
    known, before = known_keys(kind), config.to_dict()
    sizes = {name: before[_own(type(config), name)] for name in CARRIED if _own(type(config), name) in before}
    if "n_inner" in before:
        sizes["intermediate_size"] = before["n_inner"] or 4 * sizes[WIDTH]
    if HEADS in sizes:
        sizes.setdefault(GROUPS, sizes[HEADS])
    carried = {"vocab_size": before["vocab_size"], **{name: before.get(name) for name in IDS}}
    for name, value in sizes.items():
        mine = name if name in known else next((old for old, new in SYNONYMS.items() if new == name), name)
        if mine in known:
            carried[_own(kind, mine)] = value
    given = own_names(kind, overrides, key)
    values: dict[str, Any] = {**carried, **given, **_derived(kind, carried, given)}
    if HEADS in sizes and "head_dim" in known and "head_dim" not in given:
        same = not {_own(kind, WIDTH), _own(kind, HEADS)} & given.keys()
        made = _made(kind, {**values, "head_dim": 1}, key)  # the sizes are checked before they are divided
        own = before["head_dim"] if same and before.get("head_dim") else None
        values["head_dim"] = own or made.hidden_size // max(made.num_attention_heads, 1)
    return _made(kind, values, key)


def _own(kind: type[PreTrainedConfig], name: str) -> str:
    return kind.attribute_map.get(name, name)


def _derived(
    kind: type[PreTrainedConfig], before: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, int | None]:
    """What follows from width and heads in the teacher, and so follows from the student's where those are changed."""
    heads, width, found = _own(kind, HEADS), _own(kind, WIDTH), {}
    if heads in overrides and GROUPS not in overrides and before.get(GROUPS) == before[heads]:
        found[GROUPS] = overrides[heads]
    if {heads, width} & overrides.keys() and "head_dim" not in overrides and "head_dim" in before:
        default = {field.name: field.default for field in dataclasses.fields(kind)}.get("head_dim", 0)
        if default is None and before["head_dim"] == before[width] // before[heads]:
            found["head_dim"] = None
    return found


def _cut_lists(
    before: Mapping[str, Any], overrides: Mapping[str, Any], sources: Sequence[int] | None, count: int, key: str
) -> dict[str, Any]:
    """The lists with an entry per layer, for the layers that stay."""
    found: dict[str, Any] = {}
    for name, value in before.items():
        per_layer = {"layer", "layers"} & {*name.split("_")}
        if name in overrides or not per_layer or not isinstance(value, list) or not value:
            continue
        if len(value) != count:
            raise UserError(
                f"{key}.{name}: {len(value)} values for {count} layers, and no rule says which of them the student's "
                f"layers need; write {key}.{name}=[...]"
            )
        found[name] = None if sources is None else [value[layer] for layer in sources]
    return found


def _made(kind: type[PreTrainedConfig], values: dict[str, Any], key: str) -> PreTrainedConfig:
    try:
        return kind.from_dict(copy.deepcopy(values))
    except BAD_VALUES as error:
        raise UserError(f"{key}: {kind.model_type} cannot be so: {reason(error)}") from None


def reason(error: BaseException) -> str:
    """The line of an error of transformers that says what is wrong."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
    return line.partition("Error: ")[2] or line
