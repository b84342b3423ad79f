"""Distances between two vectors per position; used by several losses. No loss stands here."""

from collections.abc import Callable
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Vectors = Float[Tensor, "*N D"]
Numbers = Float[Tensor, "*N"]
Distance = Literal["mse", "cosine", "smooth_l1", "logsum"]
SMALLEST_LENGTH = 1e-8


def cosine_distance(a: Vectors, b: Vectors) -> Numbers:
    """1 - cosine of the angle, in [0, 2]; 1 where a vector has no length."""
    return 1 - (directions(a) * directions(b)).sum(-1)


def directions(vectors: Vectors) -> Vectors:
    """Scaled to length 1; shorter ones than 1e-8 stay short."""
    return functional.normalize(vectors, dim=-1, eps=SMALLEST_LENGTH)


def log_sum(difference: Vectors, alpha: float, delta: float) -> Numbers:
    """log(delta + sum |difference|^alpha)."""
    return (delta + difference.abs().pow(alpha).sum(-1)).log()


def mean_square(a: Vectors, b: Vectors) -> Numbers:
    """Squared difference, averaged over channels."""
    return (a - b).square().mean(-1)


def smooth_l1(a: Vectors, b: Vectors) -> Numbers:
    """Half the squared difference up to 1, from there on the absolute one less 1/2; averaged over channels."""
    return functional.smooth_l1_loss(a, b, reduction="none").mean(-1)


def distance_of(kind: Distance, alpha: float, delta: float) -> Callable[[Vectors, Vectors], Numbers]:
    """The distance of that name; `alpha` and `delta` are of `logsum`."""
    known: dict[str, Callable[[Vectors, Vectors], Numbers]] = {
        "mse": mean_square,
        "cosine": cosine_distance,
        "smooth_l1": smooth_l1,
        "logsum": lambda a, b: log_sum(a - b, alpha, delta),
    }
    return known[kind]


def weighted_sum(values: Float[Tensor, "B T P"], weights: Float[Tensor, "P"]) -> Float[Tensor, "B T"]:
    """The mean over pairs of layers."""
    return (values * weights.to(values.dtype)).sum(-1)
