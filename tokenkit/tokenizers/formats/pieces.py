"""Scored pieces (sentencepiece, and GGUF after it) as a tokenizer.json that gives the same ids."""

import base64
import math
import re
from collections import Counter
from dataclasses import dataclass

from tokenkit.config import UserError
from tokenkit.tokenizers.formats.check import charsmap_fault
from tokenkit.tokenizers.formats.definition import (
    MARK,
    MAX_TOKEN_BYTES,
    Parsed,
    added_token,
    begin_template,
    bpe_model,
    whole,
)
from tokenkit.tokenizers.pieces import BYTE_FALLBACK, Definition

UNIGRAM = "Unigram"
USER_BONUS = 1.0  # what sentencepiece 0.2 adds to a path through a user-defined symbol, for all its length
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # the same numbers in both formats


@dataclass(frozen=True, slots=True)
class Pieces:
    """A vocabulary of pieces with log-probabilities or merge priorities, and how text is prepared for it."""

    kind: str  # "BPE" or UNIGRAM
    texts: list[str]
    scores: list[float]
    types: list[int]
    byte_fallback: bool
    role_ids: dict[str, int]  # of unk, bos, eos, pad where there is one
    charsmap: bytes
    dummy_prefix: bool  # a space before every text
    remove_extra_spaces: bool
    mark_spaces: bool  # spaces are U+2581 in the pieces
    add_bos: bool = False

    def of_type(self, *types: int) -> list[int]:
        """The ids of the pieces of these types."""
        return [index for index, type_ in enumerate(self.types) if type_ in types]


def pieces_definition(pieces: Pieces, name: str) -> Parsed:
    """The tokenizer.json, and the role tokens."""
    _check(pieces, name)
    specials = [added_token(index, pieces.texts[index]) for index in pieces.of_type(UNKNOWN, CONTROL)]
    steps: dict[str, Definition | None] = {"normalizer": _normalizer(pieces), "decoder": _decoder(pieces)}
    steps["pre_tokenizer"] = _cuts(pieces)
    model = _unigram(pieces) if pieces.kind == UNIGRAM else _bpe(pieces, name)
    config = {f"{role}_token": pieces.texts[index] for role, index in pieces.role_ids.items()}
    if pieces.add_bos and "bos" in pieces.role_ids:
        steps["post_processor"] = begin_template(config["bos_token"], pieces.role_ids["bos"])
    return whole(model, specials, **steps), config


def _check(pieces: Pieces, name: str) -> None:
    """UserError for what no trained model has."""
    problem = None
    counts = Counter(pieces.texts)
    twice = next((text for text, count in counts.items() if count > 1), None)
    unknown = pieces.of_type(UNKNOWN)
    roles = [(role, index) for role, index in pieces.role_ids.items() if index >= len(pieces.texts)]
    if not pieces.texts:
        problem = "no pieces"
    elif "" in counts:
        problem = f"piece {pieces.texts.index('')} is empty"
    elif twice is not None:
        problem = f"the piece {twice[:40]!r} stands twice"
    elif not all(math.isfinite(score) for score in pieces.scores):
        problem = "a score that is no finite number"
    elif max(map(len, pieces.texts)) > MAX_TOKEN_BYTES:
        problem = f"a piece of {max(map(len, pieces.texts))} characters"
    elif set(pieces.types) - {*range(1, 7)}:
        problem = f"a piece of type {max(pieces.types)}"
    elif roles:
        problem = f"{roles[0][0]}_id is {roles[0][1]} of {len(pieces.texts)} pieces"
    elif len(unknown) > 1 or (not unknown and pieces.kind == UNIGRAM):
        problem = f"{len(unknown)} unknown pieces, where one belongs"
    elif pieces.byte_fallback and not counts.keys() >= BYTE_FALLBACK.keys():
        problem = "byte_fallback without a piece for every byte"
    elif pieces.charsmap:
        problem = charsmap_fault(pieces.charsmap)
    if problem:
        raise UserError(f"{name}: not a working vocabulary: {problem}; fetch the file again")


def _normalizer(pieces: Pieces) -> Definition | None:
    """What sentencepiece does to a text before it looks for pieces, in its order."""
    mark = MARK if pieces.mark_spaces else " "
    steps: list[Definition] = []
    if pieces.charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(pieces.charsmap).decode()})
    if pieces.remove_extra_spaces:
        steps += [_replace({"Regex": rf"\A +|[ {mark}]+\z"}, ""), _replace({"Regex": " {2,}"}, " ")]
    if pieces.dummy_prefix:
        steps.append({"type": "Prepend", "prepend": mark})
    if pieces.mark_spaces:
        steps.append(_replace({"String": " "}, MARK))
    return {"type": "Sequence", "normalizers": steps} if steps else None


def _replace(pattern: dict[str, str], content: str) -> Definition:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _decoder(pieces: Pieces) -> Definition:
    steps: list[Definition] = [_replace({"String": MARK}, " ")] if pieces.mark_spaces else []
    steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if pieces.dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _cuts(pieces: Pieces) -> Definition | None:
    """Where the normalised text must be cut so that the library takes the pieces that sentencepiece takes.

    The literal of a control or byte piece is no such piece to sentencepiece, but the library's models look at texts
    alone: they would take it in Unigram, and in BPE where it is a word and words that are tokens are taken whole. It is
    cut after its first character.

    User-defined symbols of a BPE are cut out before any merge, the longest first; they need not be reachable by merges,
    hence the whole words. As added tokens they would be cut out of the text as it was, and the rest would get a dummy
    space each.
    """
    symbols = [pieces.texts[index] for index in pieces.of_type(USER_DEFINED)]
    reserved = [pieces.texts[index] for index in pieces.of_type(UNKNOWN, CONTROL, BYTE)]
    tails: dict[str, list[str]] = {}
    for text in reserved:
        if len(text) > 1:
            tails.setdefault(text[0], []).append(re.escape(text[1:]))
    literals = [rf"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in tails.items()]
    if pieces.kind == UNIGRAM:
        return _cut("|".join(literals)) if literals else None
    if not symbols:
        return None
    wanted = [re.escape(symbol) for symbol in sorted(symbols, key=lambda symbol: (-len(symbol), symbol))]
    words = [rf"\A{re.escape(first)}(?=(?:{'|'.join(rest)})\z)" for first, rest in tails.items()]
    return {"type": "Sequence", "pretokenizers": [_cut("|".join(wanted)), _cut("|".join(words))]}


def _cut(regex: str) -> Definition:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _bpe(pieces: Pieces, name: str) -> Definition:
    vocabulary = {text: index for index, text in enumerate(pieces.texts)}
    priority = {pieces.texts[index]: pieces.scores[index] for index in pieces.of_type(NORMAL, USER_DEFINED, UNUSED)}
    merges: list[tuple[float, int, str, str]] = []
    unused = {pieces.texts[index] for index in pieces.of_type(UNUSED)}
    for text, score in priority.items():
        for cut in range(len(text) - 1, 0, -1):
            left, right = text[:cut], text[cut:]
            if left in priority and right in priority:
                merges.append((-score, vocabulary[text], left, right))
                if text in unused:  # sentencepiece joins such a piece, and takes it apart again at the end
                    raise UserError(
                        f"{name}: the piece {text!r} is unused but can be merged; no tokenizer.json can say so"
                    )
    merges.sort(key=lambda merge: merge[:2])
    unknown = pieces.of_type(UNKNOWN)
    return bpe_model(
        vocabulary,
        [(left, right) for *_, left, right in merges],
        unk_token=pieces.texts[unknown[0]] if unknown else None,
        fuse_unk=True,
        byte_fallback=pieces.byte_fallback,
        ignore_merges=bool(pieces.of_type(USER_DEFINED)),
    )


def _unigram(pieces: Pieces) -> Definition:
    """Scores as the encoder uses them: a user-defined symbol beats its spellings, unused pieces never occur."""
    normal = [pieces.scores[index] for index in pieces.of_type(NORMAL)] or [0.0]
    scores = list(pieces.scores)
    for index in pieces.of_type(USER_DEFINED):
        scores[index] = USER_BONUS
    for index in pieces.of_type(UNUSED):
        scores[index] = min(normal) - 1e4
    vocabulary = [list(entry) for entry in zip(pieces.texts, scores)]
    unknown = pieces.of_type(UNKNOWN)[0]
    return {"type": UNIGRAM, "unk_id": unknown, "vocab": vocabulary, "byte_fallback": pieces.byte_fallback}
