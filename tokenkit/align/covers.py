"""What a token rules out: the texts that go on past its end inside a token that begins in it. ALM, 2503.20083, App. F.

The cover of a text s holds every o such that s + o is tokenised with a last token that begins inside s and ends with o:
a model that has seen the tokens of s knows that the text does not go on with o. Here s + o and what comes before its
last token are text, of whole characters; s itself may end inside one.
"""

import functools
import json
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import tokenizers
from jaxtyping import Bool, Int32, Int64
from numpy import ndarray

from tokenkit.align.merges import Followers, merge_tree
from tokenkit.config import UserError
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.pieces import (
    BYTE_FALLBACK,
    Definition,
    byte_alphabet,
    is_byte_level,
    model_type,
    model_vocabulary,
    space_mark,
)
from tokenkit.tokenizers.surgery.bpe import merge_pairs

SHIELD = 1e4  # how far below every other piece a Unigram piece stands that text must not be made of


@dataclass(frozen=True, slots=True)
class Cover:
    """The overhangs of one token, each once, and the token that would have been there instead."""

    overhangs: Int32[ndarray, "N"]
    tokens: Int32[ndarray, "N"]


@runtime_checkable
class Covers(Protocol):
    """The covers of one tokenizer. Can be pickled, for other processes."""

    def of(self, token: int) -> Cover:
        """The cover of one token."""
        ...


@dataclass(frozen=True)
class Words:
    """The tokens of at least two bytes that the model makes of text, in byte order, and their tails as numbers."""

    spelled: list[bytes]
    ids: Int32[ndarray, "W"]
    offsets: Int64[ndarray, "W"]
    tails: Int32[ndarray, "L"]  # at offsets[w] + k: the number of the bytes of word w from k on

    def beginning(self, head: bytes) -> tuple[int, int]:
        """The range of the words that begin with `head` and go on."""
        low = bisect_right(self.spelled, head)
        if low == len(self.spelled) or not self.spelled[low].startswith(head):
            return low, low
        stem = head.rstrip(b"\xff")
        after = stem[:-1] + bytes([stem[-1] + 1]) if stem else None
        return low, bisect_left(self.spelled, after, low) if after else len(self.spelled)

    def overhangs(self, low: int, high: int, num_bytes: int) -> Int32[ndarray, "N"]:
        """Numbers of what words low..high have after their first bytes."""
        return self.tails[self.offsets[low:high] + num_bytes]


class Model:
    """The model of a tokenizer alone: no normalizer, no pre-tokenizer, no added tokens. Bytes go in, ids come out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        definition = _definition(tokenizer)
        self.name, self.spelled = tokenizer.name, tokenizer.token_bytes
        self.model: Definition = {**definition["model"], "type": model_type(definition)}
        for key in ("continuing_subword_prefix", "end_of_word_suffix"):
            if self.model.get(key):
                raise UserError(
                    f"{self.name}: what its tokens spell depends on their place in a word ({key} {self.model[key]!r}), "
                    "so it has no tokenisation bias; use a byte-level BPE, sentencepiece BPE or Unigram tokenizer"
                )
        if self.model["type"] not in ("BPE", "Unigram"):
            raise UserError(f"{self.name}: a {self.model['type']} model has no tokenisation bias; use BPE or Unigram")
        self._alphabet = byte_alphabet() if is_byte_level(definition) else None
        self._mark = space_mark(definition)
        self.vocabulary = model_vocabulary(definition)
        special = tokenizer.special_ids
        if self.model["type"] == "Unigram":
            floor = min((score for _, score in self.model["vocab"]), default=0.0) - SHIELD
            shielded = special | {index for piece, index in self.vocabulary.items() if piece in BYTE_FALLBACK}
            scores = enumerate(self.model["vocab"])
            self.model["vocab"] = [[p, floor if i in shielded else score] for i, (p, score) in scores]
        self.canonical = {
            index
            for piece, index in self.vocabulary.items()
            if index not in special and self.text(self.spelled[index]) == piece
        }

    def text(self, spelled: bytes) -> str | None:
        """Bytes as the model reads them; None where a character is cut, for then they are no text."""
        try:
            text = spelled.decode()
        except UnicodeDecodeError:
            return None
        if self._alphabet is not None:
            return "".join([self._alphabet[byte] for byte in spelled])
        return text.replace(" ", self._mark) if self._mark else text

    @property
    def whole_words(self) -> bool:
        """Whether a text that is a token is that token, whatever the merges say."""
        return bool(self.model.get("ignore_merges"))

    def backend(self, *, whole_words: bool | None = None) -> tokenizers.Tokenizer:
        """The library's tokenizer of this model; `whole_words` overrides the model's own."""
        model = {**self.model, "dropout": None} if self.model["type"] == "BPE" else self.model
        if whole_words is not None and self.model["type"] == "BPE":
            model["ignore_merges"] = whole_words
        return tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))

    def heads(self, token: int) -> Iterator[tuple[int, str]]:
        """Places inside a token before which there is text of whole characters, and that text; never the first."""
        spelled = self.spelled[token]
        for place in range(1, len(spelled)):
            text = self.text(spelled[:place])
            if text is not None:
                yield place, text

    def words(self, number: Callable[[bytes], int], kept: Callable[[int], bool]) -> Words:
        """The canonical tokens of two and more bytes that are kept; `number` gives every tail its number."""
        found = [(self.spelled[i], i) for i in sorted(self.canonical) if len(self.spelled[i]) > 1 and kept(i)]
        found.sort()
        tails = [number(spelled[k:]) if k else -1 for spelled, _ in found for k in range(len(spelled))]
        lengths = np.array([len(spelled) for spelled, _ in found], np.int64)
        ids = np.array([index for _, index in found], np.int32)
        return Words([spelled for spelled, _ in found], ids, np.cumsum(lengths) - lengths, np.array(tails, np.int32))


def _definition(tokenizer: Tokenizer) -> Definition:
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.definition
    if isinstance(tokenizer, ByteTokenizer):
        vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
        model = {"type": "BPE", "vocab": vocabulary, "merges": []}
        return {"model": model, "pre_tokenizer": {"type": "ByteLevel"}}
    raise UserError(f"{tokenizer.name}: its tokenisation bias is not defined; use a tokenizer with a tokenizer.json")


@dataclass
class MergeCovers:
    """Covers of a BPE: what may follow is asked of the merges, nothing is tokenised."""

    spelled: list[bytes]
    words: Words
    followers: Followers
    unreachable: Int32[ndarray, "U"]  # places of the words that stand only where they are the whole text
    offsets: Int64[ndarray, "V"]
    before: Int32[ndarray, "L"]  # at offsets[v] + k: the last token of the first k bytes of token v; -1 for none
    whole_words: bool

    def of(self, token: int) -> Cover:
        """The cover of one token."""
        spelled = self.spelled[token]
        whole = np.zeros(0, np.int32)
        overhangs, tokens = [whole], [whole]
        for place in range(len(spelled)):
            tail = spelled[place:]
            low, high = self.words.beginning(tail)
            last = int(self.before[self.offsets[token] + place]) if place else -1
            if low == high or (place and last < 0):
                continue
            kept = self._may_follow(last, low, high)
            found = self.words.overhangs(low, high, len(tail))
            if place == 0:
                whole = found
            elif self.whole_words:  # what makes a whole word with s is that word and nothing else
                kept &= ~np.isin(found, whole)
            overhangs.append(found[kept])
            tokens.append(self.words.ids[low:high][kept])
        return Cover(np.concatenate(overhangs), np.concatenate(tokens))

    def _may_follow(self, last: int, low: int, high: int) -> Bool[ndarray, "N"]:
        kept = np.ones(high - low, np.bool_)
        if last >= 0 or not self.whole_words:
            kept[_within(self.unreachable, low, high)] = False
        if last >= 0:
            kept[_within(self._ruled_out(last), low, high)] = False
        return kept

    @functools.cached_property
    def _ruled_out(self) -> Callable[[int], Int32[ndarray, "R"]]:
        return functools.lru_cache(maxsize=20_000)(self.followers.ruled_out)

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_ruled_out"}


def _within(places: Int32[ndarray, "R"], low: int, high: int) -> Int32[ndarray, "N"]:
    first, last = np.searchsorted(places, [low, high])
    return places[first:last] - low


class ModelCovers:
    """Covers of any model, by tokenising every candidate: exact, and minutes where `MergeCovers` takes seconds."""

    def __init__(self, model: Model, words: Words) -> None:
        self.model, self.words = model, words

    @functools.cached_property
    def _backend(self) -> tokenizers.Tokenizer:
        return self.model.backend()

    def of(self, token: int) -> Cover:
        """The cover of one token."""
        spelled = self.model.spelled[token]
        found: dict[int, int] = {}
        heads = dict(self.model.heads(token))
        for place in range(len(spelled) - 1, -1, -1):
            tail = spelled[place:]
            low, high = self.words.beginning(tail)
            if low == high or (place and place not in heads):
                continue
            head = self._backend.encode(heads[place]).ids if place else []
            joined = [self.model.text(spelled[:place] + word) for word in self.words.spelled[low:high]]
            whole = [(row, text) for row, text in enumerate(joined) if text is not None]
            encodings = self._backend.encode_batch_fast([text for _, text in whole])
            overhangs = self.words.overhangs(low, high, len(tail)).tolist()
            ids = self.words.ids[low:high].tolist()
            for (row, _), encoding in zip(whole, encodings):
                if encoding.ids == [*head, ids[row]]:
                    found[overhangs[row]] = ids[row]
        return Cover(np.array(list(found), np.int32), np.array(list(found.values()), np.int32))

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_backend"}


def covers(tokenizer: Tokenizer, number: Callable[[bytes], int]) -> Covers:
    """The covers of a tokenizer; `number` gives every byte string the same number on both sides of a pair."""
    model = Model(tokenizer)
    if model.model["type"] != "BPE":
        return ModelCovers(model, model.words(number, lambda index: True))
    size = len(model.spelled)
    tree = merge_tree(model.vocabulary, merge_pairs({"model": model.model}), size)
    reachable = tree.reachable
    words = model.words(number, lambda index: model.whole_words or bool(reachable[index]))
    place = np.full(size, -1, np.int32)
    place[words.ids] = np.arange(len(words.ids), dtype=np.int32)
    unreachable = np.flatnonzero(~reachable[words.ids]).astype(np.int32)
    offsets, before = _last_tokens(model, reachable)
    return MergeCovers(model.spelled, words, Followers(tree, place), unreachable, offsets, before, model.whole_words)


def _last_tokens(model: Model, reachable: Bool[ndarray, "V"]) -> tuple[Int64[ndarray, "V"], Int32[ndarray, "L"]]:
    """The last token of every beginning of every token, tokenised once per distinct text."""
    lengths = np.array([len(spelled) for spelled in model.spelled], np.int64)
    offsets = np.cumsum(lengths) - lengths
    before = np.full(int(lengths.sum()), -1, np.int32)
    rows: dict[str, int] = {}
    places, wanted = [], []
    for token in range(len(model.spelled)):
        for place, text in model.heads(token):
            places.append(offsets[token] + place)
            wanted.append(rows.setdefault(text, len(rows)))
    backend, texts = model.backend(whole_words=False), list(rows)
    last = np.full(len(texts), -1, np.int32)
    for start in range(0, len(texts), 10_000):
        batch = texts[start : start + 10_000]
        for row, encoding in enumerate(backend.encode_batch_fast(batch), start):
            word = model.vocabulary.get(texts[row])
            whole = model.whole_words and word is not None and not reachable[word]
            if encoding.ids and not whole:  # else it is one token that nothing can follow
                last[row] = encoding.ids[-1]
    before[places] = last[wanted]
    return offsets, before
