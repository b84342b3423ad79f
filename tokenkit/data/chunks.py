"""Documents → distinct chunks with counts, split by document; what an auto-encoder of byte strings is trained on."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch import Tensor

from tokenkit.tokenizers.autoencoder.chunkers import DEFAULT, Chunker, cut, escaped, make_chunker, to_bytes
from tokenkit.tokenizers.autoencoder.network import symbols_of


@dataclass(frozen=True)
class ChunkTable:
    """Distinct byte strings and how often each occurs, the most frequent first."""

    chunks: tuple[bytes, ...]
    counts: Int[ndarray, "N"]

    @classmethod
    def of(cls, counts: Mapping[bytes, int]) -> "ChunkTable":
        """The table of counted strings; equal counts give equal tables, in whatever order they were counted."""
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return cls(tuple(chunk for chunk, _ in ordered), np.array([count for _, count in ordered], np.int64))

    def __len__(self) -> int:
        return len(self.chunks)

    def as_dict(self) -> dict[bytes, int]:
        """String → count."""
        return dict(zip(self.chunks, self.counts.tolist()))

    def cut(self, max_bytes: int) -> "ChunkTable":
        """The table of the pieces of at most `max_bytes` bytes that the strings fall into at ends of characters."""
        counts: Counter[bytes] = Counter()
        for chunk, count in zip(self.chunks, self.counts.tolist()):
            for piece in (chunk,) if len(chunk) <= max_bytes else cut(chunk, max_bytes):
                counts[piece] += count
        return ChunkTable.of(counts)

    def symbols(self, max_bytes: int) -> Int[Tensor, "N T"]:
        """Every string as symbols, the rest of its row filled with END; ValueError for a longer one."""
        parts = [symbols_of(self.chunks[i : i + 65536], max_bytes).short() for i in range(0, len(self), 65536)]
        return torch.cat(parts) if parts else torch.empty(0, max_bytes, dtype=torch.short)

    def fingerprint(self) -> str:
        """The same for equal tables, and for them alone."""
        digest = hashlib.sha256(np.array([len(chunk) for chunk in self.chunks], np.int64).tobytes())
        digest.update(b"".join(self.chunks))
        digest.update(self.counts.tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class ChunkCorpus:
    """Chunks to train on and chunks that are held out, of different documents."""

    train: ChunkTable
    held_out: ChunkTable
    chunker: str

    def fingerprint(self) -> str:
        """The same for equal chunks of the same chunker."""
        whole = f"{self.chunker} {self.train.fingerprint()} {self.held_out.fingerprint()}"
        return hashlib.sha256(whole.encode()).hexdigest()[:16]


def count_chunks(texts: Iterable[str], chunker: Chunker) -> Counter[bytes]:
    """How often each chunk occurs in these texts."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(chunker.split(escaped(text)))
    return Counter({to_bytes(chunk): count for chunk, count in counts.items()})


def is_held_out(text: str, share: float, seed: int) -> bool:
    """Whether a document is kept for validation: by what it says, so copies of it never stand on both sides."""
    digest = hashlib.sha256(seed.to_bytes(8, signed=True) + text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def split_documents(texts: Iterable[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """Documents to train on and documents that are held out."""
    sides: tuple[list[str], list[str]] = [], []
    for text in texts:
        sides[is_held_out(text, share, seed)].append(text)
    return sides


class TokenizerDataset:
    """A corpus as shuffled batches of chunks, each occurrence once an epoch."""

    def __init__(
        self, corpus: Sequence[str], chunk_size: int, batch_size: int, *, chunker: str = DEFAULT, seed: int = 0
    ):
        """`corpus` are documents; chunks longer than `chunk_size` bytes are cut at ends of characters."""
        self.corpus, self.chunk_size, self.batch_size = list(corpus), chunk_size, batch_size
        self.chunker, self.seed = chunker, seed
        self.table = ChunkTable.of(count_chunks(self.corpus, make_chunker(chunker))).cut(chunk_size)
        self._order = np.repeat(np.arange(len(self.table)), self.table.counts)
        self._next = self._epoch = 0

    def size(self) -> int:
        """Chunks of an epoch."""
        return len(self._order)

    def __len__(self) -> int:
        return self.size()

    def next_batch(self) -> list[bytes]:
        """The next chunks, fewer at the end of an epoch, and none when it is over."""
        rows = self._order[self._next : self._next + self.batch_size]
        self._next += len(rows)
        return [self.table.chunks[row] for row in rows]

    def shuffle(self) -> None:
        """Begins another epoch in another order; the n-th order depends on the seed and n alone."""
        self._epoch += 1
        rows = np.repeat(np.arange(len(self.table)), self.table.counts)
        self._order = np.random.default_rng([self.seed, self._epoch]).permutation(rows)
        self.reset()

    def reset(self) -> None:
        """Back to the beginning of the epoch."""
        self._next = 0

    def split(self, validation_split: float) -> "tuple[TokenizerDataset, TokenizerDataset]":
        """Two data sets of different documents, to train on and to validate with."""
        sides = split_documents(self.corpus, validation_split, self.seed)
        options = {"chunker": self.chunker, "seed": self.seed}
        train, held_out = (TokenizerDataset(s, self.chunk_size, self.batch_size, **options) for s in sides)
        return train, held_out
