"""Learned accuracy of an auto-encoder on held-out chunks: network and quantiser alone, no table and no escape."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F

from tokenkit.data.chunk_batches import inclusion
from tokenkit.data.chunks import ChunkTable
from tokenkit.tokenizers.autoencoder.network import END, AutoEncoder, scored_positions

BATCH = 2048


@dataclass(frozen=True)
class HeldOut:
    """Chunks to measure on: symbols, how often each occurs, how many chunks each stands for, and whether training has
    seen it."""

    symbols: Int[Tensor, "N T"]
    counts: Float[ndarray, "N"]
    weights: Float[ndarray, "N"]
    seen: Bool[ndarray, "N"]

    @classmethod
    def of(
        cls, held_out: ChunkTable, train: ChunkTable, max_bytes: int, most: int | None = None, seed: int = 0
    ) -> "HeldOut":
        """The chunks of a table, cut to `max_bytes`; at most `most` of them, which stand for the others."""
        table, known = held_out.cut(max_bytes), set(train.cut(max_bytes).chunks)
        rows, weights = inclusion(table, most or len(table), seed)
        part = ChunkTable(tuple(table.chunks[row] for row in rows), table.counts[rows])
        seen = np.array([chunk in known for chunk in part.chunks], np.bool_)
        return cls(part.symbols(max_bytes).long(), part.counts * weights, weights, seen)


@dataclass(frozen=True)
class Answers:
    """What a network makes of chunks, one row each."""

    right_bytes: Float[ndarray, "N"]
    """Bytes that come back, END not among them."""
    num_bytes: Float[ndarray, "N"]
    exact: Bool[ndarray, "N"]
    """All bytes and the END."""
    nats: Float[ndarray, "N"]
    """Cross-entropy of bytes and END, summed."""
    scored: Float[ndarray, "N"]
    digits: Int[ndarray, "N G d"]


@torch.inference_mode()
def answers(network: AutoEncoder, symbols: Int[Tensor, "N T"], kept: int | None = None) -> Answers:
    """Codes and reconstruction of every chunk, from its first `kept` codes, by default from all."""
    device = network.latent.weight.device
    parts = [_part(network, part.to(device), kept) for part in symbols.split(BATCH)]
    return Answers(*(np.concatenate(column) for column in zip(*parts)))


def _part(network: AutoEncoder, symbols: Int[Tensor, "N T"], kept: int | None) -> tuple[ndarray, ...]:
    number = None if kept is None else torch.full((len(symbols),), kept, device=symbols.device)
    logits, _, digits = network(symbols, number)
    scored, inside = scored_positions(symbols), symbols != END
    right = logits.argmax(-1) == symbols
    nats = F.cross_entropy(logits.float().flatten(0, 1), symbols.flatten(), reduction="none").view_as(symbols) * scored
    columns = ((right & inside).sum(1).double(), inside.sum(1).double(), (right | ~scored).all(1))
    columns = (*columns, nats.sum(1).double(), scored.sum(1).double(), digits)
    return tuple(column.cpu().numpy() for column in columns)


def failing(network: AutoEncoder, symbols: Int[Tensor, "N T"], kept: int) -> Bool[ndarray, "N"]:
    """Which chunks do not come back from their first `kept` codes."""
    return ~answers(network, symbols, kept).exact


def measure(network: AutoEncoder, held_out: HeldOut, *, shortest: bool = False) -> dict[str, float]:
    """Learned accuracies by occurrence and by distinct chunk, perplexity per byte, and entropies of the digits.

    `shortest`: exactness of the shortest spelling too.
    """
    found = answers(network, held_out.symbols)
    counts, weights, seen = held_out.counts, held_out.weights, held_out.seen
    nats, scored = (found.nats * counts).sum(), (found.scored * counts).sum()
    entropies = entropy_ratios(found.digits, network.quantizer.levels, weights)
    values = {
        "learned_byte_accuracy": _share(found.right_bytes, counts, found.num_bytes),
        "learned_byte_accuracy_types": _share(found.right_bytes, weights, found.num_bytes),
        "learned_chunk_exact": _share(found.exact, counts),
        "learned_chunk_exact_types": _share(found.exact, weights),
        "learned_chunk_exact_seen": _share(found.exact, weights * seen),
        "learned_chunk_exact_unseen": _share(found.exact, weights * ~seen),
        "seen_share": _share(seen, counts),
        "reconstruction_perplexity": math.exp(min(nats / scored, 700.0)),
        "digit_entropy_min": float(entropies.min()),
        "digit_entropy_mean": float(entropies.mean()),
    }
    if shortest:
        least = answers(network, held_out.symbols, network.config.min_groups)
        values["learned_chunk_exact_shortest"] = _share(least.exact, counts)
    return {name: value for name, value in values.items() if not math.isnan(value)}


def entropy_ratios(
    digits: Int[ndarray, "N G d"], levels: list[int], weights: Float[ndarray, "N"]
) -> Float[ndarray, "G d"]:
    """Entropy of every digit over its maximum, in [0, 1]."""
    found = np.zeros(digits.shape[1:])
    for group in range(digits.shape[1]):
        for place, level in enumerate(levels):
            mass = np.bincount(digits[:, group, place], weights, minlength=level) / weights.sum()
            found[group, place] = -(mass * np.log2(np.where(mass > 0, mass, 1.0))).sum() / math.log2(level)
    return found


def _share(values: ndarray, weights: ndarray, each: ndarray | float = 1.0) -> float:
    """Weighted values over weighted `each`; NaN where there is nothing to divide by."""
    total = (weights * each).sum() if isinstance(each, np.ndarray) else weights.sum() * each
    return float((values * weights).sum() / total) if total else math.nan
