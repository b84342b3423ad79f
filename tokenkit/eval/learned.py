"""What network and quantiser alone make of strings: exact or not by length, frequency and script; how near the borders.

No pins and no bytes come to their help here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from tokenkit.data.chunk_batches import inclusion
from tokenkit.data.chunks import ChunkTable
from tokenkit.eval.reconstruction import answers
from tokenkit.tokenizers.autoencoder.network import AutoEncoder, scored_positions, symbols_of

BATCH = 2048
BUCKETS = ((100, "100 or more"), (10, "10–99"), (1, "1–9"), (0, "unseen"))
LOGITS, CELLS = np.linspace(0, 20, 41), np.linspace(0, 1, 41)


@dataclass(frozen=True)
class Look:
    """What a network makes of distinct strings, one a row."""

    strings: tuple[bytes, ...]
    counts: Float[ndarray, "N"]
    """Occurrences that a string stands for."""
    weights: Float[ndarray, "N"]
    """Distinct strings that it stands for."""
    groups: tuple[int, ...]
    """Numbers of codes that were tried."""
    exact: Bool[ndarray, "N K"]
    """Whether a string comes back from so many codes."""
    digits: Int[ndarray, "N G d"]
    logit_margins: Float[ndarray, "N"]
    """Smallest lead of the likeliest symbol over the next, from all codes."""
    cell_margins: Float[ndarray, "N G d"]
    """Distance of each latent coordinate from the nearest other cell, in cell widths."""


def look(network: AutoEncoder, table: ChunkTable, most: int, seed: int = 0) -> Look:
    """Asks the network about at most `most` pieces of at most `max_bytes` bytes of a table, which stand for all."""
    pieces = table.cut(network.max_bytes)
    rows, weights = inclusion(pieces, most, seed)
    part = ChunkTable(tuple(pieces.chunks[row] for row in rows), pieces.counts[rows])
    symbols = part.symbols(network.max_bytes).long()
    groups = tuple(range(network.config.min_groups, network.groups + 1))
    found = [answers(network, symbols, kept) for kept in groups]
    logit_margins, cell_margins = margins(network, symbols)
    exact = np.stack([answer.exact for answer in found], 1)
    counts = part.counts * weights
    return Look(part.chunks, counts, weights, groups, exact, found[-1].digits, logit_margins, cell_margins)


@torch.inference_mode()
def digits_of(network: AutoEncoder, strings: Sequence[bytes]) -> Int[ndarray, "N G d"]:
    """The digits of strings of at most `max_bytes` bytes."""
    device = network.latent.weight.device
    parts = [strings[start : start + BATCH] for start in range(0, len(strings), BATCH)]
    found = [network.digits(symbols_of(part, network.max_bytes).to(device)).cpu().numpy() for part in parts]
    shape = (0, network.groups, network.quantizer.num_dimensions)
    return np.concatenate(found) if found else np.empty(shape, np.int64)


@torch.inference_mode()
def margins(network: AutoEncoder, symbols: Int[Tensor, "N T"]) -> tuple[Float[ndarray, "N"], Float[ndarray, "N G d"]]:
    """Smallest lead of the likeliest symbol at a scored position, and every coordinate's distance from its border."""
    leads, cells = [], []
    for part in symbols.to(network.latent.weight.device).split(BATCH):
        latents = network.latents(part)
        values = network.quantizer.dequantize(network.quantizer.digits(latents))
        best = network.logits(values).topk(2, -1).values
        lead = (best[..., 0] - best[..., 1]).masked_fill(~scored_positions(part), torch.inf)
        leads.append(lead.amin(-1).cpu().numpy())
        cells.append(network.quantizer.margin(latents)[0].cpu().numpy())
    return np.concatenate(leads), np.concatenate(cells)


def by_label(found: Look, labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Per label the number of strings and occurrences, and the share that is exact, by string and by occurrence.

    `exact` and `exact_types` have one share per number of codes.
    """
    names = np.array(labels)
    parts = {str(name): names == name for name in dict.fromkeys(labels)}
    return {name: _shares(found, rows) for name, rows in parts.items()}


def overall(found: Look) -> dict[str, Any]:
    """The same for all strings."""
    return _shares(found, np.ones(len(found.strings), np.bool_))


def _shares(found: Look, rows: Bool[ndarray, "N"]) -> dict[str, Any]:
    counts, weights, exact = found.counts[rows], found.weights[rows], found.exact[rows]
    return {
        "types": round(float(weights.sum())),
        "occurrences": round(float(counts.sum())),
        "exact": {str(kept): float(counts @ exact[:, k] / counts.sum()) for k, kept in enumerate(found.groups)},
        "exact_types": {str(kept): float(weights @ exact[:, k] / weights.sum()) for k, kept in enumerate(found.groups)},
    }


def buckets(strings: Sequence[bytes], counts: Mapping[bytes, int]) -> list[str]:
    """How often training has seen each string: one of the names of `BUCKETS`."""
    return [next(name for least, name in BUCKETS if counts.get(string, 0) >= least) for string in strings]


def histogram(values: Float[ndarray, "*n"], weights: Float[ndarray, "*n"], edges: Float[ndarray, "E"]) -> list[float]:
    """Weight between the edges; what lies beyond the last is in the last."""
    inside = np.clip(values, edges[0], edges[-1])
    return np.histogram(inside, edges, weights=weights)[0].tolist()
