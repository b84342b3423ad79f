"""The 256 bytes as a tokenizer: id = byte value, then three special tokens."""

from pathlib import Path

import numpy as np

from tokenkit.tokenizers.base import TEXT_SEGMENT, Encoding, framed
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.pieces import Definition, byte_alphabet

SPECIAL_TOKENS = {"bos": "<|bos|>", "eos": "<|eos|>", "pad": "<|pad|>"}


def _definition() -> Definition:
    """A tokenizer.json that gives the same ids: byte-level BPE without merges, the vocabulary in byte order."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 256 + i, "content": text, **flags} for i, text in enumerate(SPECIAL_TOKENS.values())],
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


class ByteTokenizer:
    """Ids 0..255 are the bytes of the text; 256, 257, 258 are bos, eos and pad."""

    def __init__(self) -> None:
        config = {f"{role}_token": content for role, content in SPECIAL_TOKENS.items()}
        self.name = "byte"
        self._twin = HFTokenizer(_definition(), config, self.name)
        self.bos_id: int | None = 256
        self.eos_id: int | None = 257
        self.pad_id: int | None = 258
        self.special_ids = frozenset({256, 257, 258})
        self.special_tokens = self._twin.special_tokens
        self.token_bytes = self._twin.token_bytes
        self.vocab_size = len(self.token_bytes)
        self.chat_template: str | None = None

    @property
    def fingerprint(self) -> str:
        """That of the tokenizer.json that `save` writes."""
        return self._twin.fingerprint

    @property
    def start_id(self) -> int:
        """The id that begins every document: bos."""
        return 256

    def encode(self, text: str, *, special: bool = False) -> Encoding:
        """One id and one span of width 1 per byte; with `special`, begun by bos."""
        ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        starts = np.arange(len(ids), dtype=np.int64)
        segment = np.full(len(ids), TEXT_SEGMENT, np.int32)
        encoding = Encoding(ids, starts, starts + 1, np.zeros(len(ids), np.bool_), segment)
        return framed(encoding, self.bos_id) if special else encoding

    def encode_batch(self, texts: list[str], *, special: bool = False) -> list[Encoding]:
        """One encoding per text."""
        return [self.encode(text, special=special) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """The text of the ids without specials; incomplete characters become U+FFFD."""
        return self._twin.decode(ids)

    def save(self, folder: Path) -> None:
        """Writes a tokenizer.json that `AutoTokenizer.from_pretrained(folder)` loads, with equal ids for any text."""
        self._twin.save(folder)
