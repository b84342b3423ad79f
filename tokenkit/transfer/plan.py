"""Which source rows make the row of each target token. Special tokens go by role, all others by their bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import accumulate
from types import MappingProxyType
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8
from numpy import ndarray

from tokenkit.config import UserError
from tokenkit.tokenizers.base import Encoding, Tokenizer

Side = Literal["input", "head"]


class Kind(IntEnum):
    """How a target id gets its row."""

    COPIED = 0  # the source has a token of the same bytes
    SPECIAL = 1  # a special token: the source's token of the same role or the same literal, or its literal's pieces
    AVERAGED = 2  # the pieces into which the source itself splits the token's text
    FALLBACK = 3  # not text on its own (part of a character): the longest source tokens that spell the bytes
    DRAWN = 4  # the source cannot spell the bytes: a random row like the source's
    UNREACHABLE = 5  # no token has this id: the mean source row
    OVERRIDDEN = 6  # source tokens named by hand


@dataclass(frozen=True, eq=False)
class TransferPlan:
    """Source ids per target id as flat lists: id i is made of `pieces[offsets[i]:offsets[i + 1]]`.

    `head_pieces` differs from `pieces` only where one target token plays two roles: it begins texts as the source's
    bos does (input) and ends them as the source's eos does (head).
    """

    kinds: UInt8[ndarray, "W"]
    pieces: Int32[ndarray, "P"]
    head_pieces: Int32[ndarray, "P"]
    offsets: Int64[ndarray, "W+1"]
    special: Bool[ndarray, "W"]  # special tokens of the target, also those that only a random row can stand for
    source_vocab: int  # rows of the source that stand for a token id: what means and draws are taken over
    by_rule: Bool[ndarray, "W"]  # digits, and runs of white space: made of their pieces whatever makes other rows

    def __len__(self) -> int:
        return len(self.kinds)

    @cached_property
    def lengths(self) -> Int64[ndarray, "W"]:
        """Number of source pieces per target id."""
        return np.diff(self.offsets)

    def side(self, side: Side) -> Int32[ndarray, "P"]:
        """The source ids for the input embedding or for the output matrix."""
        return self.pieces if side == "input" else self.head_pieces

    @cached_property
    def free(self) -> Int64[ndarray, "F"]:
        """The target ids whose rows an initialiser makes: ordinary tokens that the source does not have."""
        made = np.isin(self.kinds, (Kind.AVERAGED, Kind.FALLBACK, Kind.DRAWN)) & ~self.by_rule
        return np.flatnonzero(made & ~self.special)

    @cached_property
    def anchors(self) -> tuple[Int64[ndarray, "A"], Int64[ndarray, "A"]]:
        """Target ids of ordinary tokens that the source has with the same bytes, and the source ids of those."""
        ids = np.flatnonzero((self.kinds == Kind.COPIED) & (self.lengths == 1))
        return ids, self.pieces[self.offsets[:-1][ids]].astype(np.int64)

    def describe(self) -> dict[str, int | float]:
        """Counts per kind, the share of target tokens with an exact counterpart, and pieces per averaged token."""
        counts = {kind.name.lower(): int((self.kinds == kind).sum()) for kind in Kind}
        tokens = len(self) - counts["unreachable"] - counts["special"]
        averaged = self.lengths[self.kinds == Kind.AVERAGED]
        return {
            "target_ids": len(self),
            **counts,
            "overlap": counts["copied"] / max(tokens, 1),
            "pieces_per_averaged": float(averaged.mean()) if len(averaged) else 0.0,
        }


Override = Mapping[str, str | int]


def plan_transfer(
    source: Tokenizer,
    target: Tokenizer,
    *,
    source_rows: int,
    override: Override = MappingProxyType({}),
    kept: Mapping[int, int] | None = None,
) -> TransferPlan:
    """The plan for a source model with `source_rows` embedding rows; ids beyond them are never used.

    `override` names source text by target tokens, and goes before everything else. `kept` are ids of a target that was
    made of the source, target id → source id: those tokens keep their rows, whatever others are spelled alike.
    """
    vocab = min(source_rows, source.vocab_size)
    if source.fingerprint == target.fingerprint and not override and kept is None:
        return _identity(target, vocab)
    spell = _Speller(source, vocab)
    chosen = _ordinary(target, spell, {} if kept is None else {i: one for i, one in kept.items() if one < vocab})
    for i, pieces in _special_pieces(source, target, spell).items():
        if i not in chosen or chosen[i][0] != Kind.COPIED:
            chosen[i] = (Kind.SPECIAL, pieces) if pieces else (Kind.DRAWN, [])
    roles = {side: _role_sources(source, target, vocab, side) for side in ("input", "head")}
    chosen |= {i: (Kind.SPECIAL, [role_source]) for i, role_source in roles["input"].items()}
    by_hand = _overridden(source, target, spell, override)
    chosen |= {i: (Kind.OVERRIDDEN, pieces) for i, pieces in by_hand.items()}
    return _plan(target, vocab, chosen, {i: one for i, one in roles["head"].items() if i not in by_hand})


def _ordinary(target: Tokenizer, spell: "_Speller", kept: Mapping[int, int]) -> dict[int, tuple[Kind, list[int]]]:
    chosen: dict[int, tuple[Kind, list[int]]] = {i: (Kind.COPIED, [one]) for i, one in kept.items()}
    rest = []
    for i, spelling in enumerate(target.token_bytes):
        if spelling in spell.by_bytes:
            chosen.setdefault(i, (Kind.COPIED, [spell.by_bytes[spelling]]))
        elif spelling and i not in chosen:
            rest.append(i)
    return chosen | dict(zip(rest, spell.split([target.token_bytes[i] for i in rest]), strict=True))


def _plan(
    target: Tokenizer, vocab: int, chosen: Mapping[int, tuple[Kind, list[int]]], head: Mapping[int, int]
) -> TransferPlan:
    size = target.vocab_size
    nothing: tuple[Kind, list[int]] = (Kind.UNREACHABLE, [])
    found = [chosen.get(i, nothing) for i in range(size)]
    kinds = np.array([kind for kind, _ in found], np.uint8)
    offsets = np.fromiter(accumulate((len(group) for _, group in found), initial=0), np.int64, size + 1)
    pieces = np.fromiter((p for _, group in found for p in group), np.int32, int(offsets[-1]))
    head_pieces = pieces.copy()
    for i, role_source in head.items():
        head_pieces[offsets[i]] = role_source
    return TransferPlan(kinds, pieces, head_pieces, offsets, _special(target), vocab, _by_rule(target))


def _special(target: Tokenizer) -> Bool[ndarray, "W"]:
    found = np.zeros(target.vocab_size, bool)
    found[[i for i in target.special_ids if i < target.vocab_size]] = True
    return found


def _by_rule(target: Tokenizer) -> Bool[ndarray, "W"]:
    """Tokens that are digits, with a space before them or not, or nothing but white space."""
    return np.array([_is_number_or_space(spelling) for spelling in target.token_bytes], bool)


def _is_number_or_space(spelling: bytes) -> bool:
    return bool(spelling) and (not spelling.strip() or spelling.removeprefix(b" ").isdigit())


def _overridden(source: Tokenizer, target: Tokenizer, spell: "_Speller", override: Override) -> dict[int, list[int]]:
    """Source ids for the target tokens that are named by hand; UserError for what neither side has."""
    by_bytes: dict[bytes, list[int]] = {}
    for i, spelling in enumerate(target.token_bytes):
        if spelling:
            by_bytes.setdefault(spelling, []).append(i)
    found: dict[int, list[int]] = {}
    for token, wanted in override.items():
        special = target.special_tokens.get(token)
        ids = [special] if special is not None else by_bytes.get(token.encode(), [])
        if not ids:
            raise UserError(f"override: {token!r} is no token of {target.name}; write the text of one as it is spelled")
        pieces = _named(source, spell, wanted)
        if not pieces:
            raise UserError(f"override.{token}: {source.name} has no row for {wanted!r}; write another of its tokens")
        found |= dict.fromkeys(ids, pieces)
    return found


def _named(source: Tokenizer, spell: "_Speller", wanted: str | int) -> list[int]:
    """The source ids that a text, or an id, stands for; none where there is no row."""
    if isinstance(wanted, int):
        return [wanted] if 0 <= wanted < spell.vocab else []
    special = source.special_tokens.get(wanted)
    if special is not None:
        return [special] if special < spell.vocab else []
    return spell.split([wanted.encode()])[0][1]


def _identity(tokenizer: Tokenizer, vocab: int) -> TransferPlan:
    """Every id keeps its own row, shadowed duplicates too: the same tokenizer gives the same model."""
    size = tokenizer.vocab_size
    kinds = np.full(size, Kind.UNREACHABLE, np.uint8)
    for i, spelling in enumerate(tokenizer.token_bytes[:vocab]):
        if spelling or i in tokenizer.special_ids:
            kinds[i] = Kind.COPIED if spelling else Kind.SPECIAL
    own = np.flatnonzero(kinds != Kind.UNREACHABLE).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(kinds != Kind.UNREACHABLE)]).astype(np.int64)
    return TransferPlan(kinds, own, own, offsets, _special(tokenizer), vocab, _by_rule(tokenizer))


class _Speller:
    """How the source spells byte strings with its ordinary tokens that have a row."""

    def __init__(self, source: Tokenizer, vocab: int) -> None:
        self.source, self.vocab = source, vocab
        self.by_bytes: dict[bytes, int] = {}
        doubled: dict[bytes, None] = {}
        for i, spelling in enumerate(source.token_bytes[:vocab]):
            if spelling in self.by_bytes:
                doubled[spelling] = None
            elif spelling:
                self.by_bytes[spelling] = i
        self.longest = max(map(len, self.by_bytes), default=0)
        # Of several ids with the same bytes (byte fallback `<0x41>` beside `A`) only the one in use was trained.
        for spelling, (_, pieces) in zip(doubled, self.split(list(doubled)), strict=True):
            if len(pieces) == 1:
                self.by_bytes[spelling] = pieces[0]

    def split(self, spellings: list[bytes]) -> list[tuple[Kind, list[int]]]:
        """Per byte string its kind and pieces: tokenised as text where that spells the bytes, else cut greedily."""
        texts = [_as_text(spelling) for spelling in spellings]
        pieces = self._tokenised([text for text in texts if text is not None])
        tokenised = iter(pieces)
        found = [(None if text is None else next(tokenised)) for text in texts]
        return [
            (Kind.AVERAGED, ids) if ids else self._greedy(spelling)
            for ids, spelling in zip(found, spellings, strict=True)
        ]

    def _tokenised(self, texts: list[str]) -> list[list[int]]:
        """The source's ids for each text, empty where they do not spell exactly its bytes."""
        found = [self._exact(e, text.encode(), 0) for e, text in zip(self._encodings(texts), texts)]
        # A dummy prefix joins the first piece (`foo` becomes `▁foo`). After a newline there is none.
        retry = [i for i, ids in enumerate(found) if not ids]
        for i, encoding in zip(retry, self._encodings(["\n" + texts[i] for i in retry])):
            found[i] = self._exact(encoding, texts[i].encode(), 1)
        return found

    def _encodings(self, texts: list[str]) -> Sequence[Encoding | None]:
        """One encoding per text, None for a text that the source cannot keep as it is (it normalises)."""
        try:
            return self.source.encode_batch(texts)
        except UserError:
            half = len(texts) // 2
            return [None] if half == 0 else [*self._encodings(texts[:half]), *self._encodings(texts[half:])]

    def _exact(self, encoding: Encoding | None, spelling: bytes, begin: int) -> list[int]:
        """The ids from byte `begin` on, empty unless they have rows and spell the bytes."""
        if encoding is None:
            return []
        ids = encoding.ids[encoding.starts >= begin].tolist()
        known = self.source.token_bytes
        return ids if max(ids, default=0) < self.vocab and b"".join(known[i] for i in ids) == spelling else []

    def _greedy(self, spelling: bytes) -> tuple[Kind, list[int]]:
        pieces, begin = [], 0
        while begin < len(spelling):
            end = min(begin + self.longest, len(spelling))
            while end > begin and spelling[begin:end] not in self.by_bytes:
                end -= 1
            if end == begin:
                return Kind.DRAWN, []
            pieces.append(self.by_bytes[spelling[begin:end]])
            begin = end
        return Kind.FALLBACK, pieces


def _as_text(spelling: bytes) -> str | None:
    try:
        return spelling.decode()
    except UnicodeDecodeError:
        return None


def _role_sources(source: Tokenizer, target: Tokenizer, vocab: int, side: Side) -> dict[int, int]:
    """The source id for each target token with a role. Of two roles, input takes bos first and head takes eos first."""
    bos, eos, pad = (i if i is not None and i < vocab else None for i in (source.bos_id, source.eos_id, source.pad_id))
    # A target without bos begins texts with eos (`Tokenizer.start_id()`), so that token plays both roles.
    begin = target.eos_id if target.bos_id is None else target.bos_id
    ranked = [(begin, (bos, eos)), (target.eos_id, (eos, bos))]
    ranked = [*(ranked if side == "input" else reversed(ranked)), (target.pad_id, (pad, eos, bos))]
    found: dict[int, int] = {}
    for wanted, choices in ranked:
        choice = next((i for i in choices if i is not None), None)
        if wanted in target.special_ids and choice is not None:
            found.setdefault(wanted, choice)
    return found


def _special_pieces(source: Tokenizer, target: Tokenizer, spell: _Speller) -> dict[int, list[int]]:
    """Source ids for each special target token by its literal: the same special token, else the pieces of the text."""
    split = spell.split([literal.encode() for literal in target.special_tokens])
    found: dict[int, list[int]] = {}
    for (literal, i), (_, pieces) in zip(target.special_tokens.items(), split, strict=True):
        same = source.special_tokens.get(literal, spell.vocab)
        found[i] = [same] if same < spell.vocab else pieces
    return found
