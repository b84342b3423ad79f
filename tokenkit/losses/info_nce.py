"""Mutual information of states: a position's own counterpart among all of its text. van den Oord+ 2018, 1807.03748."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenkit.losses import loss
from tokenkit.losses.aligned import Ensemble, Layers, Norm, NormSides, Projector
from tokenkit.losses.distances import directions, weighted_sum
from tokenkit.losses.divergences import Temperature
from tokenkit.quantities import at_least_float32


def comparable(student_label_mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Scored positions of rows that have at least two."""
    return student_label_mask & (student_label_mask.sum(1, keepdim=True) >= 2)


@loss(per="token", units=comparable)
def info_nce(
    student_states: Float[Tensor, "B T P D"],
    teacher_states: Float[Tensor, "B T P D"],
    student_label_mask: Bool[Tensor, "B T"],
    pair_weights: Float[Tensor, "P"],
    *,
    temperature: Temperature = 0.1,
    normalize: bool = True,
    symmetric: bool = False,
    layers: Layers = "last",
    projector: Projector = "linear",
    ensemble: Ensemble = ("linear", "linear", "linear"),
    norm: Norm = "none",
    norm_sides: NormSides = "both",
    norm_affine: bool = False,
    norm_first: bool = False,
    include_embeddings: bool = False,
) -> Float[Tensor, "B T"]:
    """-log softmax, at a position's own teacher state, of its similarity with those of all scored positions; in nats.

    Of angles, or of the states as they are without `normalize`. `symmetric` is the mean with that of the teacher's
    state among the student's. Averaged over the pairs of layers.
    """
    student, teacher = student_states.transpose(1, 2), teacher_states.transpose(1, 2)
    scored = student_label_mask.unsqueeze(1).expand(student.shape[:-1])
    values = contrast(student, teacher, scored, temperature, normalize, symmetric)
    return weighted_sum(values.transpose(1, 2), pair_weights)


def contrast(
    a: Float[Tensor, "*B N D"],
    b: Float[Tensor, "*B N D"],
    counted: Bool[Tensor, "*B N"],
    temperature: float = 0.1,
    normalize: bool = True,
    symmetric: bool = False,
) -> Float[Tensor, "*B N"]:
    """-log of the probability of each row of `a` to pick its own among the rows of `b` that count, in nats."""
    here = counted.unsqueeze(-1)
    a, b = (torch.where(here, at_least_float32(x), 0) for x in (a, b))
    if normalize:
        a, b = directions(a), directions(b)
    similarity = a @ b.mT / temperature
    own = torch.eye(similarity.shape[-1], dtype=torch.bool, device=a.device)
    similarity = similarity.masked_fill(~(counted.unsqueeze(-2) & here | own), -torch.inf)
    match = similarity.diagonal(dim1=-2, dim2=-1)
    found = similarity.logsumexp(-1) - match
    return (found + similarity.logsumexp(-2) - match) / 2 if symmetric else found


def information_bound(values: Float[Tensor, "B T"], counted: Bool[Tensor, "B T"]) -> Float[Tensor, "B 1"]:
    """What both sides' states of each row must share at least: log(positions) - mean of the loss, in nats."""
    count = counted.sum(1, keepdim=True).clamp_min(1)
    return count.to(values.dtype).log() - torch.where(counted, values, 0).sum(1, keepdim=True) / count
