"""What puts the features of two models on one scale. Positions outside the mask have no say and come out finite.

All compute in float32 or better. Only batch normalisation looks beyond its own row, at the microbatch that it is given:
cutting a step another way changes it. Whitening knows the teacher from before (`tokenkit/models/statistics.py`).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from tokenkit.config import UserError
from tokenkit.losses.aligned import Norm
from tokenkit.models.whitening import KINDS, Moments, whitening_matrix
from tokenkit.quantities import at_least_float32

AFFINE = ("layernorm", "rmsnorm", "batchnorm")
EPSILON = 1e-5
MOMENTUM = 0.1  # share of a microbatch in the running statistics


def build_norm(kind: Norm, width: int, affine: bool) -> nn.Module:
    """A module (features [B T width], mask [B T]) → features."""
    if affine and kind not in AFFINE:
        raise UserError(f"norm_affine: norm {kind!r} learns no scale; write norm_affine: false, or one of {AFFINE}")
    if kind == "none":
        return Unchanged()
    if kind == "batchnorm":
        return BatchNorm(width, affine)
    if kind == "standardize":
        return Standardize()
    if kind in KINDS:
        return Whitening(width, kind)
    return ChannelNorm(width, affine, centred=kind == "layernorm")


class Unchanged(nn.Module):
    """No norm."""

    def forward(self, states: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """The states."""
        return states


class ChannelNorm(nn.Module):
    """Each position over its own channels: layer norm (`centred`) or root mean square norm."""

    def __init__(self, width: int, affine: bool, *, centred: bool):
        super().__init__()
        self.centred = centred
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine and centred else None

    def forward(self, states: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Mean 0 (if centred) and mean square 1 over the channels of each position."""
        states = at_least_float32(states)
        weight, bias = (None if p is None else p.to(states.dtype) for p in (self.weight, self.bias))
        if self.centred:
            return functional.layer_norm(states, states.shape[-1:], weight, bias, EPSILON)
        return functional.rms_norm(states, states.shape[-1:], weight, EPSILON)


class BatchNorm(nn.Module):
    """Each channel over all positions of the microbatch that count; by running statistics outside training."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, affine: bool, epsilon: float = EPSILON):
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, states: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Mean 0 and variance 1 of every channel, before scale and shift where they are learnt."""
        states = at_least_float32(states)
        mean, variance = self._batch(states, mask) if self.training else (self.running_mean, self.running_var)
        states = (states - mean) * (variance + self.epsilon).rsqrt()
        states = states if self.weight is None else states * self.weight
        return states if self.bias is None else states + self.bias

    def _batch(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        count = mask.sum().to(states.dtype)
        mean, variance = _moments(states, mask, (0, 1))
        mean, variance = mean.flatten(), variance.flatten()
        with torch.no_grad():  # one position says nothing about a variance: nothing is learnt from it
            share = torch.where(count > 1, MOMENTUM, 0.0).to(self.running_mean.dtype)
            unbiased = variance * count / (count - 1).clamp_min(1)
            self.running_mean.lerp_(mean.to(share.dtype), share)
            self.running_var.lerp_(unbiased.to(share.dtype), share)
        return mean, variance


class Standardize(nn.Module):
    """Each channel over the positions of its own row: no row sees another, nothing is remembered."""

    def forward(self, states: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Mean 0 and variance 1 of every channel over the positions of a row that count."""
        states = at_least_float32(states)
        mean, variance = _moments(states, mask, (1,))
        return (states - mean) * (variance + EPSILON).rsqrt()


class Whitening(nn.Module):
    """Uncorrelated channels of variance 1, by moments that were measured before: a constant map, without gradient."""

    mean: Tensor
    matrix: Tensor

    def __init__(self, width: int, kind: Norm):
        super().__init__()
        self.kind = kind
        self.measured = False
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("matrix", torch.zeros(width, width))

    def set_moments(self, moments: Moments) -> None:
        """Whitens by these from now on."""
        matrix = whitening_matrix(moments, KINDS[self.kind])
        self.mean.copy_(moments.mean)
        self.matrix.copy_(matrix)
        self.measured = True

    def forward(self, states: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """(states - mean) W; where fewer directions than channels vary, the others come out 0."""
        if not self.measured:
            raise UserError(f"norm: {self.kind} needs the teacher's statistics (Aligner.set_statistics), and has none")
        states = at_least_float32(states)
        with torch.autocast(states.device.type, enabled=False):
            return (states - self.mean.to(states.dtype)) @ self.matrix.to(states.dtype)


def _moments(states: Tensor, mask: Tensor, over: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of every channel over the positions that count; 0 and 0 where none does."""
    keep = mask.unsqueeze(-1)
    count = keep.sum(over, keepdim=True).clamp_min(1)
    mean = torch.where(keep, states, 0.0).sum(over, keepdim=True) / count
    variance = torch.where(keep, (states - mean).square(), 0.0).sum(over, keepdim=True) / count
    return mean, variance
