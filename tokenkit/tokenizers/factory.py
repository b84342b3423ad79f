"""A configuration becomes a tokenizer behind the checklist's interface: plain ids, a boolean for the special tokens."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tokenkit.config import Config, UserError, build
from tokenkit.tokenizers.autoencoder.package import is_package
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.json_config import move, read_values
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.word import CONFIG as WORD_CONFIG
from tokenkit.tokenizers.word import VOCABULARY, WordTokenizer
from tokenkit.tokenizers.word_config import WordConfig

WORD_KEYS = {"vocab_size", "min_frequency", "normalization", "vocab_file"}  # of old files that do not say their type
KINDS = "write word, autoencoder, bytes or hf:FOLDER"


@runtime_checkable
class ChecklistTokenizer(Protocol):
    """What callers of the old tokenizer know of any tokenizer."""

    lossless: bool
    """Whether every text without half surrogate pairs comes back as it was."""

    @property
    def vocab_size(self) -> int:
        """Largest id + 1."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of any ids below `vocab_size`, in any order; UserError for another id."""
        ...

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """The ids of each text."""
        ...

    def decode_batch(self, batch: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """The text of each list of ids."""
        ...

    def get_pad_token(self) -> int | None:
        """The id; None where the tokenizer has no such token."""
        ...

    def get_unk_token(self) -> int | None:
        """The id; None where the tokenizer has no such token."""
        ...

    def get_bos_token(self) -> int | None:
        """The id; None where the tokenizer has no such token."""
        ...

    def get_eos_token(self) -> int | None:
        """The id; None where the tokenizer has no such token."""
        ...

    def is_special(self, index: int) -> bool:
        """Whether an id is that of a special token."""
        ...

    def save(self, folder: Path | str) -> str | None:
        """Writes what `load` reads; the fingerprint, of a tokenizer that has one."""
        ...

    @classmethod
    def load(cls, path: Path | str) -> "ChecklistTokenizer":
        """The tokenizer that `save` wrote."""
        ...


class AdaptedTokenizer:
    """A tokenizer of this package (a Hugging Face one, or the bytes) behind the checklist's interface."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.inner = tokenizer
        self.lossless = tokenizer.lossless
        unknown = tokenizer.config.get("unk_token")
        unknown = unknown.get("content") if isinstance(unknown, dict) else unknown
        self._unknown = None if unknown is None else tokenizer.special_tokens.get(unknown)
        self._literals = {index: literal for literal, index in tokenizer.special_tokens.items()}

    @property
    def vocab_size(self) -> int:
        """Largest id + 1."""
        return self.inner.vocab_size

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, by default between bos and eos, where the tokenizer has them."""
        ids = self.inner.encode(text).ids.tolist()
        return self._framed(ids) if add_special_tokens else ids

    def encode_batch(self, texts: Iterable[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Ids of every text."""
        rows = [encoding.ids.tolist() for encoding in self.inner.encode_batch([*texts])]
        return [self._framed(row) for row in rows] if add_special_tokens else rows

    def _framed(self, ids: list[int]) -> list[int]:
        begin, end = self.inner.bos_id, self.inner.eos_id
        return [*([] if begin is None else [begin]), *ids, *([] if end is None else [end])]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ids, special tokens by their literals or not at all. UserError for an id that there is not."""
        known = [int(index) for index in ids]
        odd = next((index for index in known if not 0 <= index < self.vocab_size), None)
        if odd is not None:
            raise UserError(f"id {odd}: this tokenizer has ids 0 .. {self.vocab_size - 1}")
        if skip_special_tokens:
            return self.inner.decode([index for index in known if index not in self._literals])
        parts = itertools.groupby(known, key=lambda index: self._literals.get(index))
        return "".join(
            self.inner.decode([*run]) if literal is None else literal * len([*run]) for literal, run in parts
        )

    def decode_batch(self, batch: Iterable[Iterable[int]], skip_special_tokens: bool = True) -> list[str]:
        """The text of every row of ids."""
        return [self.decode(ids, skip_special_tokens) for ids in batch]

    def get_pad_token(self) -> int | None:
        """The id of padding."""
        return self.inner.pad_id

    def get_unk_token(self) -> int | None:
        """The id of what has no id."""
        return self._unknown

    def get_bos_token(self) -> int | None:
        """The id that begins a text."""
        return self.inner.bos_id

    def get_eos_token(self) -> int | None:
        """The id that ends a text."""
        return self.inner.eos_id

    def is_special(self, index: int) -> bool:
        """Whether an id is a special token."""
        return index in self._literals

    def save(self, folder: Path | str) -> None:
        """Writes what `AutoTokenizer.from_pretrained(folder)` loads."""
        self.inner.save(Path(folder))

    @classmethod
    def load(cls, path: Path | str) -> "AdaptedTokenizer":
        """The tokenizer of a folder, a tokenizer file or a spec such as `byte`."""
        return cls(load_tokenizer(str(path)))


class OtherConfig(Config):
    """A tokenizer of which there is nothing to configure."""

    tokenizer_type: str
    version: str = "1.0.0"


def create_tokenizer(config: Mapping[str, Any] | Path | str) -> ChecklistTokenizer:
    """The tokenizer of a configuration (a mapping, or a JSON file), or the one that was saved in a folder."""
    if isinstance(config, Mapping):
        return _create({**config})
    path = Path(config)
    if path.is_dir():
        return _load_folder(path)
    values = read_values(path)
    try:
        return _create(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def tokenizer_type(values: Mapping[str, Any]) -> str:
    """The kind of tokenizer that a configuration means; UserError for one that there is not."""
    kind = values.get("tokenizer_type", values.get("type"))
    if kind is None:
        kind = "word" if WORD_KEYS & values.keys() else "autoencoder"
    if kind not in ("word", "autoencoder", "bytes") and not (isinstance(kind, str) and kind.startswith("hf:")):
        raise UserError(f"tokenizer_type: {kind!r} is none; {KINDS}")
    return kind


def _create(values: dict[str, Any]) -> ChecklistTokenizer:
    kind = tokenizer_type(values)
    move(values, "type", "tokenizer_type")
    values["tokenizer_type"] = kind
    if kind == "autoencoder":
        from tokenkit.tokenizers.autoencoder.config import TokenizerConfig
        from tokenkit.tokenizers.autoencoder.tokenizer import AutoEncoderTokenizer

        return AutoEncoderTokenizer(build(TokenizerConfig, values))
    if kind == "word":
        config = build(WordConfig, values)
        return WordTokenizer(config) if config.vocab_file is None else WordTokenizer.read(config.vocab_file, config)
    build(OtherConfig, values)
    return AdaptedTokenizer.load("byte" if kind == "bytes" else kind.removeprefix("hf:"))


def _load_folder(folder: Path) -> ChecklistTokenizer:
    if is_package(folder):
        from tokenkit.tokenizers.autoencoder.tokenizer import AutoEncoderTokenizer

        return AutoEncoderTokenizer.load(folder)
    if (folder / WORD_CONFIG).is_file() and (folder / VOCABULARY).is_file():
        return WordTokenizer.load(folder)
    return AdaptedTokenizer.load(folder)
