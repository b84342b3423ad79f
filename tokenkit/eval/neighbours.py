"""What nearness of codes means: nearest strings, edit distance against code distance, the effect of one edit."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from rapidfuzz.distance import Levenshtein

NEAREST = 5
LETTERS = "etaoinshrdlcumwfgypbvk"
PARTS = 10  # bands of code distance in which edit distance is averaged

Encode = Callable[[Sequence[bytes]], Int[ndarray, "N D"]]


@dataclass(frozen=True)
class Neighbour:
    """One string and those whose codes are nearest to its own, with their distances."""

    string: bytes
    nearest: list[tuple[bytes, float]]


@dataclass(frozen=True)
class Neighbourhood:
    """Distances of codes are means over digits of |difference| / (levels - 1): 0 for equal codes, 1 at most."""

    sample: list[Neighbour]
    correlation: float
    """Pearson's, of edit distance (bytes) and code distance, over all pairs of the sample."""
    random_pairs: float
    """Mean code distance of these pairs."""
    one_edit: float | None
    """Mean code distance of a string and itself with one character replaced; None without a network."""
    bands: list[tuple[float, float, int]]
    """Middle of a band of code distances, mean edit distance of the pairs in it, and their number."""


def neighbourhood(
    strings: Sequence[bytes],
    digits: Int[ndarray, "N D"],
    levels: Sequence[int],
    *,
    size: int = 200,
    seed: int = 0,
    encode: Encode | None = None,
) -> Neighbourhood:
    """Of `size` strings drawn from all; `encode` gives the digits of strings that are not among them."""
    rng = np.random.default_rng([seed, 5])
    rows = np.sort(rng.choice(len(strings), min(size, len(strings)), replace=False))
    scaled = (digits / (np.array(levels) - 1)).astype(np.float32)
    sample, between = [], []
    for row in rows:
        away = np.abs(scaled - scaled[row]).mean(1)
        between.append(away[rows])
        away[row] = np.inf
        near = np.argsort(away, kind="stable")[: min(NEAREST, len(strings) - 1)]
        sample.append(Neighbour(strings[row], [(strings[other], float(away[other])) for other in near]))
    pairs = np.triu_indices(len(rows), 1)
    codes = np.array(between)[pairs]
    edits = np.array([Levenshtein.distance(strings[rows[a]], strings[rows[b]]) for a, b in zip(*pairs)], np.int64)
    one_edit = None if encode is None else _one_edit([strings[row] for row in rows], levels, rng, encode)
    random_pairs = float(codes.mean()) if len(codes) else math.nan
    return Neighbourhood(sample, _correlation(codes, edits), random_pairs, one_edit, _bands(codes, edits))


def code_distance(a: Int[ndarray, "N D"], b: Int[ndarray, "N D"], levels: Sequence[int]) -> Float[ndarray, "N"]:
    """Row by row, in [0, 1]."""
    return (np.abs(a - b) / (np.array(levels) - 1)).mean(1)


def replaced(string: bytes, rng: np.random.Generator) -> bytes | None:
    """The string with one of its ASCII letters another one; None where it has none."""
    places = [place for place, byte in enumerate(string) if bytes([byte]).isalpha()]
    if not places:
        return None
    place = places[rng.integers(len(places))]
    others = [letter for letter in LETTERS.encode() if letter != string[place]]
    return string[:place] + bytes([others[rng.integers(len(others))]]) + string[place + 1 :]


def _one_edit(
    strings: Sequence[bytes], levels: Sequence[int], rng: np.random.Generator, encode: Encode
) -> float | None:
    edited = [(string, other) for string in strings if (other := replaced(string, rng)) is not None]
    if not edited:
        return None
    before, after = (encode(side) for side in zip(*edited))
    return float(code_distance(before, after, levels).mean())


def _correlation(codes: ndarray, edits: ndarray) -> float:
    if len(codes) < 2 or codes.std() == 0 or edits.std() == 0:
        return math.nan
    return float(np.corrcoef(codes, edits)[0, 1])


def _bands(codes: ndarray, edits: ndarray) -> list[tuple[float, float, int]]:
    if not len(codes):
        return []
    edges = np.linspace(0, float(codes.max()) or 1.0, PARTS + 1)
    band = np.clip(np.digitize(codes, edges) - 1, 0, PARTS - 1)
    found = []
    for part in range(PARTS):
        inside = band == part
        if inside.any():
            middle = float(edges[part] + edges[part + 1]) / 2
            found.append((middle, float(edits[inside].mean()), int(inside.sum())))
    return found
