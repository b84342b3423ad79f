"""Texts in all the forms in which transformers takes them → ids, with the characters that they stand for."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from tokenkit.tokenizers.autoencoder.character_spans import NOWHERE, Span, character_spans
from tokenkit.tokenizers.autoencoder.codec import Codec


@dataclass(frozen=True)
class Part:
    """A stretch of a text: an added token, or text that is to be encoded."""

    text: str
    added: int | None
    start: int
    """In characters of the text, or of its word where it came in words."""


@dataclass(frozen=True)
class EncodedText:
    """Ids of a text; the spans are worked out when they are asked for."""

    ids: list[int]
    spans: Callable[[], list[Span]]


def rows_of(text: Any, text_pair: Any, in_words: bool) -> tuple[list[tuple[Any, Any]], bool]:
    """(text, second text or None) of every row, and whether they came as a batch."""
    lists = (list, tuple)
    kinds = lists if in_words else (str, *lists)
    if not (isinstance(text, lists) and (isinstance(text[0], kinds) if text else not in_words)):
        return [(text, text_pair)], False
    if text_pair is None:
        return [_pair(one, in_words) for one in text], True
    if not isinstance(text_pair, lists) or len(text_pair) != len(text):
        raise ValueError("text_pair: as many as there are texts are expected")
    return [*zip(text, text_pair)], True


def _pair(one: Any, in_words: bool) -> tuple[Any, Any]:
    if isinstance(one, tuple if in_words else (list, tuple)) and one and isinstance(one[0], (str, list, tuple)):
        if len(one) == 2:
            return one[0], one[1]
        if len(one) == 1:
            return one[0], None
        raise ValueError(f"a row of {len(one)} texts; give one or two, or is_split_into_words=True for words")
    return one, None


def parts_of(text: Any, split: Callable[[str], Iterable[str]], added: Callable[[str], int | None]) -> list[Part]:
    """The parts of a text or of the words of one; `split` cuts at added tokens, `added` gives their ids."""
    words = [text] if isinstance(text, str) else text
    if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"a {type(text).__name__} as a text; give a string, a list of strings, or a list of ids")
    found = []
    for word in words:
        start = 0
        for part in split(word):
            found.append(Part(part, added(part), start))
            start += len(part)
    return found


def given_ids(text: Any) -> EncodedText | None:
    """What came as ids already; None for text."""
    if isinstance(text, (list, tuple)) and text and all(isinstance(part, (int, np.integer)) for part in text):
        return without_spans([int(index) for index in text])
    return None


def without_spans(ids: list[int]) -> EncodedText:
    """Ids of which nobody knows the text."""
    return EncodedText(ids, lambda: [NOWHERE] * len(ids))


def encode_parts(codec: Codec, texts: Sequence[list[Part]]) -> list[EncodedText]:
    """Ids of texts; the network is asked once for what is new in all of them."""
    encoded = iter(codec.encode_batch([part.text for parts in texts for part in parts if part.added is None]))
    found = []
    for parts in texts:
        ids = [next(encoded) if part.added is None else [part.added] for part in parts]
        found.append(EncodedText([*chain.from_iterable(ids)], partial(_spans, codec, parts, ids)))
    return found


def _spans(codec: Codec, parts: list[Part], ids: list[list[int]]) -> list[Span]:
    found: list[Span] = []
    for part, own in zip(parts, ids):
        inside = [(0, len(part.text))] if part.added is not None else character_spans(part.text, codec.lengths(own))
        found += [(part.start + first, part.start + last) for first, last in inside]
    return found
