"""How far each loss's gradient goes into an update, from the inner products of all of them.

A gradient here is already multiplied with its loss's weight, and is over what several losses train. Every policy
returns a factor per gradient; (1, 1, ...) is the plain sum.
"""

from collections.abc import Callable, Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Gram = NDArray[np.float64]  # K x K: inner products of the gradients of K losses
Policy = Callable[[Gram, int], list[float]]  # and the number of the main loss
NEGLIGIBLE = 1e-12  # of the largest square: what rounding leaves of nothing


def project_aux(gram: Gram, main: int) -> list[float]:
    """Every other gradient without what it has against the main one, which nothing is taken from.

    The factors say the same of the sum: what the others lose is along the main gradient, so its own factor grows.
    """
    against = np.minimum(gram[main], 0.0)
    factors = [1.0] * len(gram)
    if against.any():
        factors[main] = float(1 - against.sum() / gram[main, main])
    return factors


def drop_conflict(gram: Gram, main: int) -> list[float]:
    """Nothing of a gradient that is against the main one."""
    return [float(number == main or product >= 0) for number, product in enumerate(gram[main])]


def min_norm(gram: Gram) -> NDArray[np.float64]:
    """The shares, at least 0 and 1 together, of the shortest mixture of the gradients.

    Sener and Koltun 2018, 1810.04650. For two gradients the closed form; else the best over all subsets, each of which
    has one too.
    """
    if len(gram) == 2:
        (one, both), (_, two) = gram
        apart = one - 2 * both + two
        share = float(np.clip((two - both) / apart, 0, 1)) if apart > 0 else 0.5
        return np.array([share, 1 - share])
    return _best(gram, _flat_point, lambda shares: float(shares @ gram @ shares))


def mgda(gram: Gram, main: int) -> list[float]:
    """The shortest mixture: no loss rises along it, and where it is 0 none can fall without another rising."""
    return min_norm(gram).tolist()


def cagrad(gram: Gram, main: int, *, c: float) -> list[float]:
    """The update that helps the worst-off loss most among those within `c` of the plain sum. Liu+ 2021, 2110.14048."""
    count = len(gram)
    mean = gram.mean(1)  # products with the mean gradient
    length = float(np.sqrt(max(gram.mean(), 0.0)))
    if c == 0 or length == 0:
        return [1.0] * count

    def value(shares: NDArray[np.float64]) -> float:
        return float(shares @ mean + c * length * np.sqrt(max(shares @ gram @ shares, 0.0)))

    def point(part: Gram, chosen: list[int]) -> NDArray[np.float64] | None:
        return _slope_point(part, mean[chosen], c * length)

    shares = min((_best(gram, find, value) for find in (point, _flat_point)), key=value)  # the latter has the kink at 0
    norm = np.sqrt(max(shares @ gram @ shares, 0.0))
    if norm <= np.sqrt(NEGLIGIBLE * gram.max()):  # nothing helps all of them
        return [1.0] * count
    return (1 + count * c * length / norm * shares).tolist()


def _best(
    gram: Gram,
    point: Callable[[Gram, list[int]], NDArray[np.float64] | None],
    value: Callable[[NDArray[np.float64]], float],
) -> NDArray[np.float64]:
    """The least value among the stationary points inside every face of the simplex: that of a convex function on it."""
    best, least = None, np.inf
    for chosen in _subsets(len(gram)):
        inside = np.ones(1) if len(chosen) == 1 else point(gram[np.ix_(chosen, chosen)], chosen)
        if inside is None or (inside < 0).any():
            continue
        shares = np.zeros(len(gram))
        shares[chosen] = inside
        if value(shares) < least:
            best, least = shares, value(shares)
    assert best is not None, "the corners are always there"
    return best


def _subsets(count: int) -> Iterator[list[int]]:
    for size in range(1, count + 1):
        yield from (list(chosen) for chosen in combinations(range(count), size))


def _flat_point(part: Gram, chosen: list[int]) -> NDArray[np.float64] | None:
    """Where the square of the norm is stationary among shares that add up to 1, gradients that cancel out included."""
    count, scale = len(part), max(float(part.max()), np.finfo(np.float64).tiny)
    system = np.ones((count + 1, count + 1))
    system[:count, :count], system[count, count] = part / scale, 0.0
    shares = np.linalg.lstsq(system, np.append(np.zeros(count), 1.0), rcond=NEGLIGIBLE)[0][:count]
    return np.where(np.abs(shares) < NEGLIGIBLE, 0.0, shares)


def _slope_point(part: Gram, mean: NDArray[np.float64], radius: float) -> NDArray[np.float64] | None:
    """Where shares @ mean + radius |mixture| is stationary among shares that add up to 1; None where nowhere.

    There part @ shares = s (l - mean) with s = |mixture| / radius; the sum and the norm give two equations for s and l.
    """
    inverse = np.linalg.pinv(part, rcond=NEGLIGIBLE, hermitian=True)
    ones = np.ones(len(part))
    a, b, d = ones @ inverse @ ones, ones @ inverse @ mean, mean @ inverse @ mean
    root = b * b - a * (d - radius * radius)
    if a <= 0 or root <= 0:
        return None
    level = (b + np.sqrt(root)) / a
    return inverse @ (level - mean) / (level * a - b)
