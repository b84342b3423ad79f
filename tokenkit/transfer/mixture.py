"""New rows as weighted sums of source rows: what almost every initialiser comes down to, and what an audit looks at.

The weights do not depend on the width of a model or on where its rows lie, so the same mixture makes the input rows,
the output rows and the biases of a model in memory or of one that is streamed.
"""

import hashlib
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Int64, UInt8
from numpy import ndarray
from torch import Tensor

from tokenkit.transfer.plan import TransferPlan
from tokenkit.transfer.rows import Known, Rows
from tokenkit.transfer.specials import Side
from tokenkit.transfer.spelling import Kind


class Origin(IntEnum):
    """What made the row of a target id, in the order in which it is tried."""

    OVERRIDDEN = 0  # by hand
    SPECIAL = 1  # the source's token of the same role or literal
    COPIED = 2  # the source's token of the same bytes
    RULE = 3  # digits or white space: their pieces, whatever the initialiser does with other tokens
    INITIALIZER = 4  # the initialiser that was asked for
    PIECES = 5  # the initialiser knows nothing of it: the mean of the pieces that the source cuts it into
    BYTES = 6  # no text on its own: the mean of the longest source tokens that spell its bytes
    DRAWN = 7  # the source cannot spell its bytes: a random row like the source's
    NO_TOKEN = 8  # no token has this id, or none that text becomes (`<0x41>` beside `A`): the mean source row


OF_KIND = {
    Kind.COPIED: Origin.COPIED,
    Kind.SPECIAL: Origin.SPECIAL,
    Kind.AVERAGED: Origin.PIECES,
    Kind.FALLBACK: Origin.BYTES,
    Kind.DRAWN: Origin.DRAWN,
    Kind.UNREACHABLE: Origin.NO_TOKEN,
    Kind.OVERRIDDEN: Origin.OVERRIDDEN,
}


@dataclass(frozen=True, eq=False)
class Mixture:
    """Row i is the sum of `weights[p] * source[ids[p]]` over p in `offsets[i]:offsets[i + 1]`, and `centre[i]` times
    the mean source row, and `noise[i]` times a normal draw of the source's spread."""

    known: Known
    origin: UInt8[ndarray, "W"]
    offsets: Int64[ndarray, "W+1"]
    ids: Int32[ndarray, "P"]
    weights: Float32[ndarray, "P"]
    centre: Float32[ndarray, "W"]
    noise: Float32[ndarray, "W"]
    seed: int = 0
    spread: Float[Tensor, "D D"] | None = None
    """What a standard normal draw is multiplied with; None: the standard deviation of every dimension."""
    keep_norm: bool = False
    """Give a sum of several rows the weighted mean of their norms: means of unlike rows are shorter than rows are."""

    def __len__(self) -> int:
        return len(self.origin)

    def __call__(self, wanted: Int64[ndarray, "N"]) -> Float[Tensor, "N D"]:
        """The rows of these target ids, in at least float32. A row that is one source row is that row, bit for bit."""
        lengths = np.diff(self.offsets)[wanted]
        flat = ranges(self.offsets[:-1][wanted], lengths)
        distinct, place = np.unique(self.ids[flat], return_inverse=True)
        gathered = self.known.rows.gather(distinct.astype(np.int64))
        device, dtype = gathered.device, gathered.dtype
        parts = gathered[torch.from_numpy(place).to(device)]
        weights = torch.from_numpy(self.weights[flat]).to(device, dtype)
        on = torch.from_numpy(lengths).to(device)
        rows = torch.segment_reduce(parts * weights[:, None], "sum", lengths=on, initial=0)
        if self.keep_norm:
            norms = torch.segment_reduce(parts.norm(dim=1) * weights.abs(), "sum", lengths=on, initial=0)
            scale = norms / rows.norm(dim=1).clamp_min(torch.finfo(dtype).tiny)
            rows = torch.where((on > 1)[:, None], rows * scale[:, None], rows)
        self._add_centre(rows, wanted)
        self._add_noise(rows, wanted)
        return rows

    def _add_centre(self, rows: Tensor, wanted: ndarray) -> None:
        chosen = np.flatnonzero(self.centre[wanted])
        if len(chosen):
            share = torch.from_numpy(self.centre[wanted[chosen]]).to(rows)
            rows[torch.from_numpy(chosen).to(rows.device)] += share[:, None] * self.known.mean.to(rows)

    def _add_noise(self, rows: Tensor, wanted: ndarray) -> None:
        places = np.flatnonzero(self.noise[wanted])
        if len(places):
            width = rows.shape[1]
            draws = torch.stack([normal_draw(self.seed, i, width) for i in wanted[places].tolist()]).to(rows)
            spread = self.spread
            drawn = draws * self.known.deviation.to(rows) if spread is None else draws @ spread.to(rows).T
            noise = torch.from_numpy(self.noise[wanted[places]]).to(rows)
            rows[torch.from_numpy(places).to(rows.device)] += noise[:, None] * drawn

    def over(self, known: Known) -> "Mixture":
        """The same weights over the rows of another matrix."""
        return replace(self, known=known, spread=None)

    def sources(self, i: int) -> list[tuple[int, float]]:
        """Source ids of a row, and their weights."""
        part = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return list(zip(self.ids[part].tolist(), self.weights[part].tolist(), strict=True))

    def replaced(
        self,
        rows: Int64[ndarray, "R"],
        lengths: Int64[ndarray, "R"],
        ids: Int32[ndarray, "Q"],
        weights: Float32[ndarray, "Q"],
        origin: Origin = Origin.INITIALIZER,
    ) -> "Mixture":
        """With other sums for these target ids (ascending), `lengths[r]` source rows each; nothing else is in them."""
        kept = np.ones(len(self), bool)
        kept[rows] = False
        counts = np.diff(self.offsets)
        begin = self.offsets[:-1]
        counts_new = counts.copy()
        counts_new[rows] = lengths
        offsets = np.concatenate([[0], np.cumsum(counts_new)]).astype(np.int64)
        new_ids = np.empty(int(offsets[-1]), np.int32)
        new_weights = np.empty(int(offsets[-1]), np.float32)
        old_places, places = ranges(begin[kept], counts[kept]), ranges(offsets[:-1][kept], counts[kept])
        new_ids[places], new_weights[places] = self.ids[old_places], self.weights[old_places]
        places = ranges(offsets[:-1][rows], lengths)
        new_ids[places], new_weights[places] = ids, weights
        return replace(
            self,
            offsets=offsets,
            ids=new_ids,
            weights=new_weights,
            centre=np.where(kept, self.centre, np.float32(0)),
            noise=np.where(kept, self.noise, np.float32(0)),
            origin=np.where(kept, self.origin, np.uint8(origin)),
        )

    def constant(self, rows: Int64[ndarray, "R"], *, centre: float, noise: float = 0.0) -> "Mixture":
        """With these target ids made of the mean source row and a draw instead."""
        none = np.zeros(0, np.int32)
        made = self.replaced(rows, np.zeros(len(rows), np.int64), none, none.astype(np.float32))
        made.centre[rows], made.noise[rows] = centre, noise
        return made


def pieces_mixture(source: Rows, plan: TransferPlan, side: Side, *, seed: int = 0) -> Mixture:
    """The mean of each token's pieces, and what stands in for it where there are none: the chain alone."""
    counts = plan.lengths
    weights = np.repeat(1 / np.maximum(counts, 1), counts).astype(np.float32)
    empty = (counts == 0).astype(np.float32)
    origin = np.array([OF_KIND[Kind(kind)] for kind in range(len(Kind))], np.uint8)[plan.kinds]
    origin[plan.by_rule & np.isin(origin, (Origin.PIECES, Origin.BYTES))] = Origin.RULE
    noise = (plan.kinds == Kind.DRAWN).astype(np.float32)
    known = Known(source, min(plan.source_vocab, source.shape[0]))
    return Mixture(known, origin, plan.offsets, plan.side(side), weights, empty, noise, seed)


def normal_draw(seed: int, row: int, width: int) -> Float[Tensor, "D"]:
    """A standard normal row that depends on the seed and its id alone, in whichever order rows are made."""
    digest = hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
    return torch.randn(width, generator=generator)


def ranges(begins: Int64[ndarray, "R"], lengths: Int64[ndarray, "R"]) -> Int64[ndarray, "Q"]:
    """The numbers of all half-open ranges, one after the other."""
    if len(lengths) == 0:
        return np.zeros(0, np.int64)
    firsts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(begins - firsts, lengths)
