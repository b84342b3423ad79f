"""Tokens taken away so that what is left is a tokenizer: merges only of tokens that are there, every byte spelled.

Leaf pruning takes only tokens that no merge of a kept token needs, rarest first, and gives their counts to the two
they were made of. Purason+ 2025, 2512.03989; dropping whole languages: Ushio+ 2023, 2305.15020.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Literal

from jaxtyping import Int64
from numpy import ndarray

from tokenkit.config import UserError
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.pieces import BYTE_FALLBACK, Definition, model_type, model_vocabulary, space_mark
from tokenkit.tokenizers.surgery.bpe import MergeList, require_plain, written
from tokenkit.tokenizers.surgery.library import ordinary_pieces
from tokenkit.tokenizers.surgery.numbering import renumbered

By = Literal["leaf_frequency", "frequency", "last"]


@dataclass(frozen=True, eq=False)
class Pruned:
    """A tokenizer with fewer tokens."""

    tokenizer: HFTokenizer
    kept: Mapping[int, int]
    """New id to old id, as `plan_transfer` takes them."""
    gone: list[int]
    """Old ids."""

    @property
    def mapping(self) -> dict[int, int]:
        """Old id to new id of the tokens that are left."""
        return {old: new for new, old in self.kept.items()}


class Structure:
    """Which ordinary tokens may go at all, and which need which."""

    def __init__(self, tokenizer: HFTokenizer) -> None:
        definition = self.definition = tokenizer.definition
        pieces = ordinary_pieces(definition)
        fixed = _fixed(definition, pieces)
        self.removable = {i for piece, i in pieces.items() if piece not in fixed}
        self.merges = MergeList.of(definition) if model_type(definition) == "BPE" else MergeList({}, [])
        ids = self.merges.vocabulary
        self.parts: dict[int, tuple[int, int]] = {
            ids[piece]: (ids[pair[0]], ids[pair[1]]) for piece, pair in self.merges.splits.items() if pair is not None
        }
        self.present = {i for i, one in enumerate(tokenizer.token_bytes) if one} | tokenizer.special_ids

    def needed(self, ids: Iterable[int]) -> set[int]:
        """These tokens, and all that their merges are made of."""
        found, stack = set(), [*ids]
        while stack:
            one = stack.pop()
            if one not in found:
                found.add(one)
                stack.extend(self.parts.get(one, ()))
        return found


def _fixed(definition: Definition, pieces: Mapping[str, int]) -> set[str | None]:
    """Pieces that never go: the mark of a space where bytes spell what is missing, else every single character."""
    if definition["model"].get("byte_fallback") and BYTE_FALLBACK.keys() <= model_vocabulary(definition).keys():
        return {space_mark(definition)}
    return {piece for piece in pieces if len(piece) == 1}


def prune(
    tokenizer: object,
    *,
    size: int | None = None,
    by: By = "leaf_frequency",
    counts: Int64[ndarray, "V"] | None = None,
    unwanted: Iterable[int] = (),
    keep_ids: bool = False,
) -> Pruned:
    """Without the unwanted tokens that no other needs, and then down to `size` ids.

    `by`: leaf_frequency, the rarest token that no kept one needs, again and again; frequency, the commonest tokens
    and what they need; last, the token with the largest id that no kept one needs, again and again. `counts` says how
    often every id occurs in text. `keep_ids` leaves holes where tokens were, so that a model needs no other rows.
    """
    plain = require_plain(tokenizer, "prune")
    structure = Structure(plain)
    if by != "last" and size is not None and counts is None:
        raise UserError(f"by: {by!r} needs text that says how often every token occurs; give some, or write by=last")
    kept = structure.needed(structure.present - (structure.removable & {*unwanted}))
    if size is not None and size < len(kept):
        occurring = dict(enumerate(counts.tolist())) if counts is not None else {}
        chosen = _commonest if by == "frequency" else _leaves
        kept = chosen(structure, kept, size, occurring, by)
    gone = sorted(structure.present - kept)
    if not gone:
        raise UserError(f"{plain.name}: nothing to take away; write a size below {len(structure.present)}")
    if keep_ids and model_type(structure.definition) == "Unigram":
        raise UserError("keep_ids: a Unigram vocabulary is a list, which has no holes; leave keep_ids out")
    old = sorted(kept)
    ids = {i: i if keep_ids else place for place, i in enumerate(old)}
    definition = renumbered(_without(structure, kept), ids)
    left = HFTokenizer(definition, plain.config, f"{plain.name}-{len(gone)}")
    return Pruned(left, {new: i for i, new in ids.items()}, gone)


def _without(structure: Structure, kept: set[int]) -> Definition:
    """The tokenizer with only the merges whose three tokens stay."""
    definition, merges = structure.definition, structure.merges
    if not merges.pairs:
        return definition
    left = {piece for piece, i in merges.vocabulary.items() if i in kept}
    pairs = [(a, b) for a, b in merges.pairs if a in left and b in left and a + b in left]
    return {**definition, "model": {**definition["model"], "merges": written(pairs, definition)}}


def _least(kept: set[int], size: int) -> UserError:
    return UserError(
        f"size: {size} is too small: bytes, special tokens and single characters are {len(kept)} already; write more"
    )


def _leaves(structure: Structure, kept: set[int], size: int, counts: Mapping[int, int], by: By) -> set[int]:
    """Tokens that are left when leaves go one by one: those with the smallest counts, or the largest ids."""
    kept, parts, count = set(kept), structure.parts, Counter(counts)
    users = Counter(part for one in kept for part in parts.get(one, ()))

    def entry(one: int) -> tuple[int, int]:
        return (-one, 0) if by == "last" else (count[one], -one)

    def token(found: tuple[int, int]) -> int:
        return -found[0] if by == "last" else -found[1]

    heap = [entry(one) for one in kept & structure.removable if not users[one]]
    heapify(heap)
    while len(kept) > size:
        if not heap:
            raise _least(kept, size)
        one = token(heappop(heap))
        kept.discard(one)
        for part in parts.get(one, ()):
            users[part] -= 1
            count[part] += count[one]  # text that it was made of is now made of these
        for part in set(parts.get(one, ())):
            if not users[part] and part in structure.removable:
                heappush(heap, entry(part))
    return kept


def _commonest(structure: Structure, kept: set[int], size: int, counts: Mapping[int, int], by: By) -> set[int]:
    """The commonest tokens with all that they need, as long as there is room."""
    found = structure.needed(kept - structure.removable)
    if len(found) > size:
        raise _least(found, size)
    for one in sorted(kept & structure.removable, key=lambda i: (-counts[i], i)):
        wanted = structure.needed([one]) - found
        if len(found) + len(wanted) <= size:
            found |= wanted
    return found
