"""A learned tokenizer as the rest of the package knows tokenizers: ids with byte spans."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from tokenkit.config import UserError
from tokenkit.tokenizers.autoencoder.codec import Codec
from tokenkit.tokenizers.autoencoder.package import Package, fingerprint_of
from tokenkit.tokenizers.base import TEXT_SEGMENT, Encoding, framed, utf8
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.pieces import Definition


class LearnedTokenizer:
    """Pins, codes and bytes. A run of codes covers its bytes with its last id; those before it are zero-width."""

    def __init__(self, folder: Path, definition: Definition, config: dict[str, Any] | None, name: str) -> None:
        """`definition` is the tokenizer.json of the folder, maybe with more special tokens behind its last id."""
        self.name, self._folder = name, folder
        self._package = Package.load(folder)
        self.codec: Codec = self._package.codec()
        self._twin = HFTokenizer(definition, config, name)
        self._fingerprint = fingerprint_of(folder)
        self.config, self.added_tokens = self._twin.config, self._twin.added_tokens
        self.bos_id, self.eos_id, self.pad_id = self._twin.bos_id, self._twin.eos_id, self._twin.pad_id
        self.special_ids, self.special_tokens = self._twin.special_ids, self._twin.special_tokens
        layout = self.codec.layout
        if layout.num_codes and self._twin.vocab_size > layout.open_base:
            raise UserError(f"{name}: tokens cannot be added behind open codes; use the compact form of the tokenizer")
        self.vocab_size = max(layout.vocab_size, self._twin.vocab_size)
        self.token_bytes: Any = self._twin.token_bytes
        if layout.num_codes:
            self.token_bytes = OpenTokenBytes(self._twin.token_bytes, self.vocab_size)
        self.changes: tuple[str, ...] = ()
        self.lossless = True

    @property
    def definition(self) -> Definition:
        """The tokenizer.json of pins and bytes, parsed."""
        return self._twin.definition

    @property
    def chat_template(self) -> str | None:
        """The Jinja template saved with the tokenizer."""
        return self._twin.chat_template

    @property
    def fingerprint(self) -> str:
        """sha256 over pins, settings and network, and over the special tokens."""
        return self._fingerprint if self.codec.layout.num_codes else self._twin.fingerprint

    def start_id(self) -> int:
        """The id that begins every document: bos, else eos."""
        return self._twin.start_id()

    def encode(self, text: str, *, special: bool = False) -> Encoding:
        """Ids and byte spans; with `special`, begun by bos."""
        return self.encode_batch([text], special=special)[0]

    def encode_batch(self, texts: list[str], *, special: bool = False, continued: bool = False) -> list[Encoding]:
        """One encoding per text; a continued text is spelled like any other."""
        for text in texts:
            utf8(text, self.name)
        encodings = [self._spanned(ids) for ids in self.codec.encode_batch(texts)]
        return [framed(encoding, self.bos_id) for encoding in encodings] if special else encodings

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids without specials; incomplete characters become U+FFFD."""
        own = self.codec.layout.vocab_size
        return self.codec.decode([index for index in map(int, ids) if not own <= index < self.vocab_size])

    def save(self, folder: Path) -> None:
        """Writes the package, and what `AutoTokenizer.from_pretrained(folder)` loads: pins and bytes."""
        self._twin.save(folder)
        self._package.save(Path(folder))

    def _spanned(self, ids: list[int]) -> Encoding:
        ends = np.cumsum(self.codec.lengths(ids), dtype=np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if len(ids) else ends
        segment = np.full(len(ids), TEXT_SEGMENT, np.int32)
        return Encoding(np.asarray(ids, np.int32), starts, ends, np.zeros(len(ids), np.bool_), segment)


class OpenTokenBytes(Sequence[bytes]):
    """The bytes of every id, of which millions are codes that spell nothing alone."""

    def __init__(self, fixed: list[bytes], size: int) -> None:
        self._fixed, self._size = fixed, size

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(self._size))]
        place = index + self._size if index < 0 else index
        if not 0 <= place < self._size:
            raise IndexError(index)
        return self._fixed[place] if place < len(self._fixed) else b""
