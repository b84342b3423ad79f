"""One small tokenizer of every supported kind, made on the spot."""

import functools
import importlib.util
import json
import sys
from pathlib import Path
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


def word_piece() -> HFTokenizer:
    """As BERT has it: lower-cases, strips accents, splits at white space and punctuation."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *letters,
        *(f"##{letter}" for letter in letters),
        *".,:;!?'-#[]<>|/_()+",
    ]
    pieces = [*dict.fromkeys([*pieces, "the", "cat", "##ing", "##s", "中", "文", "é", "##é"])]
    definition = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": pieces[i], **FLAGS} for i in range(4)],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
        },
    }
    return HFTokenizer(definition, {"bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]"}, "word-piece")


def end_of_word() -> HFTokenizer:
    """As CLIP has it: lower-cases, drops white space, and marks the end of every word."""
    trained = train_tokenizer(CORPUS, "bpe", 300).definition
    alphabet = sorted(byte_alphabet())
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "th", "the</w>", "ca", "cat</w>", "<|endoftext|>"]
    merges = ["t h", "th e</w>", "c a", "ca t</w>"]
    model = {"type": "BPE", "vocab": {p: i for i, p in enumerate(pieces)}, "merges": merges, "unk_token": None}
    model |= {"continuing_subword_prefix": "", "end_of_word_suffix": "</w>", "fuse_unk": False}
    words = {
        "type": "Split",
        "pattern": {"Regex": r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"},
        "behavior": "Removed",
        "invert": True,
    }
    lower = [
        {"type": "NFC"},
        {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
        {"type": "Lowercase"},
    ]
    definition = trained | {
        "added_tokens": [{"id": len(pieces) - 1, "content": "<|endoftext|>", **FLAGS}],
        "normalizer": {"type": "Sequence", "normalizers": lower},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, byte_level(False)]},
        "model": model,
    }
    return HFTokenizer(definition, {"eos_token": "<|endoftext|>"}, "end-of-word")


def split_words() -> HFTokenizer:
    """As T5 has it: a dummy space before every word, white space dropped, compatibility characters normalised."""
    split = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace("always")]}
    tokenizer = unigram([*PROBE_CHARACTERS.replace(" ", ""), "▁the", "▁cat", "ing"], split)
    definition = tokenizer.definition | {"normalizer": {"type": "NFKC"}, "decoder": metaspace("always")}
    return HFTokenizer(definition, ROLES, "split-words")


LOSSY = {"word-piece": word_piece, "end-of-word": end_of_word, "split-words": split_words}


@pytest.fixture(scope="session", params=LOSSY)
def lossy(request: pytest.FixtureRequest) -> HFTokenizer:
    return LOSSY[request.param]()


@pytest.fixture(scope="session")
def checker() -> Any:
    """What `benchmarks/byte_view.py` checks of a tokenizer, and the strings that it draws."""
    path = Path(__file__).parents[2] / "benchmarks/byte_view.py"
    spec = importlib.util.spec_from_file_location("byte_view", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["byte_view"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


@pytest.fixture(scope="session")
def make_tokenizer() -> Any:
    """The tokenizer of a kind by its name."""
    return functools.cache(lambda kind: KINDS[kind]())


@pytest.fixture(scope="session")
def make_lossy() -> Any:
    """The lossy tokenizer of a kind by its name."""
    return functools.cache(lambda kind: LOSSY[kind]())


@pytest.fixture(scope="session")
def bpe() -> HFTokenizer:
    return KINDS["bpe"]()
