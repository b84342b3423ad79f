"""The merges of a byte-pair encoding: which two pieces make which, and the pair that makes a piece of its own text.

Sennrich+ 2016, 1508.07909.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from tokenkit.config import UserError
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.pieces import Definition, model_type, model_vocabulary

Pair = tuple[str, str]


def merge_pairs(definition: Definition) -> list[Pair]:
    """The merges in their order, as pairs of pieces, whichever of the two ways they are written in."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in definition["model"]["merges"])
    return [(left, right) for left, right in pairs]


def written(pairs: list[Pair], definition: Definition) -> list[str] | list[list[str]]:
    """Merges as the tokenizer.json writes its own; as pairs where a piece holds a space."""
    found = definition["model"]["merges"]
    spaced = any(" " in left or " " in right for left, right in pairs)
    if spaced or (found and not isinstance(found[0], str)):
        return [[left, right] for left, right in pairs]
    return [f"{left} {right}" for left, right in pairs]


@dataclass(frozen=True, eq=False)
class MergeList:
    """The merges of a tokenizer.json and what follows from them."""

    vocabulary: dict[str, int]
    pairs: list[Pair]

    @classmethod
    def of(cls, definition: Definition) -> "MergeList":
        """Of a BPE model; its pieces are those of the model proper."""
        return cls(model_vocabulary(definition), merge_pairs(definition))

    @cached_property
    def ranks(self) -> dict[Pair, int]:
        """The place of every pair in the list; of two equal pairs the library keeps the later."""
        return {pair: rank for rank, pair in enumerate(self.pairs)}

    @cached_property
    def splits(self) -> dict[str, Pair | None]:
        """Per piece that the merges make of its own characters the last pair; None for one of a single character.

        A piece may stand in several merges as their result. No more than one of them ever happens: whatever text a
        piece stands in, it was made there as it is made of its own.
        """
        found: dict[str, Pair | None] = {}
        for piece in self.vocabulary:
            symbols, done = merged(piece, self.ranks)
            if symbols == [piece]:
                found[piece] = self.pairs[done[-1]] if done else None
        return found


def merged(piece: str, ranks: dict[Pair, int]) -> tuple[list[str], list[int]]:
    """What the merges leave of the characters of a piece, and the ranks of those that were done, in order.

    The smallest rank goes first, and of equals the leftmost.
    """
    symbols, done = list(piece), []
    while len(symbols) > 1:
        found = [ranks.get(pair, len(ranks)) for pair in pairwise(symbols)]
        best = min(found)
        if best == len(ranks):
            break
        place = found.index(best)
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
        done.append(best)
    return symbols, done


def require_plain(tokenizer: object, what: str, kinds: tuple[str, ...] = ("BPE", "Unigram")) -> HFTokenizer:
    """The tokenizer, where its vocabulary can be changed; UserError where it is of another kind."""
    if not isinstance(tokenizer, HFTokenizer):
        name = "bytes" if type(tokenizer).__name__ == "ByteTokenizer" else "a learned tokenizer"
        instead = "train a BPE" if name == "bytes" else "use `tokenkit tokenizer prune`"
        raise UserError(f"{what}: {name} has no merges and no scores to change; {instead}")
    definition = tokenizer.definition
    kind, model = model_type(definition), definition["model"]
    if kind not in kinds:
        raise UserError(f"{tokenizer.name}: {what} is for {' and '.join(kinds)} vocabularies, and this is {kind}")
    marks = [model.get(key) or "" for key in ("continuing_subword_prefix", "end_of_word_suffix")]
    if any(marks):
        raise UserError(
            f"{tokenizer.name}: {what} needs a vocabulary without marks of places in a word, and this one has "
            f"{''.join(marks)!r}"
        )
    if model.get("dropout"):
        raise UserError(f"{tokenizer.name}: {what} needs merges that always happen; set dropout to null")
    return tokenizer
