"""The 256 bytes as a tokenizer: id = byte value, then special tokens."""

from pathlib import Path
from typing import Any

import numpy as np

from tokenkit.tokenizers.base import TEXT_SEGMENT, Encoding, framed, utf8
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.pieces import Definition, byte_alphabet

ROLE_TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
SPECIALS = tuple(ROLE_TOKENS.values())


def byte_definition(specials: tuple[str, ...] = SPECIALS) -> Definition:
    """A tokenizer.json whose ids are the bytes: byte-level BPE without merges; the special tokens are 256 and on."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 256 + i, "content": text, **flags} for i, text in enumerate(specials)],
        "normalizer": None,
        "pre_tokenizer": step,
        "post_processor": None,
        "decoder": step,
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [],
        },
    }


def is_bytes(definition: Definition) -> bool:
    """Whether a tokenizer.json is that of the bytes, up to its special tokens."""
    found, wanted = {**definition, "post_processor": None}, byte_definition(())
    added = found.pop("added_tokens") or []
    return all(token["special"] for token in added) and found == {k: v for k, v in wanted.items() if k in found}


class ByteTokenizer:
    """Ids 0..255 are the bytes of the text; special tokens follow: bos, eos and pad, or those of a family."""

    def __init__(
        self, definition: Definition | None = None, config: dict[str, Any] | None = None, name: str = "byte"
    ) -> None:
        """`definition` and `config` are those of 256 bytes with other special tokens, as `convert` gives them."""
        self.name = name
        self._twin = HFTokenizer(definition or byte_definition(), dict(ROLE_TOKENS) if config is None else config, name)
        self.config, self.added_tokens = self._twin.config, self._twin.added_tokens
        self.bos_id, self.eos_id, self.pad_id = self._twin.bos_id, self._twin.eos_id, self._twin.pad_id
        self.special_ids = self._twin.special_ids
        self.special_tokens = self._twin.special_tokens
        self.token_bytes = self._twin.token_bytes
        self.vocab_size = len(self.token_bytes)
        self.changes: tuple[str, ...] = ()
        self.lossless = True

    @property
    def definition(self) -> Definition:
        """The tokenizer.json that `save` writes, parsed."""
        return self._twin.definition

    @property
    def chat_template(self) -> str | None:
        """The Jinja template found with the tokenizer."""
        return self._twin.chat_template

    @property
    def fingerprint(self) -> str:
        """That of the tokenizer.json that `save` writes."""
        return self._twin.fingerprint

    def start_id(self) -> int:
        """The id that begins every document: bos, else eos."""
        return self._twin.start_id()

    def encode(self, text: str, *, special: bool = False) -> Encoding:
        """One id and one span of width 1 per byte; with `special`, begun by bos where there is one."""
        ids = np.frombuffer(utf8(text, self.name), np.uint8).astype(np.int32)
        starts = np.arange(len(ids), dtype=np.int64)
        segment = np.full(len(ids), TEXT_SEGMENT, np.int32)
        encoding = Encoding(ids, starts, starts + 1, np.zeros(len(ids), np.bool_), segment)
        return framed(encoding, self.bos_id) if special else encoding

    def encode_batch(self, texts: list[str], *, special: bool = False, continued: bool = False) -> list[Encoding]:
        """One encoding per text; a continued text is spelled like any other."""
        return [self.encode(text, special=special) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """The text of the ids without specials; incomplete characters become U+FFFD."""
        return self._twin.decode(ids)

    def save(self, folder: Path) -> None:
        """Writes a tokenizer.json that `AutoTokenizer.from_pretrained(folder)` loads, with equal ids for any text."""
        self._twin.save(folder)
