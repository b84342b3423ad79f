"""Maps from the width of a student's features to that of a teacher's, learnt along: one for each pair of layers.

A map helps where both widths are the same, too: what it learns says which directions matter (2303.11098). Orthogonal
ones: Miles+ 2024, 2403.06213 (VkD). The mean of several: Chen+ 2022, 2210.15274 (PEFD).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenkit.config import UserError
from tokenkit.losses.aligned import Projector
from tokenkit.quantities import at_least_float32

HIDDEN = {"mlp": 64, "mlp_256": 256}


def build_projector(kind: Projector, width: int, target: int, ensemble: Sequence[Projector] = ()) -> nn.Module:
    """A module [..., width] → [..., target], initialised from torch's generator; `miles` is its linear part."""
    if kind == "ensemble":
        return Ensemble(width, target, ensemble)
    if kind == "none":
        if width != target:
            raise UserError(
                f"projector: none compares {width} channels of the student with {target} of the teacher; write "
                "projector: linear"
            )
        return nn.Identity()
    if kind == "orthogonal":
        return Orthogonal(width, target)
    if kind in HIDDEN:
        return nn.Sequential(nn.Linear(width, HIDDEN[kind]), nn.ReLU(), nn.Linear(HIDDEN[kind], target))
    return nn.Linear(width, target)


class Orthogonal(nn.Module):
    """A map that keeps lengths and angles (to a wider space) or forgets whole directions (to a narrower one); no bias.

    Its frame Q [wider, narrower] has orthonormal columns whatever an optimizer does to the parameter: they are the
    first columns of C² for the Cayley transform C = (I - S/4)^-1 (I + S/4) of a skew-symmetric S. Squared, it leaves no
    rotation out; the matrix exponential of the paper, which it approximates, takes several times as long.
    """

    def __init__(self, width: int, target: int):
        super().__init__()
        self.widens = target >= width
        wider, narrower = max(width, target), min(width, target)
        self.skew = nn.Parameter(torch.empty(wider, narrower).normal_(std=0.5 * wider**-0.5))

    def frame(self) -> Float[Tensor, "W N"]:
        """Q, in float32 or better and outside autocast; QᵀQ is the identity to 1e-6."""
        with torch.autocast(self.skew.device.type, enabled=False):
            below = at_least_float32(self.skew).tril(-1)
            wider, narrower = below.shape
            skew = torch.nn.functional.pad(below, (0, wider - narrower))
            quarter = (skew - skew.T) / 4
            identity = torch.eye(wider, dtype=quarter.dtype, device=quarter.device)
            cayley = torch.linalg.solve(identity - quarter, identity + quarter)
            frame = cayley @ cayley[:, :narrower]
            # one Newton-Schulz step squares what rounding left of |QᵀQ - I|, however large the parameter has grown
            return 1.5 * frame - 0.5 * frame @ (frame.T @ frame)

    def forward(self, states: Float[Tensor, "*B D"]) -> Float[Tensor, "*B E"]:
        """states Qᵀ to a wider space, states Q to a narrower one."""
        frame = self.frame()
        return states @ (frame.T if self.widens else frame)


class Ensemble(nn.Module):
    """The mean of several maps, each drawn anew: it varies less from run to run than one of them."""

    def __init__(self, width: int, target: int, members: Sequence[Projector]):
        super().__init__()
        if not members:
            raise UserError("ensemble: empty; name its maps, such as ensemble: [linear, linear, linear]")
        for kind in members:
            if kind in ("miles", "ensemble"):
                raise UserError(f"ensemble: {kind!r} cannot be in one; write none, linear, orthogonal, mlp or mlp_256")
        self.members = nn.ModuleList(build_projector(kind, width, target) for kind in members)

    def forward(self, states: Float[Tensor, "*B D"]) -> Float[Tensor, "*B E"]:
        """The mean of what the members make of the states."""
        return torch.stack([member(states) for member in self.members]).mean(0)
