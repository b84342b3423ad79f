"""How strings are spread over the grid: digit entropies, what digits tell of each other, codes that are shared."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

BATCH = 8192
WORST = 50


def code_numbers(digits: Int[ndarray, "N G d"], levels: Sequence[int]) -> Int[ndarray, "N G"]:
    """One integer per code, the first digit the most significant."""
    basis = np.array([math.prod(levels[place + 1 :]) for place in range(len(levels))], np.int64)
    return digits @ basis


def digit_masses(
    digits: Int[ndarray, "N G d"], levels: Sequence[int], weights: Float[ndarray, "N"]
) -> list[list[list[float]]]:
    """Share of the weight on each level, by group and digit."""
    return [
        [
            (np.bincount(digits[:, group, place], weights, minlength=level) / weights.sum()).tolist()
            for place, level in enumerate(levels)
        ]
        for group in range(digits.shape[1])
    ]


def mutual_information(
    digits: Int[ndarray, "N D"], levels: Sequence[int], weights: Float[ndarray, "N"]
) -> Float[ndarray, "D D"]:
    """Bits that each digit tells of each other one; on the diagonal its own entropy. Counted, so never under 0."""
    starts = np.concatenate([[0], np.cumsum(levels)])
    joint = np.zeros((starts[-1], starts[-1]))
    for first in range(0, len(digits), BATCH):
        part = digits[first : first + BATCH]
        seen = np.zeros((len(part), starts[-1]))
        seen[np.arange(len(part))[:, None], part + starts[:-1]] = 1
        joint += (seen * weights[first : first + BATCH, None]).T @ seen
    joint /= weights.sum()
    alone = joint.diagonal()
    expected = np.outer(alone, alone)
    ratio = np.divide(joint, expected, out=np.ones_like(joint), where=joint > 0)
    pieces = joint * np.log2(ratio)
    return np.add.reduceat(np.add.reduceat(pieces, starts[:-1], 0), starts[:-1], 1)


def entropy_bits(rows: Int[ndarray, "N *k"], weights: Float[ndarray, "N"]) -> float:
    """Of the values as they are weighted, jointly over the last axis where there is one."""
    _, place = np.unique(rows, axis=0, return_inverse=True)
    share = np.bincount(place.reshape(-1), weights)
    share = share[share > 0] / weights.sum()
    return float(-(share * np.log2(share)).sum())


@dataclass(frozen=True)
class Collisions:
    """Distinct strings that share a code, or a tuple of codes."""

    strings: int
    codes: int
    histogram: dict[int, int]
    """Number of strings on a code → how many codes have so many."""
    worst: list[tuple[tuple[int, ...], list[int]]]
    """The codes with the most strings, and the rows of these."""

    @property
    def share(self) -> float:
        """Strings beyond the first on their code, over all strings."""
        return 1 - self.codes / max(1, self.strings)


def collisions(codes: Int[ndarray, "N G"], worst: int = WORST) -> Collisions:
    """What distinct strings, one a row, share; of equally shared codes those of the earlier rows come first."""
    unique, place = np.unique(codes, axis=0, return_inverse=True)
    place = place.reshape(-1)
    sizes = np.bincount(place, minlength=len(unique))
    order = np.argsort(place, kind="stable")
    ends = np.cumsum(sizes)
    first = order[ends - sizes] if len(unique) else np.empty(0, np.int64)
    shared = [index for index in np.lexsort((first, -sizes))[:worst] if sizes[index] > 1]
    rows = [order[ends[index] - sizes[index] : ends[index]].tolist() for index in shared]
    numbers = {int(size): int(count) for size, count in enumerate(np.bincount(sizes)) if size and count}
    found = [(tuple(unique[index].tolist()), row) for index, row in zip(shared, rows)]
    return Collisions(len(codes), len(unique), numbers, found)
