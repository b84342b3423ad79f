"""Tokenizers drawn at random from a corpus, for training what shall work with tokenizers that it has not seen.

After Minixhofer+ 2024, 2405.07883, section 3: the pieces of a Unigram tokenizer are the substrings of words that cover
most bytes, under noise. Real targets are BPE as well, so some are that, learnt from documents that are drawn. Which
one is drawn depends on the seed and the number of the draw alone.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import tokenizers
from jaxtyping import Float64
from numpy import ndarray
from pydantic import Field, model_validator
from tokenizers import decoders, models, pre_tokenizers

from tokenkit.config import Config, UserError
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.pieces import byte_alphabet
from tokenkit.tokenizers.train import SPLIT, train_tokenizer

SPACES = " \n\t"
RUN = 15  # white space of one kind behind one more of any kind: pieces of every Unigram tokenizer
CANDIDATES = 200_000  # substrings of most weight that pieces are drawn from
ALPHABET = byte_alphabet()
ROLES = {"bos": "<|startoftext|>", "eos": "<|endoftext|>", "pad": "<|pad|>"}  # no token plays two
LEAST = len(ROLES) + 256
LARGEST_SPREAD = 4.0  # no vocabulary is larger or smaller than the middle one by more than this factor
NOISE = math.log(1e-5), 4.0  # mean and deviation of the logarithm of the noise on a piece's share
SURE = 1e-12  # share of a piece that the noise took below zero

Kind = Literal["bpe", "unigram"]


class SamplerConfig(Config):
    """Which tokenizers are drawn."""

    kinds: list[Kind] = Field(["bpe", "unigram"], min_length=1)
    """Each is drawn as often as it stands here."""
    vocab_size: int = Field(4096, ge=LEAST)
    """Ids of a tokenizer in the middle, its 256 bytes among them."""
    vocab_spread: float = Field(0.5, ge=0)
    """Deviation of the logarithm of the number of ids."""
    max_piece_bytes: int = Field(16, ge=2)
    """Of Unigram pieces."""
    corpus_bytes: int = Field(8_000_000, ge=1)
    """Text that substrings are counted in, from the beginning of the corpus."""
    bpe_bytes: int = Field(200_000, ge=1)
    """Text that a BPE is learnt from, documents drawn anew for each."""
    emphasis: float = Field(0.2, ge=0, le=1)
    """Largest share of the text at hand in what pieces are learnt from: without any its rare words never are pieces."""

    @model_validator(mode="after")
    def _fits(self) -> "SamplerConfig":
        if self.max_piece_bytes > 64:
            raise UserError(f"max_piece_bytes: {self.max_piece_bytes}, where real tokens are shorter; write 64 or less")
        return self


class TokenizerSampler:
    """Tokenizers by number: the same one for the same corpus, settings, seed and number."""

    def __init__(self, documents: Sequence[str], config: SamplerConfig, *, seed: int = 0):
        self.config, self.seed = config, seed
        self._documents = _first(documents, config.corpus_bytes)
        self._pieces: list[bytes] = []
        if "unigram" in config.kinds:
            weights = _weights(self._documents, config.max_piece_bytes)
            self._total = sum(weights.values())
            ranked = sorted(weights.items(), key=lambda item: (-item[1], item[0]))[:CANDIDATES]
            self._pieces = [piece for piece, _ in ranked]
            self._shares: Float64[ndarray, "C"] = np.array([weight / self._total for _, weight in ranked])
            self._place = {piece: place for place, piece in enumerate(self._pieces)}

    def draw(self, number: int, texts: Sequence[str] = ()) -> HFTokenizer:
        """Tokenizer number so-and-so, for these texts; byte-level, with a token for each role first."""
        rng = np.random.default_rng([self.seed, number])
        kind = self.config.kinds[int(rng.integers(len(self.config.kinds)))]
        size, emphasis = self._size(rng), self.config.emphasis * float(rng.random())
        return self._bpe(rng, size, emphasis, texts) if kind == "bpe" else self._unigram(rng, size, emphasis, texts)

    def _size(self, rng: np.random.Generator) -> int:
        factor = math.exp(self.config.vocab_spread * float(rng.standard_normal()))
        factor = min(max(factor, 1 / LARGEST_SPREAD), LARGEST_SPREAD)
        return max(LEAST, round(self.config.vocab_size * factor))

    def _bpe(self, rng: np.random.Generator, size: int, emphasis: float, texts: Sequence[str]) -> HFTokenizer:
        own = sum(len(text.encode()) for text in texts)
        copies = round(emphasis * self.config.bpe_bytes / own) if own else 0
        taken, left = list(texts) * copies, self.config.bpe_bytes - copies * own
        for i in rng.permutation(len(self._documents)).tolist():
            if left <= 0:
                break
            taken.append(self._documents[i])
            left -= len(taken[-1].encode())
        return train_tokenizer(taken, "bpe", size, ROLES)

    def _unigram(self, rng: np.random.Generator, size: int, emphasis: float, texts: Sequence[str]) -> HFTokenizer:
        noise = math.exp(NOISE[0] + NOISE[1] * float(rng.standard_normal()))
        shares = self._emphasised(texts, emphasis) + noise * rng.standard_normal(len(self._shares))
        runs = _runs()[: size - LEAST]
        chosen = np.argsort(-shares, kind="stable")[: size - LEAST - len(runs)]
        logs = np.log(np.maximum(shares[chosen], SURE))
        floor = float(logs.min(initial=0.0)) - 1.0
        pieces = [*((special, floor) for special in ROLES.values()), *((character, floor) for character in ALPHABET)]
        pieces += [(run, 0.0) for run in runs]
        pieces += [(_in_alphabet(self._pieces[i]), log) for i, log in zip(chosen.tolist(), logs.tolist(), strict=True)]
        backend = tokenizers.Tokenizer(models.Unigram(pieces))
        split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(list(ROLES.values()))
        config = {f"{role}_token": content for role, content in ROLES.items()}
        return HFTokenizer(json.loads(backend.to_str()), config, f"unigram-{len(pieces)}")

    def _emphasised(self, texts: Sequence[str], emphasis: float) -> Float64[ndarray, "C"]:
        """The shares of the pieces in a corpus of which these texts are the wanted part."""
        weights = _weights(texts, self.config.max_piece_bytes)
        own = sum(weights.values())
        if not own:
            return self._shares
        shares = (1 - emphasis) * self._shares
        for piece, weight in weights.items():
            place = self._place.get(piece)
            if place is not None:
                shares[place] += emphasis * weight / own
        return shares


def _first(documents: Sequence[str], size_bytes: int) -> list[str]:
    """Documents from the first, whole ones, until there are so many bytes; at least one."""
    taken, left = [], size_bytes
    for document in documents:
        if left <= 0:
            break
        taken.append(document)
        left -= len(document.encode())
    return taken


def _weights(documents: Sequence[str], longest: int) -> Counter[bytes]:
    """Substrings of words, and the bytes of the documents that each covers."""
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
    words: Counter[str] = Counter()
    for document in documents:
        words.update(word for word, _ in split.pre_tokenize_str(document))
    weights: Counter[bytes] = Counter()
    for word, count in words.items():
        for piece in _substrings(word, longest):
            weights[piece] += count * len(piece)
    return weights


def _substrings(word: str, longest: int) -> Iterator[bytes]:
    """Whole characters of a word, 2 bytes or more, at most one of them white space."""
    spelled = [character.encode() for character in word]
    for start in range(len(spelled)):
        piece, spaces = b"", 0
        for character in spelled[start:]:
            piece += character
            spaces += character.decode() in SPACES
            if len(piece) > longest or spaces > 1:
                break
            if len(piece) > 1:
                yield piece


def _runs() -> list[str]:
    """White space of one kind, up to 15 characters, behind one more of any kind."""
    found = dict.fromkeys(last + one * count for count in range(1, RUN + 1) for one in SPACES for last in SPACES)
    return [_in_alphabet(run.encode()) for run in found]


def _in_alphabet(piece: bytes) -> str:
    return "".join(ALPHABET[byte] for byte in piece)
