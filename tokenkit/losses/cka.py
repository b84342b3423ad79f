"""Centred kernel alignment of hidden states, blind to rotation and scale: no projector. Kornblith+ 2019, 1905.00414."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenkit.losses import loss
from tokenkit.losses.aligned import Layers
from tokenkit.losses.distances import weighted_sum
from tokenkit.quantities import at_least_float32

SMALLEST = 1e-12  # of a squared length, after scaling to a largest entry of 1


@loss(per="row")
def cka(
    student_states: Float[Tensor, "B T P D"],
    teacher_states: Float[Tensor, "B T P E"],
    student_label_mask: Bool[Tensor, "B T"],
    pair_weights: Float[Tensor, "P"],
    *,
    layers: Layers = "last",
) -> Float[Tensor, "B 1"]:
    """1 - linear CKA over the scored positions of each row, in [0, 1], averaged over the pairs of layers."""
    student, teacher = (_centred(x, student_label_mask) for x in (student_states, teacher_states))
    positions, widths = student.shape[1], student.shape[-1] * teacher.shape[-1]
    if positions**2 < widths:  # the same sums over pairs of positions, not of channels
        own, other = (torch.einsum("btpd,bspd->bpts", x, x) for x in (student, teacher))
        shared = (own * other).sum((-2, -1))
    else:
        own, other = (torch.einsum("btpd,btpe->bpde", x, x) for x in (student, teacher))
        shared = torch.einsum("btpd,btpe->bpde", student, teacher).square().sum((-2, -1))
    lengths = [x.square().sum((-2, -1)).clamp_min(SMALLEST).sqrt() for x in (own, other)]
    return weighted_sum((1 - shared / (lengths[0] * lengths[1])).unsqueeze(1), pair_weights)


def _centred(states: Float[Tensor, "B T P D"], scored: Bool[Tensor, "B T"]) -> Float[Tensor, "B T P D"]:
    """States less their mean over the scored positions, 0 elsewhere, the largest entry of each row and pair at 1."""
    here = scored.view(*scored.shape, 1, 1)
    states = torch.where(here, at_least_float32(states), 0)
    count = here.sum(1, keepdim=True).clamp_min(1)
    states = torch.where(here, states - states.sum(1, keepdim=True) / count, 0)
    # a factor changes nothing, and so needs no gradient; squares of squares would leave float32 without it
    largest = states.detach().abs().amax((1, 3), keepdim=True)
    return states / torch.where(largest > 0, largest, 1)
