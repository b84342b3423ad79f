"""Moments of features, gathered piece by piece, and the linear maps that whiten them. Miles+ 2024, 2403.06213 (VkD).

Everything is float64. Directions that hardly vary, relative to the one that varies most, are dropped and not blown up,
so that features of any scale and any rank whiten alike.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

Kind = Literal["zca", "pca", "cholesky"]
KINDS: dict[str, Kind] = {"whiten_zca": "zca", "whiten_pca": "pca", "whiten_cholesky": "cholesky"}
RELATIVE_EPSILON = 1e-5


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter (sum of squared deviations, a matrix) of rows; on the CPU."""

    count: int
    mean: Float64[Tensor, "D"]
    scatter: Float64[Tensor, "D D"]

    @classmethod
    def empty(cls, width: int) -> "Moments":
        """Of no rows."""
        return cls(0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64))

    @classmethod
    @torch.no_grad()
    def of(cls, states: Float[Tensor, "*B D"], mask: Bool[Tensor, "*B"] | None = None) -> "Moments":
        """Of the positions that count, of any float type."""
        rows = (states.flatten(0, -2) if mask is None else states[mask]).double()
        if not len(rows):
            return cls.empty(states.shape[-1])
        mean = rows.mean(0)
        centred = rows - mean
        return cls(len(rows), mean.cpu(), (centred.T @ centred).cpu())

    def merged(self, other: "Moments") -> "Moments":
        """Of the rows of both, exactly (Chan+ 1979): merging pieces in any order gives what all rows give at once."""
        if not other.count or not self.count:
            return self if self.count else other
        count = self.count + other.count
        shift = other.mean - self.mean
        between = torch.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, self.mean + shift * (other.count / count), self.scatter + other.scatter + between)

    def covariance(self) -> Float64[Tensor, "D D"]:
        """Unbiased; two rows at least."""
        assert self.count > 1, f"{self.count} rows have no covariance"
        return self.scatter / (self.count - 1)


@torch.no_grad()
def whitening_matrix(
    moments: Moments, kind: Kind, *, relative_epsilon: float = RELATIVE_EPSILON, shrinkage: float = 0.0
) -> Float64[Tensor, "D D"]:
    """W such that the rows (x - mean) W have the identity as covariance, on the directions that are kept.

    Kept is what varies more than `relative_epsilon` times the most, and no more directions than rows less one. `zca`:
    the symmetric W, which changes features least. `pca`: the strongest direction first. `cholesky`: upper triangular,
    L⁻ᵀ for a covariance LLᵀ. The last two put zeros into the last columns where directions were dropped. `shrinkage`:
    the share of a multiple of the identity, of the same trace, that is mixed into the covariance first.
    """
    covariance = moments.covariance()
    width = len(covariance)
    scale = covariance.diagonal().mean()
    identity = torch.eye(width, dtype=torch.float64)
    covariance = (1 - shrinkage) * (covariance + covariance.T) / 2 + shrinkage * scale * identity
    values, vectors = torch.linalg.eigh(covariance / torch.where(scale > 0, scale, 1.0))
    values, vectors = values.flip(0), vectors.flip(1)
    rank = int((values > relative_epsilon * values[0]).sum())
    rank = rank if shrinkage else min(rank, moments.count - 1)
    vectors = vectors[:, :rank]
    roots = values[:rank].sqrt()
    unit = vectors / (roots * scale.sqrt())
    if kind == "zca":
        return unit @ vectors.T
    matrix = torch.zeros_like(covariance)
    if kind == "pca":  # an eigenvector has no sign of its own: its largest entry is made positive
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        matrix[:, :rank] = unit * largest.sign()
    else:  # R of the root Λ½Uᵀ = QR is Lᵀ, also where the covariance has no inverse; then L⁻ᵀ = UΛ⁻½Q
        orthogonal, upper = torch.linalg.qr((vectors * roots).T)
        signs = torch.where(upper.diagonal() < 0, -1.0, 1.0)
        matrix[:, :rank] = unit @ (orthogonal * signs)
    return matrix
