"""States of layers, position by position: hints. Romero+ 2015, 1412.6550 (FitNets); log-sum, projectors: 2303.11098.

One tokenizer. Which layer learns from which, what maps one width to the other, and on what scale they are compared, is
said by the options of the aligner (docs/objectives.md).
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from tokenkit.losses import loss
from tokenkit.losses.aligned import Ensemble, Layers, Norm, NormSides, Projector
from tokenkit.losses.distances import Distance, distance_of, weighted_sum
from tokenkit.quantities import at_least_float32


@loss(per="token")
def layer_states(
    student_states: Float[Tensor, "B T P D"],
    teacher_states: Float[Tensor, "B T P D"],
    pair_weights: Float[Tensor, "P"],
    *,
    distance: Distance = "mse",
    alpha: float = 4.0,
    delta: float = 1e-6,
    of: Literal["block", "attention", "mlp"] = "block",
    layers: Layers = "last",
    projector: Projector = "linear",
    ensemble: Ensemble = ("linear", "linear", "linear"),
    norm: Norm = "none",
    norm_sides: NormSides = "both",
    norm_affine: bool = False,
    norm_first: bool = False,
    include_embeddings: bool = False,
) -> Float[Tensor, "B T"]:
    """Distance of the aligned states at each position, averaged over the pairs of layers.

    `mse` and `smooth_l1` are means over channels, `cosine` is 1 - cos, `logsum` is log(delta + sum |difference|^alpha).
    """
    student, teacher = at_least_float32(student_states), at_least_float32(teacher_states)
    return weighted_sum(distance_of(distance, alpha, delta)(student, teacher), pair_weights)
