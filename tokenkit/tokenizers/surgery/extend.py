"""Tokens added by continued BPE: merges learnt on from where the tokenizer's own end. Purason+ 2025, 2512.03989.

A token that is appended without the merges that make it is never made, and one with merges learnt elsewhere only
where these happen to fit. Here every new pair stands side by side in what the merges so far make of the text, so its
token is what they make of its own text, whatever comes later.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tokenkit.config import UserError
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.pieces import Definition, is_byte_level, model_vocabulary
from tokenkit.tokenizers.surgery.bpe import Pair, merge_pairs, require_plain, written
from tokenkit.tokenizers.surgery.continued import Pieces, learn_merges
from tokenkit.tokenizers.surgery.library import Joins, chosen_characters, count_words, missing_characters
from tokenkit.tokenizers.surgery.numbering import as_library_numbers

LONGEST = 32  # characters of a new piece: bytes, where the vocabulary is written in them


@dataclass(frozen=True, eq=False)
class Extended:
    """A tokenizer with further tokens behind its last id; all others keep their ids."""

    tokenizer: HFTokenizer
    kept: Mapping[int, int]
    """Every old id to itself, as `plan_transfer` takes them."""
    new: list[int]
    characters: int
    """How many of the new tokens are single characters that were spelled in bytes before."""
    revived: list[int]
    """Old ids that no merge made, and now one does."""


def extend(
    tokenizer: object,
    texts: list[str],
    tokens: int,
    *,
    min_count: int = 2,
    coverage: float = 0.9995,
    longest: int = LONGEST,
) -> Extended:
    """At most so many new tokens, the pairs that are commonest in the texts; fewer where none occurs `min_count` times.

    `coverage` is the share of the texts' characters that shall be tokens where the vocabulary is one of characters and
    spells others in bytes: the commonest missing ones come first, and are at most half of the new tokens.
    """
    plain = require_plain(tokenizer, "extend", ("BPE",))
    if tokens < 1:
        raise UserError(f"tokens: {tokens}, where a whole number from 1 is needed")
    definition, size = plain.definition, plain.vocab_size
    joins, characters = Joins.of(definition), []
    if not is_byte_level(definition):
        missing, total = missing_characters(definition, texts), sum(map(len, texts))
        characters = chosen_characters(missing, total, coverage, tokens // 2)
        definition = _with_pieces(definition, characters, [], size)
    begin = size + len(characters)
    pieces = Pieces(definition, begin, joins, longest)
    learnt = learn_merges(count_words(definition, texts, joins), pieces, tokens - len(characters), min_count)
    definition = _with_pieces(definition, learnt.pieces, learnt.pairs, begin)
    new = [*range(size, begin + len(learnt.pieces))]
    extended = HFTokenizer(definition, plain.config, f"{plain.name}+{len(new)}")
    kept = {i: i for i, spelling in enumerate(plain.token_bytes) if spelling or i in plain.special_ids}
    return Extended(extended, kept, new, len(characters), learnt.revived)


def _with_pieces(definition: Definition, pieces: list[str], pairs: list[Pair], begin: int) -> Definition:
    """The tokenizer with further pieces, whose ids follow each other, and with further merges behind its own."""
    vocabulary = model_vocabulary(definition) | {piece: begin + place for place, piece in enumerate(pieces)}
    merges = written(merge_pairs(definition) + pairs, definition)
    return as_library_numbers({**definition, "model": {**definition["model"], "vocab": vocabulary, "merges": merges}})
