"""Tokens that no text becomes: what is in the way of each, from the merges to the normaliser.

Land & Bartolo 2024, 2405.05417 (they call such tokens unreachable).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np
import tokenizers
from jaxtyping import Int64, UInt8
from numpy import ndarray

from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.pieces import (
    BYTE_FALLBACK,
    Definition,
    is_byte_level,
    model_type,
    model_vocabulary,
    space_mark,
    unknown_id,
)
from tokenkit.tokenizers.surgery.bpe import require_plain
from tokenkit.tokenizers.surgery.library import backend

AROUND = ("", "a", " ", "\n", "1", ".", "А", "中")  # what may stand before and behind a token's text


class Reach(IntEnum):
    """Whether a text becomes a token, and what is in the way."""

    NO_TOKEN = 0  # a hole in the range of ids
    SPECIAL = 1  # put there by its id, and so is the unknown token
    ADDED = 2  # found in running text before the model sees it
    BYTE = 3  # a single byte, which spells what has no other token
    REACHED = 4
    WHOLE_WORD = 5  # not made by merges, but taken where it is a whole pre-token (`ignore_merges`)
    MERGES = 6  # merges, or scores, make other tokens of its own text
    SHADOWED = 7  # another token has the same bytes, and is the one that is made
    PRETOKENS = 8  # the pre-tokenizer cuts its text, whatever stands around it
    NORMALISED = 9  # the normalizer changes its text


UNREACHABLE = (Reach.MERGES, Reach.SHADOWED, Reach.PRETOKENS, Reach.NORMALISED)


@dataclass(frozen=True, eq=False)
class Reachability:
    """A verdict per id."""

    kinds: UInt8[ndarray, "V"]

    @cached_property
    def unreachable(self) -> Int64[ndarray, "U"]:
        """Ids of the ordinary tokens that no text becomes."""
        return np.flatnonzero(np.isin(self.kinds, UNREACHABLE))

    def ids(self, kind: Reach) -> list[int]:
        """The ids of one verdict."""
        return np.flatnonzero(self.kinds == kind).tolist()

    def counts(self) -> dict[str, int]:
        """Ids per verdict, without those that no id has."""
        found = np.bincount(self.kinds, minlength=len(Reach)).tolist()
        return {kind.name.lower(): found[kind] for kind in Reach if found[kind]}


def reachability(tokenizer: Tokenizer) -> Reachability:
    """Of every id of a BPE or Unigram vocabulary.

    A token that is no text on its own (part of a character) is judged by the merges alone. Whether a pre-tokenizer
    leaves a text whole is tried between a few characters on each side, so `PRETOKENS` means in none of these places.
    """
    plain = require_plain(tokenizer, "a check for unreachable tokens")
    definition, spelling = plain.definition, plain.token_bytes
    kinds = np.full(len(spelling), Reach.NO_TOKEN, np.uint8)
    pieces = model_vocabulary(definition)
    added = {token["content"]: token["id"] for token in plain.added_tokens}
    model = _model(definition)
    pipeline = _Pipeline(definition)
    twice = _doubled(spelling)
    whole_words = bool(definition["model"].get("ignore_merges"))
    for piece, index in pieces.items():
        if piece in added:
            continue
        if _is_byte(piece, spelling[index], definition):
            kinds[index] = Reach.BYTE
        elif [token.id for token in model.tokenize(piece)] == [index]:
            kinds[index] = pipeline.verdict(piece, spelling[index])
        elif whole_words and pipeline.verdict(piece, spelling[index], whole=True) == Reach.REACHED:
            kinds[index] = Reach.WHOLE_WORD
        else:
            kinds[index] = Reach.SHADOWED if spelling[index] in twice else Reach.MERGES
    kinds[[*added.values()]] = Reach.ADDED
    kinds[[*plain.special_ids]] = Reach.SPECIAL
    unknown = unknown_id(definition)
    if unknown is not None:
        kinds[unknown] = Reach.SPECIAL
    return Reachability(kinds)


def _is_byte(piece: str, spelling: bytes, definition: Definition) -> bool:
    if is_byte_level(definition):
        return len(spelling) == 1
    return bool(definition["model"].get("byte_fallback")) and piece in BYTE_FALLBACK


def _model(definition: Definition) -> tokenizers.models.Model:
    """The model as it treats a piece inside a word."""
    model = dict(definition["model"])
    if model_type(definition) == "BPE":
        model["ignore_merges"] = False
    return tokenizers.Tokenizer.from_str(json.dumps({**definition, "model": model})).model


def _doubled(spelling: list[bytes]) -> set[bytes]:
    seen: set[bytes] = set()
    return {one for one in spelling if one and (one in seen or seen.add(one))}


class _Pipeline:
    """What happens to a text before the model sees it."""

    def __init__(self, definition: Definition) -> None:
        library = backend(definition)
        self._normalizer, self._pre_tokenizer = library.normalizer, library.pre_tokenizer
        self._mark = None if is_byte_level(definition) else space_mark(definition)

    def verdict(self, piece: str, spelling: bytes, *, whole: bool = False) -> Reach:
        """Whether the piece comes to stand inside one pre-token, or as a `whole` one."""
        try:
            text = spelling.decode()
        except UnicodeDecodeError:
            return Reach.MERGES if whole else Reach.REACHED
        found = Reach.NORMALISED
        for normalised in self._normalised(text):
            wanted = text.replace(" ", self._mark) if self._mark else text
            if wanted not in normalised and text not in normalised:
                continue
            found = Reach.PRETOKENS
            words = self._words(normalised)
            if piece in words if whole else any(piece in word for word in words):
                return Reach.REACHED
        return found

    def _normalised(self, text: str) -> Iterator[str]:
        """The text with something around it, as the normalizer leaves it: alone at first."""
        for before in AROUND:
            for behind in AROUND:
                given = before + text + behind
                yield given if self._normalizer is None else self._normalizer.normalize_str(given)

    def _words(self, text: str) -> list[str]:
        if self._pre_tokenizer is None:
            return [text]
        return [word for word, _ in self._pre_tokenizer.pre_tokenize_str(text)]
