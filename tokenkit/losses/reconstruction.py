"""What an auto-encoder of byte strings learns: to say its input again, from latents that use every level.

Beyond its bound the straight-through gradient of a rounded coordinate is nearly zero; and left alone, coordinates crowd
on some levels.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from tokenkit.losses import loss


def _scored(student_byte_labels: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Every byte of a string and, where there is room, the END after them."""
    return student_byte_labels >= 0


@loss(per="token", units=_scored)
def reconstruction(
    student_byte_logits: Float[Tensor, "B T N"], student_byte_labels: Int[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Cross-entropy of the byte or END at every position, in nats."""
    scored = student_byte_labels >= 0
    logp = torch.where(scored.unsqueeze(-1), student_byte_logits, 0.0).log_softmax(-1)
    picked = logp.gather(-1, student_byte_labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return torch.where(scored, -picked, 0.0)


def _present(student_byte_labels: Int[Tensor, "B T"]) -> Bool[Tensor, "B 1"]:
    """Every string that has a scored position."""
    return (student_byte_labels >= 0).any(1, keepdim=True)


@loss(per="chunk", units=_present)
def saturation(student_latents: Float[Tensor, "B D"], *, bound: float = 4.0) -> Float[Tensor, "B 1"]:
    """Square of what the latent coordinates of a string are beyond the bound, on average; weigh it 1e-4."""
    return F.relu(student_latents.abs() - bound).square().mean(1, keepdim=True)


@loss(per="chunk", units=_present)
def crowded_levels(
    student_cells: Float[Tensor, "B D"], student_level_shares: Float[Tensor, "D N"]
) -> Float[Tensor, "B 1"]:
    """How crowded the levels are that the coordinates of a string are near: 0 on average where all have even shares.

    A share is a level's part of the strings of the steps before, over an even part. Between two levels it is
    interpolated, and so every coordinate is drawn towards the emptier one of its neighbours.
    """
    below = student_cells.detach().floor().clamp(0, student_level_shares.shape[1] - 2)
    rows = torch.arange(len(student_level_shares), device=below.device)
    low, high = (student_level_shares[rows, below.long() + up] for up in (0, 1))
    return (low + (high - low) * (student_cells - below) - 1).mean(1, keepdim=True)
