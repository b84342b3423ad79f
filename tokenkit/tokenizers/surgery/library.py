"""What the tokenizers library makes of running text: ids, and where merges stop."""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import tokenizers
from jaxtyping import Int32, Int64
from numpy import ndarray

from tokenkit.tokenizers.pieces import (
    BYTE_FALLBACK,
    Definition,
    is_byte_level,
    model_vocabulary,
    space_mark,
    unknown_id,
)

BATCH = 64  # documents that are tokenised together
RARE_JOIN = 1e-3  # share of the tokens below which a kind of join does not count as something the vocabulary has


def backend(definition: Definition) -> tokenizers.Tokenizer:
    """The library's tokenizer for text alone: no template, and literals of special tokens are text."""
    found = tokenizers.Tokenizer.from_str(json.dumps(definition))
    found.post_processor = None
    found.no_truncation()
    found.no_padding()
    found.encode_special_tokens = True
    return found


def count_ids(definition: Definition, texts: list[str], size: int) -> Int64[ndarray, "V"]:
    """How often every id occurs in the texts."""
    library, found = backend(definition), np.zeros(size, np.int64)
    for begin in range(0, len(texts), BATCH):
        some = library.encode_batch_fast(texts[begin : begin + BATCH], add_special_tokens=False)
        ids = np.fromiter(chain.from_iterable(one.ids for one in some), np.int64)
        found += np.bincount(ids, minlength=size)
    return found


def ordinary_pieces(definition: Definition) -> dict[str, int]:
    """The pieces that text is made of: without added tokens, the unknown token and fallback bytes."""
    kept_apart = {token["content"] for token in definition.get("added_tokens") or []}
    if definition["model"].get("byte_fallback"):
        kept_apart |= BYTE_FALLBACK.keys()
    unknown = unknown_id(definition)
    return {p: i for p, i in model_vocabulary(definition).items() if p not in kept_apart and i != unknown}


@dataclass(frozen=True)
class Joins:
    """Which kinds of characters may stand beside each other in a new token.

    A byte-level tokenizer says it by how it splits text. One of SentencePiece splits nothing, and the rules that its
    vocabulary was learnt under (at most one space, and in front; no two digits; letters or signs) show in its tokens.
    """

    mark: str | None
    allowed: frozenset[str]
    """Pairs of kinds, such as `ML`; of no use without a mark."""

    @classmethod
    def of(cls, definition: Definition) -> "Joins":
        """Those that at least one in a thousand tokens has."""
        mark = None if is_byte_level(definition) else space_mark(definition)
        if mark is None:
            return cls(None, frozenset())
        pieces = ordinary_pieces(definition)
        found: Counter[str] = Counter()
        for piece in pieces:
            kinds = "".join(_kind(character, mark) for character in piece)
            found.update({a + b for a, b in pairwise(kinds)})
        return cls(mark, frozenset(join for join, count in found.items() if count >= RARE_JOIN * len(pieces)) - {"MM"})

    def __call__(self, left: str, right: str) -> bool:
        """Whether these two pieces may become one token."""
        if self.mark is None:
            return True
        only_marks = not left.strip(self.mark)
        if only_marks and not right.strip(self.mark):
            return True
        if only_marks and len(left) > 1:
            return False
        return _kind(left[-1], self.mark) + _kind(right[0], self.mark) in self.allowed


def _kind(character: str, mark: str) -> str:
    if character == mark:
        return "M"
    if character.isspace():
        return "W"
    category = unicodedata.category(character)
    return "D" if category == "Nd" else "L" if category[0] in "LM" else "O"


Word = tuple[int, ...]


def count_words(definition: Definition, texts: list[str], joins: Joins) -> Counter[Word]:
    """How often every run of ids occurs inside which a new token may be made; runs of one id are left out."""
    library = backend(definition)
    pieces = ordinary_pieces(definition)
    size = 1 + max([*model_vocabulary(definition).values(), *(t["id"] for t in definition.get("added_tokens") or [])])
    apart = np.ones(size, np.bool_)
    apart[[*pieces.values()]] = False
    first, last = np.zeros((2, size), np.int64)
    kinds = {kind: place for place, kind in enumerate("MWDLO")}
    may = np.ones((len(kinds), len(kinds)), np.bool_)
    if joins.mark is not None:
        for piece, index in pieces.items():
            first[index], last[index] = kinds[_kind(piece[0], joins.mark)], kinds[_kind(piece[-1], joins.mark)]
        may = np.array([[a + b in joins.allowed | {"MM"} for b in kinds] for a in kinds])
    found: Counter[bytes] = Counter()
    for ids, words in _tokenised(library, texts):
        here, before = ids[1:], ids[:-1]
        cut = (words[1:] != words[:-1]) | apart[here] | apart[before] | ~may[last[before], first[here]]
        bounds = np.concatenate([[0], np.flatnonzero(cut) + 1, [len(ids)]])
        bounds = np.stack([bounds[:-1], bounds[1:]], 1)[np.diff(bounds) > 1]
        found.update(ids[begin:end].tobytes() for begin, end in bounds.tolist())
    return Counter({tuple(np.frombuffer(word, np.int32).tolist()): count for word, count in found.items()})


def _tokenised(
    library: tokenizers.Tokenizer, texts: list[str]
) -> Iterator[tuple[Int32[ndarray, "T"], Int64[ndarray, "T"]]]:
    """Ids of some texts at a time, and to which pre-token of which text each belongs."""
    for begin in range(0, len(texts), BATCH):
        encodings = library.encode_batch(texts[begin : begin + BATCH], add_special_tokens=False)
        lengths = [len(one) for one in encodings]
        ids = np.fromiter(chain.from_iterable(one.ids for one in encodings), np.int32, sum(lengths))
        words = np.fromiter(chain.from_iterable(one.word_ids for one in encodings), np.int64, sum(lengths))
        yield ids, words + (np.repeat(np.arange(len(lengths)), lengths) << 40)


def missing_characters(definition: Definition, texts: list[str]) -> Counter[str]:
    """How often every character occurs that is no piece, in the texts as the normalizer leaves them."""
    library, known = backend(definition), ordinary_pieces(definition)
    found: Counter[str] = Counter()
    for text in texts:
        found.update(text if library.normalizer is None else library.normalizer.normalize_str(text))
    return Counter({character: count for character, count in found.items() if character not in known})


def chosen_characters(counts: Counter[str], total: int, coverage: float, most: int) -> list[str]:
    """The commonest missing characters, so many that this share of all is covered; none that is white space."""
    left = (1 - coverage) * total
    ranked = sorted(
        ((c, n) for c, n in counts.items() if not c.isspace() and unicodedata.category(c)[0] != "C"),
        key=lambda item: (-item[1], item[0]),
    )
    missing = sum(count for _, count in ranked)
    chosen: list[str] = []
    for character, count in ranked:
        if missing <= left or len(chosen) == most:
            break
        chosen.append(character)
        missing -= count
    return chosen
