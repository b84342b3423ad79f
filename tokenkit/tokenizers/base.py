"""A tokenisation is ids and the half-open byte spans they cover in the UTF-8 text: the coordinate everybody shares."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32, Int64
from numpy import ndarray

from tokenkit.config import UserError


@dataclass(frozen=True, slots=True)
class Encoding:
    """Ids with byte spans. A special token is zero-width; so is a dummy prefix, which stands for no byte of the text.

    `segment` numbers the parts of a rendered text (template piece, text piece, ...) and never decreases: tokens are
    aligned inside a segment only. Text that was not rendered is one segment, framed by special tokens in segments of
    their own.
    """

    ids: Int32[ndarray, "T"]
    starts: Int64[ndarray, "T"]
    ends: Int64[ndarray, "T"]
    special: Bool[ndarray, "T"]
    segment: Int32[ndarray, "T"]

    def __len__(self) -> int:
        return len(self.ids)


TEXT_SEGMENT = 1  # begin-of-text tokens are segment 0, the text 1, end-of-text tokens 2


def framed(encoding: Encoding, begin: int | None = None, end: int | None = None) -> Encoding:
    """The encoding with one special token before and one after it, zero-width, each in a segment of its own."""
    head, tail = [i for i in (begin,) if i is not None], [i for i in (end,) if i is not None]
    length = int(encoding.ends[-1]) if len(encoding) else 0

    def wrap(left: int, middle: ndarray, right: int) -> ndarray:
        parts = [np.full(len(head), left, middle.dtype), middle, np.full(len(tail), right, middle.dtype)]
        return np.concatenate(parts)

    ids = np.concatenate([np.array(head, np.int32), encoding.ids, np.array(tail, np.int32)])
    return Encoding(
        ids,
        wrap(0, encoding.starts, length),
        wrap(0, encoding.ends, length),
        wrap(1, encoding.special, 1),
        wrap(TEXT_SEGMENT - 1, encoding.segment, TEXT_SEGMENT + 1),
    )


def utf8(text: str, name: str) -> bytes:
    """The bytes of a text; UserError where half a surrogate pair stands in it, which no UTF-8 text holds."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name}: half a surrogate pair, {text[error.start]!r}, at character {error.start} of a text; "
            "read the text as UTF-8, or write U+FFFD in its place"
        ) from None


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the package knows of a tokenizer."""

    name: str  # for people: the folder, hub id or kind it came from
    vocab_size: int  # largest id + 1
    special_tokens: dict[str, int]  # literal of every special token
    token_bytes: list[bytes]  # one entry per id; b"" for special tokens and for holes in the id range
    special_ids: frozenset[int]
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    config: dict[str, Any]  # tokenizer_config.json, parsed
    added_tokens: list[dict[str, Any]]  # those of tokenizer.json, with their flags

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of conversations; None where the tokenizer came without one."""
        ...

    changes: tuple[str, ...]  # in words, what it does not keep of ordinary text; () where it keeps every byte

    @property
    def lossless(self) -> bool:
        """Whether the tokens spell ordinary text as it was written, up to Unicode normalisation."""
        ...

    @property
    def fingerprint(self) -> str:
        """sha256 over everything that decides ids; equal fingerprints give equal ids."""
        ...

    def start_id(self) -> int:
        """The id that begins every document: bos, else eos. UserError where the tokenizer has neither."""
        ...

    def encode(self, text: str, *, special: bool = False) -> Encoding:
        """Ids and byte spans of a text; `special` frames it as a document."""
        ...

    def encode_batch(self, texts: list[str], *, special: bool = False, continued: bool = False) -> list[Encoding]:
        """One encoding per text. `continued` texts stand after a special token, not at the beginning of a document."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text that ids spell; special tokens spell nothing."""
        ...

    def save(self, folder: Path) -> None:
        """Writes what `AutoTokenizer.from_pretrained(folder)` loads."""
        ...


def require_lossless(tokenizer: Tokenizer, use: str) -> None:
    """UserError where the text cannot be had back from the tokens; `use` says what needs that."""
    if not tokenizer.lossless:
        raise UserError(
            f"{tokenizer.name}: this tokenizer {' and '.join(tokenizer.changes)}, so it cannot be {use}; "
            "use one that keeps case, accents and white space"
        )
