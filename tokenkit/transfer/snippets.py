"""Short texts in both tokenisations, chosen so that the tokens whose rows are to be learnt occur in them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from tokenkit.align.spans import align
from tokenkit.tokenizers.base import Encoding, Tokenizer
from tokenkit.transfer.evidence import Texts

BLOCK = 1024  # pieces of text that are tokenised together


@dataclass(frozen=True, eq=False)
class Snippet:
    """A text as both tokenizers cut it, each with its start token in front.

    Common ends are places at which both have just read the same bytes, from the start tokens' on.
    """

    source_ids: Int64[ndarray, "S"]
    target_ids: Int64[ndarray, "T"]
    source_ends: Int64[ndarray, "K"]
    target_ends: Int64[ndarray, "K"]


def chosen_snippets(
    texts: Texts,
    source: Tokenizer,
    target: Tokenizer,
    wanted: Int64[ndarray, "F"],
    *,
    snippet_characters: int,
    per_token: int,
    seed: int,
) -> list[Snippet]:
    """Pieces of the texts, in an order that the seed decides, of which each has a wanted token that fewer than
    `per_token` pieces before it have."""
    pieces = [piece for document in texts.documents for piece in cut(document, snippet_characters)]
    lacking = np.zeros(target.vocab_size, np.int64)
    lacking[wanted] = per_token
    order = np.random.default_rng(seed).permutation(len(pieces))
    found: list[Snippet] = []
    for begin in range(0, len(order), BLOCK):
        block = [pieces[i] for i in order[begin : begin + BLOCK]]
        chosen: list[tuple[str, Encoding]] = []
        for piece, encoding in zip(block, target.encode_batch(block), strict=True):
            distinct = np.unique(encoding.ids)
            if (lacking[distinct] > 0).any():
                lacking[distinct] -= 1
                chosen.append((piece, encoding))
        encodings = source.encode_batch([piece for piece, _ in chosen])
        found += [_snippet(source, target, *pair) for pair in zip(encodings, (e for _, e in chosen), strict=True)]
        if not (lacking > 0).any():
            break
    return found


def cut(text: str, size: int) -> Iterator[str]:
    """Pieces of a text that together are it, of at most so many characters, cut before white space where there is
    any."""
    return (match.group() for match in re.finditer(rf"(?s).{{1,{size}}}(?=\s|\Z)|.{{1,{size}}}", text))


def _snippet(source: Tokenizer, target: Tokenizer, old: Encoding, new: Encoding) -> Snippet:
    spans = align(old, new).spans
    source_ids = np.append(source.start_id(), old.ids).astype(np.int64)
    target_ids = np.append(target.start_id(), new.ids).astype(np.int64)
    return Snippet(source_ids, target_ids, np.append(0, spans[:, 1]), np.append(0, spans[:, 3]))
