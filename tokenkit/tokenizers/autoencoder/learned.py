"""A learned tokenizer as the rest of the package knows tokenizers: ids with byte spans."""

import functools
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import numpy as np

from tokenkit.config import UserError
from tokenkit.tokenizers.autoencoder.codec import Codec
from tokenkit.tokenizers.autoencoder.package import WEIGHTS, Package, fingerprint_of, load_network
from tokenkit.tokenizers.base import TEXT_SEGMENT, Encoding, framed, utf8
from tokenkit.tokenizers.hf import HFTokenizer, TokenizerFiles
from tokenkit.tokenizers.pieces import Definition
from tokenkit.tokenizers.whole_file import write_whole

if TYPE_CHECKING:
    from tokenkit.tokenizers.autoencoder.network import AutoEncoder


class LearnedTokenizer:
    """Pins, codes and bytes. A run of codes covers its bytes with its last id; those before it are zero-width."""

    def __init__(self, folder: Path, definition: Definition, config: dict[str, Any] | None, name: str) -> None:
        """`definition` is the tokenizer.json of the folder, maybe with more special tokens behind its last id."""
        self.name, self._folder, self._given = name, folder, config
        self._package = Package.load(folder)
        self.codec: Codec = self._package.codec()
        self._files = TokenizerFiles(definition, config, name)
        self._fingerprint = fingerprint_of(folder)
        files, layout = self._files, self.codec.layout
        self.config, self.added_tokens = files.config, files.added_tokens
        self.bos_id, self.eos_id, self.pad_id = files.bos_id, files.eos_id, files.pad_id
        self.special_ids, self.special_tokens = files.special_ids, files.special_tokens
        if layout.num_codes and files.num_ids > layout.open_base:
            raise UserError(f"{name}: tokens cannot be added behind open codes; use the compact form of the tokenizer")
        self.vocab_size = max(layout.vocab_size, files.num_ids)
        fixed = self.codec.fixed_bytes + [b""] * (files.num_ids - layout.open_base)
        self.token_bytes: Any = OpenTokenBytes(fixed, self.vocab_size) if layout.num_codes else fixed
        self.changes: tuple[str, ...] = ()
        self.lossless = True

    @property
    def definition(self) -> Definition:
        """The tokenizer.json of pins and bytes, parsed."""
        return self._files.definition

    @property
    def chat_template(self) -> str | None:
        """The Jinja template saved with the tokenizer."""
        return self._files.chat_template

    @property
    def fingerprint(self) -> str:
        """sha256 over pins, settings and network, and over the special tokens."""
        return self._fingerprint if self.codec.layout.num_codes else self._files.fingerprint

    @functools.cached_property
    def fixed(self) -> HFTokenizer:
        """Its pins and bytes alone, as a standard tokenizer."""
        return HFTokenizer(self._files.definition, self._files.config, self.name)

    def network(self) -> "AutoEncoder":
        """The auto-encoder that the tokenizer was made with, read anew; UserError where the package has none."""
        return load_network(self._folder, self._package.config)

    def __reduce__(self) -> Any:
        """A copy in another process reads the folder again, and complains if that was changed meanwhile."""
        return (_reloaded, (self._folder, self.definition, self._given, self.name, self._fingerprint))

    def start_id(self) -> int:
        """The id that begins every document: bos, else eos."""
        return self._files.start_id()

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
        self._files.save(folder)
        weights = self._folder / WEIGHTS
        if self._package.network is None and weights.is_file():  # a compact tokenizer has not read them
            write_whole(Path(folder) / WEIGHTS, weights.read_bytes())
        self._package.save(Path(folder))

    def _spanned(self, ids: list[int]) -> Encoding:
        ends = np.cumsum(self.codec.lengths(ids), dtype=np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if len(ids) else ends
        segment = np.full(len(ids), TEXT_SEGMENT, np.int32)
        return Encoding(np.asarray(ids, np.int32), starts, ends, np.zeros(len(ids), np.bool_), segment)


def _reloaded(folder: Path, *arguments: Any) -> LearnedTokenizer:
    *others, fingerprint = arguments
    tokenizer = LearnedTokenizer(folder, *others)
    if tokenizer._fingerprint != fingerprint:
        raise UserError(f"{folder}: another tokenizer than the one that was sent to this process")
    return tokenizer


class OpenTokenBytes(Sequence[bytes]):
    """The bytes of every id, of which millions are codes that spell nothing alone."""

    def __init__(self, fixed: list[bytes], size: int) -> None:
        self._fixed, self._size = fixed, size

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: SupportsIndex) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(self._size))]
        place = operator.index(index)
        place += self._size if place < 0 else 0
        if not 0 <= place < self._size:
            raise IndexError(index)
        return self._fixed[place] if place < len(self._fixed) else b""
