"""How a learned tokenizer uses its ids on counted text: tiers, utilisation, coverage; by corpus and by script."""

import functools
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from tokenkit.data.chunks import ChunkTable, count_chunks
from tokenkit.tokenizers.autoencoder.chunkers import Chunker, to_text
from tokenkit.tokenizers.autoencoder.codec import Codec
from tokenkit.tokenizers.autoencoder.ids import IdLayout

TIERS = ("special", "byte", "pin", "open")
MARKS = (1024, 8192, 32768, 65536)  # sizes at which coverage is told
LETTER_KINDS = ("LETTER", "SYLLABLE", "IDEOGRAPH", "LIGATURE")  # in the names of characters that begin with a script
BATCH = 4096


@dataclass(frozen=True)
class CountedCorpus:
    """A named corpus as its distinct chunks, and how much text it is."""

    name: str
    chunks: Mapping[bytes, int]
    num_bytes: int
    num_characters: int
    num_words: int
    """Between white space."""


def count_corpus(name: str, texts: Iterable[str], chunker: Chunker) -> CountedCorpus:
    """The chunks of texts, their bytes, characters and words."""
    chunks: Counter[bytes] = Counter()
    num_bytes = num_characters = num_words = 0
    for text in texts:
        chunks.update(count_chunks([text], chunker))
        num_bytes += len(text.encode("utf-8", "surrogatepass"))
        num_characters += len(text)
        num_words += len(text.split())
    return CountedCorpus(name, chunks, num_bytes, num_characters, num_words)


@dataclass(frozen=True)
class Spelled:
    """The distinct chunks of some corpora with the ids of each."""

    layout: IdLayout
    corpora: tuple[CountedCorpus, ...]
    table: ChunkTable
    ids: Int[ndarray, "T"]
    """Of all chunks, one after the other."""
    lengths: Int[ndarray, "N"]
    """How many of them each chunk has."""

    def counts_in(self, corpus: CountedCorpus) -> Int[ndarray, "N"]:
        """How often each chunk stands in one corpus."""
        return np.fromiter((corpus.chunks.get(chunk, 0) for chunk in self.table.chunks), np.int64, len(self.table))

    def tiers(self) -> Int[ndarray, "N 4"]:
        """Ids of each chunk by tier, in the order of `TIERS`."""
        starts = [self.layout.byte_base, self.layout.pin_base, self.layout.open_base]
        tier = np.searchsorted(starts, self.ids, side="right")
        chunk = np.repeat(np.arange(len(self.table)), self.lengths)
        return np.bincount(chunk * len(TIERS) + tier, minlength=len(self.table) * len(TIERS)).reshape(-1, len(TIERS))


def spell_corpora(codec: Codec, corpora: Sequence[CountedCorpus]) -> Spelled:
    """Spells every distinct chunk of the corpora once."""
    total: Counter[bytes] = Counter()
    for corpus in corpora:
        total.update(corpus.chunks)
    table = ChunkTable.of(total)
    ids: list[int] = []
    lengths: list[int] = []
    for start in range(0, len(table), BATCH):
        texts = [to_text(chunk) for chunk in table.chunks[start : start + BATCH]]
        codec.encode_chunks(texts)  # asks the network once for all of them
        for text in texts:
            spelled = codec.cache[text]
            ids += spelled
            lengths.append(len(spelled))
    return Spelled(codec.layout, tuple(corpora), table, np.array(ids, np.int64), np.array(lengths, np.int64))


@dataclass(frozen=True)
class Usage:
    """Ids that were used and how often, the most used first."""

    ids: Int[ndarray, "U"]
    counts: Int[ndarray, "U"]
    exposed: int
    """Ids that could be: all but the special ones."""

    @property
    def tokens(self) -> int:
        """Ids in the whole text."""
        return int(self.counts.sum())

    @property
    def entropy_bits(self) -> float:
        """Of the ids as they are used."""
        share = self.counts / max(1, self.tokens)
        return float(-(share * np.log2(share)).sum())

    @property
    def u1(self) -> float:
        """Share of the exposed ids that were used at all."""
        return len(self.ids) / self.exposed

    @property
    def u2(self) -> float:
        """2 to the entropy, over the exposed ids."""
        return 2**self.entropy_bits / self.exposed


def usage_of(spelled: Spelled) -> Usage:
    """The ids of all corpora together."""
    weights = np.repeat(spelled.table.counts, spelled.lengths)
    used, place = np.unique(spelled.ids, return_inverse=True)
    counts = np.bincount(place, weights, minlength=len(used)).astype(np.int64)
    order = np.lexsort((used, -counts))
    return Usage(used[order], counts[order], spelled.layout.vocab_size - spelled.layout.first_regular_id)


def coverage(counts: Int[ndarray, "N"], sizes: Sequence[int] = MARKS) -> dict[int, float]:
    """Share of all uses that falls on so many of the most used, for each size; `counts` fall."""
    course = np.cumsum(counts) / max(1, counts.sum())
    return {size: float(course[min(size, len(course)) - 1]) if len(course) else math.nan for size in sizes}


@dataclass(frozen=True)
class Figures:
    """What some text costs in ids."""

    bytes: int
    chunks: int
    tokens: int
    bytes_per_token: float
    tiers: dict[str, float]
    """Share of the ids, by tier."""
    whole: float
    """Share of the chunks that one id spells."""
    characters_per_token: float | None = None
    tokens_per_word: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def _figures(spelled: Spelled, counts: Int[ndarray, "N"], tiers: Int[ndarray, "N 4"], **more: float) -> Figures:
    tokens = int(counts @ spelled.lengths)
    num_bytes = int(counts @ np.fromiter(map(len, spelled.table.chunks), np.int64, len(counts)))
    chunks = int(counts.sum())
    shares = (counts @ tiers) / max(1, tokens)
    return Figures(
        bytes=num_bytes,
        chunks=chunks,
        tokens=tokens,
        bytes_per_token=num_bytes / max(1, tokens),
        tiers=dict(zip(TIERS, shares.tolist())),
        whole=float(counts[spelled.lengths == 1].sum() / max(1, chunks)),
        **more,
    )


def by_corpus(spelled: Spelled) -> dict[str, Figures]:
    """The figures of each corpus."""
    found, tiers = {}, spelled.tiers()
    for corpus in spelled.corpora:
        counts = spelled.counts_in(corpus)
        tokens = max(1, int(counts @ spelled.lengths))
        more = {
            "characters_per_token": corpus.num_characters / tokens,
            "tokens_per_word": tokens / max(1, corpus.num_words),
        }
        found[corpus.name] = _figures(spelled, counts, tiers, **more)
    return found


def by_script(spelled: Spelled) -> dict[str, Figures]:
    """The figures of each script over all corpora, the one with the most bytes first."""
    names = np.array([script_of(chunk) for chunk in spelled.table.chunks])
    tiers = spelled.tiers()
    found = {str(name): _figures(spelled, spelled.table.counts * (names == name), tiers) for name in np.unique(names)}
    return dict(sorted(found.items(), key=lambda item: -item[1].bytes))


def script_of(chunk: bytes) -> str:
    """The script of a chunk's first letter; digits, marks, white space or bytes (no UTF-8) where it has none."""
    try:
        text = chunk.decode()
    except UnicodeDecodeError:
        return "bytes"
    letter = next(filter(str.isalpha, text), None)
    if letter is not None:
        return _script(letter)
    return "digits" if any(map(str.isdigit, text)) else "marks" if text.strip() else "white space"


@functools.lru_cache(1 << 16)
def _script(letter: str) -> str:
    name = unicodedata.name(letter, "")
    first = name.split(" ")[0]
    if first == "MODIFIER" or not any(kind in name for kind in LETTER_KINDS):
        return "other"
    return first if first == "CJK" else first.capitalize()


def unused_pins(usage: Usage, layout: IdLayout) -> Int[ndarray, "M"]:
    """The pins that no text needed."""
    return np.setdiff1d(np.arange(layout.pin_base, layout.open_base), usage.ids)
