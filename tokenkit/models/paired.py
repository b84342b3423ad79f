"""Pairs of layers of two models, as one loss compares them: chosen by its mapping, aligned and weighed."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenkit.losses import Loss
from tokenkit.models.aligner import Aligner, PairWeights
from tokenkit.models.mapping import layer_pairs
from tokenkit.models.view import ModelView
from tokenkit.models.whitening import Moments
from tokenkit.quantities import inputs_of, is_paired

MASK = "student_token_mask"


class Paired(nn.Module):
    """What one loss asks of pairs of layers, made of the leaves of both models."""

    def __init__(self, loss: Loss, options: Mapping[str, Any], student: ModelView, teacher: "ModelView | int"):
        """`teacher` is the width of its last hidden states where they were recorded."""
        super().__init__()
        self.names = [name for name in loss.named(loss.tensors, options) if is_paired(name)]
        self.leaves = {name: leaf for name in self.names for leaf in inputs_of(name)}
        counts = [num_layers(side) for side in (student, teacher)]
        self.pairs = layer_pairs(options["layers"], *counts)
        self.with_embeddings = bool(options.get("include_embeddings", False))
        total = len(self.pairs) + self.with_embeddings
        places = [(-1, -1), *self.pairs] if self.with_embeddings else self.pairs  # -1: what enters the first layer
        if "projector" in options:
            widths = [self._width(name, side) for name, side in (("student", student), ("teacher", teacher))]
            self.parts: Aligner | PairWeights = Aligner(options, places, *widths)
        else:
            self.parts = PairWeights(total, options["layers"] == "full_cross")

    def forward(self, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the loss, by the names under which it asks for them."""
        found = {}
        for name, leaf in self.leaves.items():
            found[name] = self._chosen(known[leaf], leaf, 0 if leaf.partition("_")[0] == "student" else 1)
        if isinstance(self.parts, Aligner):
            student, teacher = self.leaves  # the states of both, and nothing else, are aligned
            found[student], found[teacher] = self.parts(found[student], found[teacher], known[MASK])
        weights = next((name for name in self.names if name not in self.leaves), None)
        return found if weights is None else {**found, weights: self.parts.pair_weights()}

    @property
    def needs_statistics(self) -> bool:
        """Whether the teacher's states have to be measured before the first step."""
        return isinstance(self.parts, Aligner) and self.parts.needs_statistics

    @property
    def teacher_leaf(self) -> str:
        """The leaf that the teacher's side is taken from."""
        return next(leaf for leaf in self.leaves.values() if leaf.partition("_")[0] == "teacher")

    @property
    def teacher_places(self) -> list[int]:
        """Of each pair, the place of the teacher's layer in that leaf."""
        return self._places(self.teacher_leaf, 1)

    def teacher_layers(self, known: Mapping[str, Tensor], places: list[int]) -> Float[Tensor, "B T P E"]:
        """The teacher's states at some places."""
        values = known[self.teacher_leaf]
        return (values.unsqueeze(2) if values.ndim == 3 else values)[:, :, places]

    def set_statistics(self, moments: Sequence[Moments]) -> None:
        """What was measured of the teacher, pair by pair."""
        assert isinstance(self.parts, Aligner), "only an aligner has norms"
        self.parts.set_statistics(moments)

    def _places(self, leaf: str, side: int) -> list[int]:
        kind, numbers = leaf.partition("_")[2], [pair[side] for pair in self.pairs]
        if kind == "hidden":
            return [0]
        if kind != "layers":
            return numbers
        numbers = [number + 1 for number in numbers]  # the input embeddings stand before the first layer
        return [0, *numbers] if self.with_embeddings else numbers

    def _chosen(self, values: Tensor, leaf: str, side: int) -> Tensor:
        """The layers of one side, in the order of the pairs; of hidden states [B T P D], of maps [B P ...]."""
        if leaf.partition("_")[2] == "hidden":
            return values.unsqueeze(2)
        places = torch.tensor(self._places(leaf, side), device=values.device)
        return values.index_select(1 if leaf.partition("_")[2] == "attentions" else 2, places)

    def _width(self, name: str, side: "ModelView | int") -> int:
        leaf = next(leaf for leaf in self.leaves.values() if leaf.partition("_")[0] == name)
        return side if isinstance(side, int) else channels(side, leaf.partition("_")[2])


def num_layers(side: "ModelView | int") -> int:
    """Blocks of a model; of a recorded teacher one, because its last states are all that is on disk."""
    return 1 if isinstance(side, int) else side.model.config.get_text_config().num_hidden_layers


@torch.no_grad()
def channels(view: ModelView, leaf: str) -> int:
    """How many channels a leaf of a model has at one position of one layer."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=view.model.device)
    return view.leaves({leaf}, ids, ids)[leaf].shape[-1]
