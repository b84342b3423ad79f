"""Which source rows make the row of each target token. Special tokens go by role, all others by their bytes."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from types import MappingProxyType
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8
from numpy import ndarray

from tokenkit.align.vocabulary import ids_in_use
from tokenkit.config import UserError
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer.specials import Side, role_sources, special_pieces
from tokenkit.transfer.spelling import Kind, Speller

Rule = Literal["digits", "white_space"]
RULES: tuple[Rule, ...] = ("digits", "white_space")


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
    digits: Bool[ndarray, "W"]  # numbers, and
    white_space: Bool[ndarray, "W"]  # runs of it: made of their pieces whatever makes other rows

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
    def by_rule(self) -> Bool[ndarray, "W"]:
        """The target ids that are left to their pieces because of what they are."""
        return self.digits | self.white_space

    def with_rules(self, rules: Collection[Rule]) -> "TransferPlan":
        """The plan with these rules alone."""
        kept = {name: self.__dict__[name] if name in rules else np.zeros(len(self), bool) for name in RULES}
        return replace(self, **kept)

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
    spell = Speller(source, vocab)
    chosen = _ordinary(target, spell, {} if kept is None else {i: one for i, one in kept.items() if one < vocab})
    for i, pieces in special_pieces(source, target, spell).items():
        if i not in chosen or chosen[i][0] != Kind.COPIED:
            chosen[i] = (Kind.SPECIAL, pieces) if pieces else (Kind.DRAWN, [])
    roles = {side: role_sources(source, target, vocab, side) for side in ("input", "head")}
    chosen |= {i: (Kind.SPECIAL, [role_source]) for i, role_source in roles["input"].items()}
    by_hand = _overridden(source, target, spell, override)
    chosen |= {i: (Kind.OVERRIDDEN, pieces) for i, pieces in by_hand.items()}
    return _plan(target, vocab, chosen, {i: one for i, one in roles["head"].items() if i not in by_hand})


def _ordinary(target: Tokenizer, spell: Speller, kept: Mapping[int, int]) -> dict[int, tuple[Kind, list[int]]]:
    """Tokens with bytes. Of several with the same bytes only the one that encoding gives takes a row: a second would
    take half the probability of the first, for nothing."""
    chosen: dict[int, tuple[Kind, list[int]]] = {i: (Kind.COPIED, [one]) for i, one in kept.items()}
    rest = []
    for spelling, i in ids_in_use(target).items():
        if spelling in spell.by_bytes:
            chosen.setdefault(i, (Kind.COPIED, [spell.by_bytes[spelling]]))
        elif i not in chosen:
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
    return TransferPlan(kinds, pieces, head_pieces, offsets, _special(target), vocab, *_ruled(target))


def _special(target: Tokenizer) -> Bool[ndarray, "W"]:
    found = np.zeros(target.vocab_size, bool)
    found[[i for i in target.special_ids if i < target.vocab_size]] = True
    return found


def _ruled(target: Tokenizer) -> tuple[Bool[ndarray, "W"], Bool[ndarray, "W"]]:
    """Tokens that are digits, with a space before them or not; those that are nothing but white space."""
    spellings = target.token_bytes
    digits = np.array([spelling.removeprefix(b" ").isdigit() for spelling in spellings], bool)
    return digits, np.array([bool(spelling) and not spelling.strip() for spelling in spellings], bool)


def _overridden(source: Tokenizer, target: Tokenizer, spell: Speller, override: Override) -> dict[int, list[int]]:
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


def _named(source: Tokenizer, spell: Speller, wanted: str | int) -> list[int]:
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
    return TransferPlan(kinds, own, own, offsets, _special(tokenizer), vocab, *_ruled(tokenizer))
