"""Rows that are the same as others, or nearly, without a comparison of every row with every other in full width.

A projection onto orthonormal directions never lengthens a difference. So rows that lie further apart than allowed in a
few well-chosen directions need not be compared in all of them, and nothing is missed.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor
from torch.nn import functional

from tokenkit.transfer.rows import Rows

DIRECTIONS = 64
BLOCK = 1024  # rows, or pairs of rows, that are compared in full at a time
SLACK = 1e-5  # of a squared distance in float32


@dataclass(frozen=True, eq=False)
class Families:
    """Rows by what they repeat. `leader[i]` is i where row i repeats no earlier row.

    Else it is the first earlier row that repeats none itself and that row i is equal to, or nearly.
    """

    leader: Int64[ndarray, "V"]
    exact: Int64[ndarray, "V"]
    """The first row with the very same bytes."""

    @property
    def repeated(self) -> Int64[ndarray, "N"]:
        """The ids of rows that repeat an earlier one."""
        return np.flatnonzero(self.leader != np.arange(len(self.leader)))

    def sizes(self) -> dict[int, int]:
        """Rows of each family that has several, by its leader; the largest first."""
        ids, counts = np.unique(self.leader, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return {int(ids[i]): int(counts[i]) for i in order if counts[i] > 1}


def find_duplicates(rows: Rows, *, cosine: float = 0.999) -> Families:
    """The families of a matrix: equal rows, and rows whose cosine with a leader is at least `cosine`.

    Rows of zeros and rows that are not finite repeat only rows of the same bytes.
    """
    exact = _exact(rows)
    first = np.flatnonzero(exact == np.arange(len(exact)))
    basis = _basis(rows, first)
    leader = exact.copy()
    leaders = np.zeros(0, np.int64)
    screened = torch.zeros(0, basis.shape[1])
    limit = 2 - 2 * cosine + SLACK
    for ids in _parts(first, BLOCK):
        units = _units(rows, ids)
        projected = units @ basis
        found = _among_leaders(rows, units, projected, leaders, screened, cosine, limit)
        found = _within(units, found, ids, cosine)
        leader[ids] = np.where(found < 0, ids, found)
        new = np.flatnonzero((found < 0) & (units.norm(dim=1) > 0.5).numpy())  # those without a direction lead none
        leaders = np.concatenate([leaders, ids[new]])
        screened = torch.cat([screened, projected[torch.from_numpy(new)]])
    return Families(leader[exact], exact)


def _exact(rows: Rows) -> Int64[ndarray, "V"]:
    """The first row with the same bytes, of each row."""
    size, width = rows.shape
    seen: dict[bytes, int] = {}
    first = np.empty(size, np.int64)
    step = max(1, BLOCK * DIRECTIONS * 16 // width)
    for ids in _parts(np.arange(size), step):
        block = (rows.gather(ids) + 0.0).cpu().numpy()  # -0.0 is 0.0
        for i, row in zip(ids.tolist(), block):
            first[i] = seen.setdefault(hashlib.blake2b(row.tobytes(), digest_size=16).digest(), i)
    return first


def _parts(ids: Int64[ndarray, "N"], size: int) -> Iterator[Int64[ndarray, "M"]]:
    return (ids[begin : begin + size] for begin in range(0, len(ids), size))


def _units(rows: Rows, ids: Int64[ndarray, "N"]) -> Float[Tensor, "N D"]:
    """Rows of length 1; rows of zeros stay, and rows that are not finite become zeros."""
    block = rows.gather(ids).float().cpu()
    block = torch.where(block.isfinite().all(1, keepdim=True), block, 0.0)
    return functional.normalize(block, dim=1)


def _basis(rows: Rows, ids: Int64[ndarray, "N"]) -> Float[Tensor, "D R"]:
    """Orthonormal directions in which the rows of length 1 differ much: random sums of them, made orthogonal."""
    width = rows.shape[1]
    count = min(DIRECTIONS, width)
    generator = torch.Generator().manual_seed(0)
    sums = torch.zeros(width, count)
    for part in _parts(ids, BLOCK):
        sums += _units(rows, part).T @ torch.randn(len(part), count, generator=generator)
    sums += 1e-6 * torch.randn(width, count, generator=generator)  # rows of few dimensions span too little
    return torch.linalg.qr(sums).Q


def _among_leaders(
    rows: Rows,
    units: Float[Tensor, "N D"],
    projected: Float[Tensor, "N R"],
    leaders: Int64[ndarray, "L"],
    screened: Float[Tensor, "L R"],
    cosine: float,
    limit: float,
) -> Int64[ndarray, "N"]:
    """The first leader that each row repeats, or -1."""
    found = np.full(len(units), -1, np.int64)
    squares = projected.square().sum(1, keepdim=True)
    step = 16 * BLOCK
    for begin in range(0, len(leaders), step):
        part = screened[begin : begin + step]
        apart = squares + part.square().sum(1) - 2 * projected @ part.T
        own, other = torch.nonzero(apart <= limit, as_tuple=True)
        for chunk in range(0, len(own), BLOCK):
            mine, theirs = own[chunk : chunk + BLOCK].numpy(), other[chunk : chunk + BLOCK].numpy() + begin
            distinct, place = np.unique(leaders[theirs], return_inverse=True)
            near = (units[mine] * _units(rows, distinct)[place]).sum(1).numpy() >= cosine
            for row, one in zip(mine[near].tolist(), leaders[theirs[near]].tolist()):
                found[row] = one if found[row] < 0 else min(int(found[row]), one)
    return found


def _within(
    units: Float[Tensor, "N D"], found: Int64[ndarray, "N"], ids: Int64[ndarray, "N"], cosine: float
) -> Int64[ndarray, "N"]:
    """The same, where leaders may also lie in the block itself: a row that repeats none leads those behind it."""
    found = found.copy()
    near = torch.triu(units @ units.T >= cosine, diagonal=1).numpy()
    for row in range(len(ids)):
        if found[row] < 0:
            followers = np.flatnonzero(near[row])
            found[followers] = np.where(found[followers] < 0, ids[row], found[followers])
    return found
