"""What a tokenizer.json must satisfy before anything is built from it: a broken one costs a line and no memory."""

import base64
import binascii
import math
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt32
from numpy import ndarray

from tokenkit.config import UserError
from tokenkit.tokenizers.pieces import Definition

SPARE_IDS = 1 << 18  # an id may exceed the number of entries by this much; tables have a row per id
MAX_DEPTH = 64  # of nested normalizers and the like; three is much
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
LISTS = ("normalizers", "pretokenizers", "decoders", "processors")
STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def check_definition(definition: Any, name: str) -> None:
    """UserError with one line for the first thing in a parsed tokenizer.json that cannot be right."""
    problem = _fault(definition)
    if problem:
        raise UserError(f"{name}: not a working tokenizer.json: {problem}; write one saved by a fast tokenizer")


def _fault(definition: Any) -> str | None:
    if not isinstance(definition, dict) or not isinstance(definition.get("model"), dict):
        return "no model"
    model = definition["model"]
    vocabulary, added = model.get("vocab"), definition.get("added_tokens", [])
    if not isinstance(vocabulary, dict | list):
        return "no model with a vocab"
    if not isinstance(added, list):
        return f"added_tokens is {_short(added)}"
    problem = _vocabulary_fault(vocabulary) or next((p for token in added if (p := _added_fault(token))), None)
    if problem:
        return problem
    pieces = vocabulary if isinstance(vocabulary, dict) else {entry[0]: i for i, entry in enumerate(vocabulary)}
    ids = [*pieces.values(), *(token["id"] for token in added)]
    size = len(vocabulary) + len(added)
    if ids and max(ids) > 2 * size + SPARE_IDS:
        return f"id {max(ids)} in a vocabulary of {size} entries"
    if len(set(pieces.values())) < len(pieces):
        return "two entries of the vocab have the same id"
    try:
        "".join([*pieces, *(token["content"] for token in added)]).encode()
    except UnicodeEncodeError:
        return "a token with half a surrogate pair"
    return _model_fault(model, pieces) or _merges_fault(model, pieces) or _steps_fault(definition)


def _vocabulary_fault(vocabulary: dict[str, Any] | list[Any]) -> str | None:
    if isinstance(vocabulary, dict):
        bad = next((entry for entry in vocabulary.items() if not _is_index(entry[1])), None)
        return None if bad is None else f"the id of {_short(bad[0])} is {_short(bad[1])}"
    for entry in vocabulary:
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str) or not _is_number(entry[1]):
            return f"{_short(entry)} is not a piece and its score"
    return None


def _added_fault(token: Any) -> str | None:
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        return f"the added token {_short(token)} has no content"
    if not _is_index(token.get("id")):
        return f"the id of the added token {_short(token['content'])} is {_short(token.get('id'))}"
    flag = next((flag for flag in FLAGS if not isinstance(token.get(flag), bool)), None)
    return (
        None if flag is None else f"{flag} of the added token {_short(token['content'])} is {_short(token.get(flag))}"
    )


def _model_fault(model: Definition, pieces: dict[str, int]) -> str | None:
    """Faults of the settings of a model."""
    for key in ("type", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if not isinstance(model.get(key), str | None):
            return f"{key} of the model is {_short(model[key])}"
    unknown, token = model.get("unk_id"), model.get("unk_token")
    if unknown is not None and not (_is_index(unknown) and unknown < len(pieces)):
        return f"unk_id is {_short(unknown)} of {len(pieces)} entries"
    if unknown is None and isinstance(model["vocab"], list):  # the library asks for it even where bytes spell all
        return "a Unigram model without unk_id"
    if model.get("type") == "WordPiece" and token not in pieces:
        return f"unk_token is {_short(token)}, which the vocab does not hold"
    return None


def _merges_fault(model: Definition, pieces: dict[str, int]) -> str | None:
    if model.get("type") not in (None, "BPE") or ("merges" not in model and model.get("type") is None):
        return None
    merges = model.get("merges")
    if not isinstance(merges, list):
        return f"merges is {_short(merges)}"
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            return f"{_short(merge)} is not a merge of two pieces"
        left, right = pair
        if not right.startswith(prefix):  # the library cuts it off unseen
            return f"the second piece of the merge {_short(merge)} does not begin with {_short(prefix)}"
        for piece in (left, right, left + right[len(prefix) :]):
            if piece not in pieces:
                return f"the merge {_short(merge)} needs {_short(piece)}, which the vocab does not hold"
    return None


def _steps_fault(definition: Definition) -> str | None:
    """Faults of normalizers and other steps that the library or the byte view would meet with a crash."""
    nodes: list[tuple[Any, int]] = [(definition[step], 0) for step in STEPS if definition.get(step) is not None]
    while nodes:
        node, depth = nodes.pop()
        if depth > MAX_DEPTH:
            return f"steps nested deeper than {MAX_DEPTH}"
        if not isinstance(node, dict) or not isinstance(node.get("type"), str):
            return f"the step {_short(node)} has no type"
        for key in LISTS:
            if not isinstance(node.get(key, []), list):
                return f"{key} is {_short(node[key])}"
            nodes += [(child, depth + 1) for child in node.get(key, [])]
        if node["type"] in ("Replace", "Split") and not isinstance(node.get("pattern"), dict):
            return f"the pattern of a {node['type']} is {_short(node.get('pattern'))}"
        if node["type"] == "Metaspace" and not (isinstance(node.get("replacement"), str) and node["replacement"]):
            return f"the replacement of a Metaspace is {_short(node.get('replacement'))}"
        if node["type"] == "Precompiled" and node.get("precompiled_charsmap"):
            problem = _encoded_charsmap_fault(node["precompiled_charsmap"])
            if problem:
                return problem
    return None


def _encoded_charsmap_fault(text: Any) -> str | None:
    try:
        return charsmap_fault(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError, TypeError):
        return "precompiled_charsmap is not base64"


def charsmap_fault(raw: bytes) -> str | None:
    """What is wrong with a precompiled_charsmap, None for a sound one.

    It is a double-array trie of 32-bit units, then the replacements, each ended by a zero byte. The library follows the
    trie without looking at its bounds, so every reachable unit and replacement is looked up here first.
    """
    if len(raw) < 4 or (size := int.from_bytes(raw[:4], "little")) % 4 or not 1024 <= size <= len(raw) - 4:
        return "precompiled_charsmap states a wrong size"
    units, replacements = np.frombuffer(raw, "<u4", size // 4, 4), raw[4 + size :]
    try:
        replacements.decode("utf-8")
    except UnicodeDecodeError:
        return "the replacements of precompiled_charsmap are not UTF-8"
    inside = np.append((np.frombuffer(replacements, np.uint8) & 0xC0) == 0x80, False)  # a character that began before
    seen = np.zeros(len(units), np.bool_)
    waiting = [_child_bases(units, np.zeros(1, np.int64))]
    while waiting:
        bases = waiting.pop()
        if int((bases | 0xFF).max()) >= len(units):
            return "the trie of precompiled_charsmap points outside itself"
        nodes = _children(units, bases)
        nodes = nodes[~seen[nodes]]
        seen[nodes] = True
        bases = _child_bases(units, nodes)
        leaves = bases[(units[nodes] >> 8 & 1 == 1) & (bases < len(units))]
        places = units[leaves].astype(np.int64) & (1 << 31) - 1
        if len(places) and (int(places.max()) > len(replacements) or inside[places].any()):
            return "the trie of precompiled_charsmap points outside its replacements"
        waiting += [bases[start : start + 512] for start in range(0, len(bases), 512)]  # a table of 512 x 256 at a time
    return None


def _child_bases(units: UInt32[ndarray, "U"], nodes: Int64[ndarray, "N"]) -> Int64[ndarray, "N"]:
    """Where the children of these nodes lie, before a label is added."""
    unit = units[nodes].astype(np.int64)
    return nodes ^ ((unit >> 10) << ((unit & 0x200) >> 6))


def _children(units: UInt32[ndarray, "U"], bases: Int64[ndarray, "N"]) -> Int64[ndarray, "M"]:
    """The nodes under these bases: those whose unit carries the label that leads to it."""
    labels = np.arange(1, 256)
    places = bases[:, None] ^ labels
    return np.unique(places[units[places] & (1 << 31 | 0xFF) == labels])


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
