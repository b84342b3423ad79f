"""What can be made of a tokenizer: other special tokens, bytes alone, further tokens, another way to cut the text."""

import json
from typing import Any

import tokenizers

from tokenkit.config import UserError
from tokenkit.tokenizers.bytelevel import ROLE_TOKENS, SPECIALS, byte_definition
from tokenkit.tokenizers.pieces import (
    Definition,
    byte_alphabet,
    is_byte_level,
    model_vocabulary,
    parts,
    space_mark,
    token_table,
)
from tokenkit.tokenizers.roles import KIND_KEY, Roles, kind_roles
from tokenkit.tokenizers.spec import BYTE, TokenizerSpec

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
# What a tokenizer_config.json says for the special tokens that the family's take the place of.
REPLACED = ("chat_template", "bos_token", "eos_token", "pad_token", "add_bos_token", "add_eos_token")
LONGEST_WORD = 128  # bytes; the greedy model's time grows with the square of a pre-token's length
Config = dict[str, Any] | None  # a parsed tokenizer_config.json


def convert(definition: Definition, config: Config, spec: TokenizerSpec) -> tuple[Definition, Config]:
    """The tokenizer.json and tokenizer_config.json that the spec asks for, made of those that were found."""
    try:
        if spec.source is not None:
            config = declare_family(definition, config, spec.source)
        target = spec.target
        if spec.conversion == BYTE:
            target = spec.target or spec.source
            definition, config = byte_definition(() if target else SPECIALS), None if target else dict(ROLE_TOKENS)
        if target is not None:
            definition, config = with_family(definition, config, target)
        if spec.conversion == "longest_prefix":
            definition = longest_prefix(definition)
        elif spec.conversion == "prebyteified":
            definition = prebyteified(definition)
        elif spec.conversion == "manual_add_prefix_space":
            definition = with_prefix_space(definition)  # byteified: every tokenizer is seen as bytes, with its ids
        return with_tokens(definition, spec.tokens_to_add), config
    except UserError as error:
        raise UserError(f"tokenizer {str(spec)!r}: {error}") from None


def declare_family(definition: Definition, config: Config, kind: str) -> dict[str, Any]:
    """The configuration, with the family where no chat template and with its roles where nothing was said."""
    roles = kind_roles(kind)
    missing = [literal for literal in roles.specials if literal not in _contents(definition)]
    if missing:
        raise UserError(
            f"source={kind}: this tokenizer has no {missing[0]!r}, a special token of that family; "
            f"name the family it comes from, or write target={kind} to add its special tokens"
        )
    found = _role_tokens(roles) if config is None else dict(config)
    return found if "chat_template" in found else {**found, KIND_KEY: kind}


def with_family(definition: Definition, config: Config, kind: str) -> tuple[Definition, dict[str, Any]]:
    """The same tokenizer with the special tokens, roles and turns of a family; its own chat template is gone."""
    roles = kind_roles(kind)
    for literal in roles.specials:
        definition = _with_token(definition, literal, special=True)
    kept = {key: value for key, value in (config or {}).items() if key not in REPLACED}
    turns = {"chat_template": roles.jinja()} if roles.user else {}  # for whoever loads the folder elsewhere
    return {**definition, "post_processor": None}, kept | turns | _role_tokens(roles) | {KIND_KEY: kind}


def with_tokens(definition: Definition, tokens: tuple[str, ...]) -> Definition:
    """The same tokenizer with further plain tokens behind the last id, which are found in running text."""
    spelled = set(token_table(definition, frozenset())) if tokens else set()
    for token in tokens:
        if not token:
            raise UserError("tokens_to_add: an empty token; take it out")
        if tokens.count(token) > 1:
            raise UserError(f"tokens_to_add: {token!r} stands twice; keep one")
        if token in _contents(definition) or token.encode() in spelled:
            raise UserError(f"tokens_to_add: {token!r} is a token already; take it out")
        definition = _with_token(definition, token, special=False)
    return definition


def longest_prefix(definition: Definition) -> Definition:
    """The same vocabulary and pre-tokens, each cut from left to right into the longest tokens there are.

    Pre-tokens longer than `LONGEST_WORD` bytes, or the longest token, are cut there first: time stays linear.
    """
    vocabulary = model_vocabulary(definition)
    if not is_byte_level(definition):
        raise UserError("longest_prefix: needs a vocabulary of bytes (ByteLevel), this one is spelled in characters")
    marks = [definition["model"].get(key) or "" for key in ("continuing_subword_prefix", "end_of_word_suffix")]
    if any(marks):
        raise UserError(f"longest_prefix: this vocabulary marks places in a word ({''.join(marks)}); use one without")
    missing = [byte for byte, character in enumerate(byte_alphabet()) if character not in vocabulary]
    if missing:
        raise UserError(
            f"longest_prefix: {len(missing)} single bytes are no tokens of this vocabulary (0x{missing[0]:02X} first), "
            "so texts would be lost; use a vocabulary with all 256"
        )
    for token in definition.get("added_tokens") or []:
        if token["special"] and token["content"] in vocabulary and _in_one_word(definition, token["content"]):
            raise UserError(
                f"longest_prefix: the text {token['content']!r} would become the special token of that name, "
                "because nothing splits it; use a tokenizer whose pre-tokenizer does"
            )
    longest = max(LONGEST_WORD, *map(len, vocabulary))
    never = byte_alphabet()[0xFF]  # the model must name what stands for unknown text: a byte that no UTF-8 text holds
    greedy = {"type": "WordPiece", "unk_token": never, "continuing_subword_prefix": ""}
    model = {**greedy, "max_input_chars_per_word": longest, "vocab": vocabulary}
    cut = {"type": "Split", "pattern": {"Regex": f".{{1,{longest}}}"}, "behavior": "Isolated", "invert": False}
    return {**definition, "model": model, "pre_tokenizer": _sequence(definition.get("pre_tokenizer"), cut)}


def prebyteified(definition: Definition) -> Definition:
    """A pipeline that reads the vocabulary in the byte alphabet, in which it is written without saying so."""
    if is_byte_level(definition):
        return definition
    alphabet, added = {*byte_alphabet()}, {token["content"] for token in definition.get("added_tokens") or []}
    foreign = next((p for p in model_vocabulary(definition) if p not in added and not alphabet.issuperset(p)), None)
    if foreign is not None:
        raise UserError(f"prebyteified: the token {foreign!r} is not written in the byte alphabet; leave it out")
    if space_mark(definition) is not None:
        raise UserError("prebyteified: its pipeline writes a mark for spaces, so no bytes follow; leave it out")
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {**definition, "pre_tokenizer": _sequence(definition.get("pre_tokenizer"), step), "decoder": step}


def with_prefix_space(definition: Definition) -> Definition:
    """The same tokenizer, which reads one space before each text that begins with something else."""
    if _spelled(definition, "a") == b" a":
        raise UserError("manual_add_prefix_space: this tokenizer begins texts with a space already; leave it out")
    mark = space_mark(definition) or " "
    first = {"type": "Metaspace", "replacement": mark, "prepend_scheme": "first", "split": False}
    steps = definition.get("pre_tokenizer")
    if any(part["type"] == "Metaspace" for part in parts(steps)):
        definition = {**definition, "pre_tokenizer": _prepending(steps)}
    else:
        definition = {**definition, "pre_tokenizer": _sequence(first, steps)}
    if {_spelled(definition, "a"), _spelled(definition, " a")} != {b" a"}:
        raise UserError("manual_add_prefix_space: this tokenizer drops the space that begins a text; leave it out")
    return definition


def _prepending(node: Any) -> Any:
    """The same pre-tokenizer, whose Metaspace steps mark the beginning of a text."""
    if isinstance(node, list):
        return [_prepending(child) for child in node]
    if node["type"] == "Sequence":
        return {**node, "pretokenizers": _prepending(node["pretokenizers"])}
    return {**node, "prepend_scheme": "first"} if node["type"] == "Metaspace" else node


def _sequence(*steps: Definition | None) -> Definition:
    """One pre-tokenizer that takes the steps in order."""
    flat = [part for step in steps for part in parts(step) if part["type"] != "Sequence"]
    return {"type": "Sequence", "pretokenizers": flat}


def _role_tokens(roles: Roles) -> dict[str, Any]:
    tokens = {"bos_token": roles.bos, "eos_token": roles.eos, "pad_token": roles.pad}
    return {key: literal for key, literal in tokens.items() if literal}


def _contents(definition: Definition) -> set[str]:
    added = {token["content"] for token in definition.get("added_tokens") or []}
    return added | model_vocabulary(definition).keys()


def _with_token(definition: Definition, content: str, *, special: bool) -> Definition:
    """The tokenizer with this added token: the one that it has, or a new one behind the last id."""
    vocabulary, added = model_vocabulary(definition), list(definition.get("added_tokens") or [])
    for place, token in enumerate(added):
        if token["content"] == content:
            added[place] = {**token, "special": special}
            return {**definition, "added_tokens": added}
    size = 1 + max([*vocabulary.values(), *(token["id"] for token in added)], default=-1)
    index = vocabulary.get(content, size)
    token = {"id": index, "content": content, **FLAGS, "special": special}
    model = definition["model"]
    apart = [token["id"] for token in added if token["content"] not in vocabulary]
    counted = max(len(vocabulary), 1 + max(apart, default=-1))  # the id that the library gives, whatever the file says
    if content not in vocabulary and counted != size:  # ids were left out: only the model's vocabulary can name one
        model = {**model, "vocab": {**vocabulary, content: index}}
    return {**definition, "model": model, "added_tokens": sorted([*added, token], key=lambda entry: entry["id"])}


def _library(definition: Definition) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the library raises nothing more special
        reason = str(error).splitlines()[0]
        raise UserError(f"the tokenizers library cannot read this tokenizer.json ({reason})") from None


def _spelled(definition: Definition, text: str) -> bytes:
    table = token_table(definition, frozenset())
    return b"".join(table[index] for index in _library(definition).encode(text, add_special_tokens=False).ids)


def _in_one_word(definition: Definition, literal: str) -> bool:
    """Whether a pre-token holds the whole literal."""
    steps = _library({**definition, "added_tokens": []}).pre_tokenizer
    return steps is None or any(literal in word for word, _ in steps.pre_tokenize_str(literal))
