"""tekken.json, Mistral's byte-level vocabularies: special tokens first, then the ranks, cut to the stated size."""

import base64
import binascii
from typing import Any

from tokenkit.config import UserError
from tokenkit.tokenizers.formats.definition import (
    MAX_TOKEN_BYTES,
    MAX_TOKENS,
    Parsed,
    added_token,
    begin_template,
    ranked_definition,
)
from tokenkit.tokenizers.formats.splits import Split, named_or_regex
from tokenkit.tokenizers.pieces import Definition

# Files up to version 7 do not list their special tokens; these are theirs, in the order of their ids.
OLD_SPECIALS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
OLD_SPECIALS += ["[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"]
OLD_SPECIALS += ["[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def is_tekken(value: Any) -> bool:
    """Whether the value of a JSON file has the shape of one."""
    config = value.get("config") if isinstance(value, dict) else None
    return isinstance(config, dict) and "pattern" in config and isinstance(value.get("vocab"), list)


def read_tekken(value: dict[str, Any], name: str, pattern: str | None = None) -> Parsed:
    """The tokenizer.json of a parsed tekken.json; `pattern` replaces its own split."""
    config = value["config"]
    size = _count(config, "default_vocab_size", name)
    num_special = _count(config, "default_num_special_tokens", name)
    inner = size - num_special
    if not 256 <= inner <= len(value["vocab"]):
        raise UserError(
            f"{name}: default_vocab_size {size} less {num_special} special tokens asks for {inner} tokens of the "
            f"{len(value['vocab'])} in vocab; the file is broken"
        )
    if pattern is None and not isinstance(config["pattern"], str):
        raise UserError(f"{name}: config.pattern is {config['pattern']!r}, where a regular expression belongs")
    split = Split((config["pattern"],)) if pattern is None else named_or_regex(pattern)
    ranks = {token: rank + num_special for token, rank in _ranks(value["vocab"], inner, name).items()}
    specials = _specials(value.get("special_tokens"), num_special, name)
    definition = ranked_definition(ranks, [added_token(i, token) for i, token in enumerate(specials)], split, name)
    if "<s>" in specials:
        definition["post_processor"] = begin_template("<s>", specials.index("<s>"))
    return definition, {role: token for role, token in ROLES.items() if token in specials}


def _count(config: Definition, key: str, name: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_TOKENS:
        raise UserError(f"{name}: config.{key} is {value!r}, where a number from 0 to {MAX_TOKENS:,} belongs")
    return value


def _ranks(vocabulary: list[Any], inner: int, name: str) -> dict[bytes, int]:
    """The first `inner` ranks; the file holds more than the models use."""
    tokens: dict[int, bytes] = {}
    for entry in vocabulary:
        rank = entry.get("rank") if isinstance(entry, dict) else None
        encoded = entry.get("token_bytes") if isinstance(entry, dict) else None
        if not isinstance(rank, int) or rank < 0 or not isinstance(encoded, str) or rank in tokens:
            raise UserError(f"{name}: {str(entry)[:60]!r} is not an entry of vocab with a rank of its own")
        if rank >= inner:
            continue
        try:
            tokens[rank] = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):  # ValueError: characters outside ASCII
            tokens[rank] = b""
        if not 0 < len(tokens[rank]) <= MAX_TOKEN_BYTES:
            raise UserError(f"{name}: token_bytes {encoded[:40]!r} of rank {rank} is no base64 token")
    if len(tokens) < inner:
        missing = next(rank for rank in range(inner) if rank not in tokens)
        raise UserError(f"{name}: vocab has no rank {missing} of the {inner} it should have")
    ranks = {token: rank for rank, token in tokens.items()}
    if len(ranks) < inner:
        raise UserError(f"{name}: two ranks of vocab hold the same token; the file is broken")
    return ranks


def _specials(listed: Any, number: int, name: str) -> list[str]:
    """The literals of ids 0 to `number` - 1; those that the file does not name are `<SPECIAL_id>`."""
    if listed is None:
        listed = [{"rank": i, "token_str": content} for i, content in enumerate(OLD_SPECIALS[:number])]
    names: dict[int, str] = {}
    for entry in listed if isinstance(listed, list) else [listed]:
        rank = entry.get("rank") if isinstance(entry, dict) else None
        content = entry.get("token_str") if isinstance(entry, dict) else None
        valid = isinstance(rank, int) and isinstance(content, str) and content
        if not valid or not 0 <= rank < number or rank in names:
            raise UserError(f"{name}: {str(entry)[:60]!r} is not a special token with an id of its own below {number}")
        names[rank] = content
    specials = [names.get(i, f"<SPECIAL_{i}>") for i in range(number)]
    if len(set(specials)) < number:
        raise UserError(f"{name}: two special tokens have the same literal; the file is broken")
    return specials
