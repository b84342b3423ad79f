"""Words of an old tokenizer as pins of a learned one: as they are and after a space, for text has them both ways."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenkit.tokenizers.autoencoder.chunkers import MAX_CHUNK, Chunker
from tokenkit.tokenizers.autoencoder.codec import Codec
from tokenkit.tokenizers.word import FIRST_WORD


@dataclass(frozen=True)
class WordIds:
    """An id of the old tokenizer, and those of the new one that stand for the same; None where it takes several."""

    old: int
    word: str
    bare: int | None
    spaced: int | None


def forced_pins(words: Iterable[str], chunker: Chunker, max_chunk: int = MAX_CHUNK) -> dict[bytes, int]:
    """The pins that make every word one id, where the chunker leaves it whole: string → 0, the count it has by itself.

    A word of more than `max_chunk` bytes, or one that is cut (four digits), has no such pin.
    """
    forms = (form for word in words for form in (word, f" {word}"))
    return {form.encode(): 0 for form in forms if _whole(form, chunker, max_chunk) and len(form.encode()) > 1}


def word_ids(literals: Sequence[str], words: Sequence[str], codec: Codec) -> list[WordIds]:
    """Every id of the old tokenizer with its counterparts. Special tokens keep their numbers."""
    specials = [
        WordIds(index, literal, index if index < codec.layout.first_regular_id else None, None)
        for index, literal in enumerate(literals[:FIRST_WORD])
    ]
    return specials + [
        WordIds(FIRST_WORD + number, word, _one(word, codec), _one(f" {word}", codec))
        for number, word in enumerate(words)
    ]


def _one(form: str, codec: Codec) -> int | None:
    if not _whole(form, codec.chunker, codec.max_chunk):
        return None
    ids = codec.spell(form)
    return ids[0] if len(ids) == 1 else None


def _whole(form: str, chunker: Chunker, max_chunk: int) -> bool:
    return len(form.encode()) <= max_chunk and chunker.split(form) == [form]
