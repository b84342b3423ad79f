"""Tokenizers of one's own: `Endings`, by a rule in Python, and `numbers_apart`, written by code, loaded by anybody."""

import re

from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.own import OwnTokenizer
from tokenkit.tokenizers.pieces import byte_alphabet

ENDINGS = ("ing", "ed", "ly", "ness", "s")
STEMS = ("walk", "talk", "kind", "quick", "the", "and", "a")


class Endings(OwnTokenizer):
    """English words cut before their ending; what the tables lack is bytes."""

    def __init__(self) -> None:
        words = [f"{space}{word}".encode() for word in STEMS for space in ("", " ")]
        known = [*(bytes([byte]) for byte in range(256)), *words, *(ending.encode() for ending in ENDINGS)]
        super().__init__(known, bos="<s>", eos="</s>")
        self.number = {token: index for index, token in enumerate(known)}

    def pieces(self, text: str) -> list[int]:
        """A stem and its ending where both are in the tables, else the bytes of the word."""
        found: list[int] = []
        for word in re.findall(r" ?\w+|[\s\S]", text):
            stem, ending = re.fullmatch(rf"([\s\S]*?)({'|'.join(ENDINGS)})?", word).groups("")
            parts = [part.encode() for part in (stem, ending) if part]
            known = all(part in self.number for part in parts)
            found += [self.number[part] for part in parts] if known else word.encode()
        return found


def numbers_apart() -> HFTokenizer:
    """A byte-level BPE with two merges that never joins digits: a tokenizer.json, put together by code."""
    letters = byte_alphabet()
    vocabulary = {piece: index for index, piece in enumerate([*letters, "th", "the"])}
    digits = {"type": "Digits", "individual_digits": True}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    definition = {
        "version": "1.0",
        "added_tokens": [{"id": len(vocabulary), "content": "<|end|>", **flags}],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, to_bytes]},
        "post_processor": None,
        "decoder": to_bytes,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": ["t h", "th e"]},
    }
    return HFTokenizer(definition, {"bos_token": "<|end|>", "eos_token": "<|end|>"}, "numbers-apart")
