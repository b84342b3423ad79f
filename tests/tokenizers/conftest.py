"""One small tokenizer of every supported kind, made on the spot."""

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.pieces import byte_alphabet
from tokenkit.tokenizers.train import train_tokenizer

CORPUS = [
    "The cat sat on the mat, and the other cat sat there too.",
    "Once upon a time there were  two spaces,\n\nthree lines\tand a tab.",
    "été à la crème; Größe über alles; 12 and 345 and 6789!",
    "def f(x):\n    return x + 1  # the end\n",
] * 8
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]}
PROBE_CHARACTERS = "".join(map(chr, range(32, 127))) + "\n\r\tàèéûôë▁"


def sentencepiece_like(normalizer: dict[str, Any] | None, pre_tokenizer: dict[str, Any] | None) -> HFTokenizer:
    """A BPE with byte fallback whose ids begin <unk>, <s>, </s>, 256 bytes, as Llama-2 and Gemma have them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    trained = json.loads(backend.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *trained["vocab"]]
    model = {"type": "BPE", "vocab": {p: i for i, p in enumerate(dict.fromkeys(pieces))}, "merges": trained["merges"]}
    model |= {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    definition = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": pieces[i], **FLAGS} for i in range(3)],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": model,
    }
    return HFTokenizer(definition, ROLES, "sentencepiece-like")


def metaspace(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}


def unigram(pieces: list[str], pre_tokenizer: dict[str, Any] | None) -> HFTokenizer:
    """A Unigram without byte fallback: what it cannot spell is <unk>."""
    head = ["<unk>", "<s>", "</s>"]
    vocabulary = [[piece, -1.0 - index / 100] for index, piece in enumerate(head + pieces)]
    definition = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": head[i], **FLAGS} for i in range(3)],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "Unigram", "vocab": vocabulary, "unk_id": 0, "byte_fallback": False},
    }
    return HFTokenizer(definition, ROLES, "unigram-by-hand")


def byte_level(regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}


KINDS = {
    "byte": ByteTokenizer,
    "bpe": lambda: train_tokenizer(CORPUS, "bpe", 400),
    "unigram": lambda: train_tokenizer(CORPUS, "unigram", 400),
    "unigram-byte-level": lambda: unigram([*sorted(byte_alphabet()), "the", "Ġcat", "Ġthe"], byte_level(True)),
    "unigram-none": lambda: unigram([*PROBE_CHARACTERS, "the", " cat"], None),
    "sp-prepend": lambda: sentencepiece_like(PREPEND, None),
    "sp-replace": lambda: sentencepiece_like(REPLACE, None),
    "sp-first": lambda: sentencepiece_like(None, metaspace("first")),
    "sp-always": lambda: sentencepiece_like(None, metaspace("always")),
    "sp-never": lambda: sentencepiece_like(None, metaspace("never")),
}


@pytest.fixture(scope="session", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


@pytest.fixture(scope="session")
def bpe() -> HFTokenizer:
    return KINDS["bpe"]()
