"""(seed, step) → chunks to reconstruct: rare ones often, some corrupted, some invented, failing ones more often."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from pydantic import Field
from torch import Tensor

from tokenkit.config import Config, UserError
from tokenkit.data.batch import NO_LABEL, Batch, parts_of
from tokenkit.data.chunks import ChunkTable
from tokenkit.tokenizers.autoencoder.network import END, NetworkConfig, scored_positions

LETTERS = bytes(range(65, 91)) + bytes(range(97, 123))
DIGITS, MARKS = bytes(range(48, 58)), bytes(c for c in range(33, 127) if not chr(c).isalnum())
INVENTED = (  # what numbers, symbols and identifiers are made of, and the most bytes of one
    (DIGITS, 3),
    (MARKS, 64),
    (LETTERS + DIGITS + b"_", 64),
    (DIGITS + b"abcdefABCDEF", 64),
)


class DrawConfig(Config):
    """How the chunks of a batch are drawn."""

    exponent: float = Field(0.5, ge=0, le=1)
    """A chunk is drawn in proportion to its count to this power: 1 is as in the text, 0 all alike."""
    corrupted: float = Field(0.1, ge=0, le=1)
    """Share of the drawn chunks in which bytes are replaced, which teaches to copy anything."""
    substituted: float = Field(0.3, ge=0, le=1)
    """Share of the bytes of such a chunk; by printable ones in half of them, in the others by any."""
    invented: float = Field(0.03, ge=0, le=1)
    """Share of the batch that is made of digits, of symbols or like identifiers, which prose lacks."""
    mine_every: int = Field(500, ge=1)
    """From half of the run on, steps between searches for chunks that the network gets wrong."""
    mined_weight: float = Field(3.0, ge=1)
    """How much more often these are drawn; 1: no search."""
    mined_sample: int = Field(32768, ge=1)
    """Chunks that a search looks at, beside those that failed in the one before."""


class ChunkBatches:
    """Batches of chunks as functions of (seed, step) and of the chunks that failed last."""

    def __init__(self, table: ChunkTable, network: NetworkConfig, draw: DrawConfig, *, batch_size: int, seed: int):
        if not len(table):
            raise UserError("data: no chunk to train on; give more text")
        self.table, self.network, self.draw = table, network, draw
        self.batch_size, self.seed = batch_size, seed
        self.symbols = table.symbols(network.max_bytes).numpy()
        self.lengths = (self.symbols != END).sum(1)
        self.weights = table.counts.astype(np.float64) ** draw.exponent
        self.failing: Int[ndarray, "F"] = np.empty(0, np.int64)
        self._course = np.cumsum(self.weights)

    def rows(self, step: int) -> Int[ndarray, "B"]:
        """Which chunks of the table a step draws."""
        return self._drawn(np.random.default_rng([self.seed, step]))

    def at(self, step: int, num_microbatches: int = 1, rank: int = 0, ranks: int = 1) -> list[Batch]:
        """The microbatches of a step, together always the same chunks."""
        rng = np.random.default_rng([self.seed, step])
        rows = self._drawn(rng)
        symbols = self.symbols[rows].astype(np.int64)
        self._corrupt(symbols, self.lengths[rows], rng)
        number = rng.binomial(self.batch_size, self.draw.invented)
        if number:
            symbols[:number] = invented(rng, number, self.network.max_bytes)
        kept = rng.integers(self.network.min_groups, self.network.groups + 1, self.batch_size)
        parts = parts_of(self.batch_size, num_microbatches, rank, ranks)
        return [_batch(symbols[part], kept[part], rows[part]) for part in parts]

    def place(self, step: int) -> str:
        """The first chunks of a step, as they stand in the text."""
        return "chunks " + ", ".join(repr(self.table.chunks[row]) for row in self.rows(step)[:4]) + ", …"

    def candidates(self, step: int) -> Int[ndarray, "M"]:
        """The chunks that a search after a step looks at: a sample, and those that failed before."""
        if len(self.table) <= self.draw.mined_sample:
            return np.arange(len(self.table))
        rng = np.random.default_rng([self.seed, step, 1])
        sample = rng.choice(len(self.table), self.draw.mined_sample, replace=False)
        return np.union1d(sample, self.failing)

    def mine(self, failing: Int[ndarray, "F"]) -> None:
        """Draws these chunks more often from now on, and those before as others are."""
        self.failing = np.sort(failing).astype(np.int64)
        weights = self.weights.copy()
        weights[self.failing] *= self.draw.mined_weight
        self._course = np.cumsum(weights)

    def state(self) -> dict[str, Tensor]:
        """The chunks that failed last."""
        return {"failing": torch.from_numpy(self.failing)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `state` gave."""
        self.mine(tensors["failing"].numpy())

    def _drawn(self, rng: np.random.Generator) -> Int[ndarray, "B"]:
        places = rng.random(self.batch_size) * self._course[-1]
        return np.minimum(np.searchsorted(self._course, places, side="right"), len(self.table) - 1)

    def _corrupt(self, symbols: Int[ndarray, "B T"], lengths: Int[ndarray, "B"], rng: np.random.Generator) -> None:
        chosen = np.flatnonzero(rng.random(len(symbols)) < self.draw.corrupted)
        shape = (len(chosen), symbols.shape[1])
        printable = rng.random((len(chosen), 1)) < 0.5
        others = np.where(printable, rng.integers(32, 127, shape), rng.integers(0, 256, shape))
        replaced = rng.random(shape) < self.draw.substituted
        replaced &= np.arange(symbols.shape[1]) < lengths[chosen, None]
        symbols[chosen] = np.where(replaced, others, symbols[chosen])


def invented(rng: np.random.Generator, number: int, max_bytes: int) -> Int[ndarray, "B T"]:
    """Symbols of chunks that look like numbers, runs of symbols and identifiers, half of them after a space."""
    alphabets = np.zeros((len(INVENTED), max(len(a) for a, _ in INVENTED)), np.int64)
    for row, (alphabet, _) in enumerate(INVENTED):
        alphabets[row, : len(alphabet)] = list(alphabet)
    kind = rng.integers(0, len(INVENTED), number)
    sizes = np.array([len(alphabet) for alphabet, _ in INVENTED])[kind]
    spaced = (rng.random(number) < 0.5) & (max_bytes > 1)
    longest = np.minimum(np.array([most for _, most in INVENTED])[kind] + spaced, max_bytes)
    lengths = rng.integers(1 + spaced, longest + 1)
    picked = (rng.random((number, max_bytes)) * sizes[:, None]).astype(np.int64)
    symbols = alphabets[kind[:, None], picked]
    symbols[spaced, 0] = 32
    return np.where(np.arange(max_bytes) < lengths[:, None], symbols, END)


def _batch(symbols: Int[ndarray, "B T"], kept: Int[ndarray, "B"], rows: Int[ndarray, "B"]) -> Batch:
    inputs = torch.from_numpy(symbols)
    scored: Bool[Tensor, "B T"] = scored_positions(inputs)
    tensors = {"symbols": inputs, "kept": torch.from_numpy(kept)}
    tensors["student_byte_labels"] = inputs.masked_fill(~scored, NO_LABEL)
    return Batch(tensors, rows.tolist(), int((symbols != END).sum()), int(scored.sum()))


def inclusion(table: ChunkTable, most: int, seed: int) -> tuple[Int[ndarray, "M"], Float[ndarray, "M"]]:
    """Rows of at most `most` chunks that stand for a whole table, and how many chunks each stands for.

    Half are the most frequent, which stand for themselves; the others are drawn from the rest.
    """
    if len(table) <= most:
        return np.arange(len(table)), np.ones(len(table))
    sure = most // 2
    rest = np.random.default_rng([seed, 2]).choice(np.arange(sure, len(table)), most - sure, replace=False)
    weights = np.concatenate([np.ones(sure), np.full(most - sure, (len(table) - sure) / (most - sure))])
    return np.concatenate([np.arange(sure), np.sort(rest)]), weights
