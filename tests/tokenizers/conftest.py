"""One small tokenizer of every supported kind, made on the spot."""

import functools
import importlib.util
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional as F

from tokenkit.config import resolved
from tokenkit.tokenizers.autoencoder.chunkers import DEFAULT, cut, make_chunker, to_bytes
from tokenkit.tokenizers.autoencoder.learned import LearnedTokenizer
from tokenkit.tokenizers.autoencoder.network import AutoEncoder, NetworkConfig, scored_positions, symbols_of
from tokenkit.tokenizers.autoencoder.package import Package, PackageConfig
from tokenkit.tokenizers.autoencoder.pins import PinTable
from tokenkit.tokenizers.autoencoder.selection import select_pins
from tokenkit.tokenizers.autoencoder.tokenizer import save_with_fast
from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.load import load_tokenizer
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


OPEN_STRINGS = ["中", "文", "字", "😀", "👩", "👧", "qzx", "kvjq", "ZQX", "жу", "\0\0\0"]
SCRATCH = tempfile.TemporaryDirectory(prefix="learned-")


@functools.cache
def tiny_network() -> AutoEncoder:
    """An auto-encoder that was taught a handful of strings in two seconds."""
    symbols = symbols_of([text.encode() for text in OPEN_STRINGS], 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoEncoder(NetworkConfig(max_bytes=4, levels=(5, 5, 5), hidden=32, byte_width=8))
        network.scale_latents(symbols)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
        for _ in range(300):
            logits, _, _ = network(symbols, torch.randint(2, 4, (len(symbols),)))
            scored = scored_positions(symbols)
            optimizer.zero_grad()
            F.cross_entropy(logits[scored], symbols[scored]).backward()
            optimizer.step()
    return network.eval().requires_grad_(False)


@functools.cache
def little_pins(chunker: str = DEFAULT, size: int = 200) -> PinTable:
    """Pins of the little corpus."""
    counts = Counter(p for text in CORPUS for c in make_chunker(chunker).split(text) for p in cut(to_bytes(c)))
    return select_pins(counts, size)


def package(kind: str, chunker: str = DEFAULT, **settings: Any) -> Package:
    """A learned tokenizer with the pins of the little corpus; with the tiny network where it is open."""
    network = tiny_network() if kind == "open" else None
    shape = resolved(network.config) if network else None
    config = PackageConfig(kind=kind, chunker=chunker, network=shape, **settings)
    return Package(config, little_pins(chunker), network)


@functools.cache
def learned_folder(kind: str) -> Path:
    """The folder of `package(kind)`; shared, so not to be written to."""
    folder = Path(SCRATCH.name) / kind
    save_with_fast(package(kind), folder)
    return folder


def learned(kind: str) -> LearnedTokenizer:
    return load_tokenizer(str(learned_folder(kind)))


LEARNED = {"learned-compact": lambda: learned("compact"), "learned-open": lambda: learned("open")}
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


@pytest.fixture(scope="session", params=[*KINDS, *LEARNED])
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    """Also those that are more than their tokenizer.json."""
    return (KINDS | LEARNED)[request.param]()


@pytest.fixture(scope="session")
def make_tokenizer() -> Any:
    """The tokenizer of a kind by its name."""
    return functools.cache(lambda kind: KINDS[kind]())


@pytest.fixture(scope="session")
def make_lossy() -> Any:
    """The lossy tokenizer of a kind by its name."""
    return functools.cache(lambda kind: LOSSY[kind]())


@pytest.fixture(scope="session")
def make_package() -> Any:
    """The package of a kind (compact, open) and a chunker."""
    return package


@pytest.fixture(scope="session")
def make_folder() -> Any:
    """The saved folder of a kind, not to be written to."""
    return learned_folder


@pytest.fixture(scope="session")
def bpe() -> HFTokenizer:
    return KINDS["bpe"]()
