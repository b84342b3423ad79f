"""Ids of a tokenizer.json: tokens renumbered wherever the file names them, and numbered as the library does it."""

from collections.abc import Mapping
from typing import Any

from tokenkit.config import UserError
from tokenkit.tokenizers.pieces import Definition, model_type, model_vocabulary


def renumbered(definition: Definition, ids: Mapping[int, int]) -> Definition:
    """The tokenizer with only the tokens whose old ids are given, under their new ids; merges are left as they are."""
    pieces, added = definition["model"]["vocab"], definition.get("added_tokens") or []
    if isinstance(pieces, dict):
        kept = {piece: ids[i] for piece, i in pieces.items() if i in ids}
        vocabulary: Any = dict(sorted(kept.items(), key=lambda item: item[1]))
    else:
        vocabulary = [entry for _, entry in sorted((ids[i], entry) for i, entry in enumerate(pieces) if i in ids)]
    model: dict[str, Any] = {**definition["model"], "vocab": vocabulary}
    if model.get("unk_id") is not None:
        model["unk_id"] = ids[model["unk_id"]]
    tokens = [{**token, "id": ids[token["id"]]} for token in added if token["id"] in ids]
    found = {**definition, "model": model, "added_tokens": sorted(tokens, key=lambda token: token["id"])}
    found["post_processor"] = _processor(definition.get("post_processor"), ids)
    if definition.get("padding"):
        found["padding"] = {**definition["padding"], "pad_id": ids[definition["padding"]["pad_id"]]}
    return as_library_numbers(found)


def _processor(node: Definition | None, ids: Mapping[int, int]) -> Definition | None:
    """A post-processor whose special tokens have other ids."""
    if node is None:
        return None
    found = dict(node)
    if node["type"] == "Sequence":
        found["processors"] = [_processor(child, ids) for child in node["processors"]]
    elif node["type"] == "TemplateProcessing":
        special = {name: {**one, "ids": [ids[i] for i in one["ids"]]} for name, one in node["special_tokens"].items()}
        found["special_tokens"] = special
    else:
        found |= {key: [node[key][0], ids[node[key][1]]] for key in ("sep", "cls") if key in node}
    return found


def as_library_numbers(definition: Definition) -> Definition:
    """A tokenizer whose added tokens the library gives the ids that the file says.

    It numbers added tokens that the model does not have itself, behind as many ids as the model has pieces. Where
    that is not what the file says, the model's vocabulary names them too.
    """
    vocabulary, added = model_vocabulary(definition), definition.get("added_tokens") or []
    apart = sorted((t for t in added if t["content"] not in vocabulary), key=lambda token: token["id"])
    following = range(len(vocabulary), len(vocabulary) + len(apart))
    if all(token["id"] == wanted for token, wanted in zip(apart, following)):
        return definition
    named = {token["content"]: token["id"] for token in apart}
    if model_type(definition) == "Unigram":
        pieces = definition["model"]["vocab"]
        if sorted(named.values()) != list(range(len(pieces), len(pieces) + len(named))):
            raise UserError(
                "the ids of the added tokens leave holes behind a Unigram vocabulary, which is a list; "
                "renumber the tokens"
            )
    model = {**definition["model"], "vocab": dict(sorted((vocabulary | named).items(), key=lambda item: item[1]))}
    return {**definition, "model": model}
