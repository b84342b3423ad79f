"""What the options of losses over aligned features may say: layer pairs, projectors and norms. No loss stands here.

A loss that compares features of both models has these options, and its task builds the aligner from them
(`tokenkit/models/aligner.py`). What each word does, with its paper: docs/objectives.md.
"""

from typing import Literal

Layers = (
    Literal[
        "all",
        "last",
        "last_2",
        "last_3",
        "last_4",
        "uniform",
        "uniform_cons",
        "uniform_and_last",
        "skip",
        "all_to_one",
        "full_cross",
    ]
    | list[tuple[int, int]]
)
"""Which layer of the student learns from which of the teacher: a rule, or pairs [student, teacher] counted from 0."""

Projector = Literal["none", "linear", "orthogonal", "mlp", "mlp_256", "miles", "ensemble"]
"""The map, learnt along, from the student's width to the teacher's."""

Norm = Literal[
    "none", "layernorm", "rmsnorm", "batchnorm", "standardize", "whiten_zca", "whiten_pca", "whiten_cholesky"
]
"""What puts the features of both models on one scale before they are compared."""

NormSides = Literal["both", "teacher"]
"""Whether the student's features are normalised too."""

Member = Literal["none", "linear", "orthogonal", "mlp", "mlp_256"]
Ensemble = tuple[Member, ...]
"""The maps of which `projector: ensemble` takes the mean."""
