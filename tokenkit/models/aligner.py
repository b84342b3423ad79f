"""Features of a student and of its teacher brought together: one projector and one norm for every pair of layers.

Everything is made at the start from the options of a loss and the widths of both models, so that an optimizer and a
checkpoint see all of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokenkit.config import UserError
from tokenkit.models.alignment_maps import build_projector
from tokenkit.models.alignment_norms import BatchNorm, Unchanged, Whitening, build_norm
from tokenkit.models.whitening import KINDS, Moments
from tokenkit.quantities import at_least_float32

MILES_EPSILON = 1e-4


class PairWeights(nn.Module):
    """What each pair weighs: all the same, or learnt where every layer meets every other."""

    def __init__(self, count: int, learnt: bool):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(count), requires_grad=learnt)

    def pair_weights(self) -> Float[Tensor, "P"]:
        """They sum to 1."""
        return at_least_float32(self.logits).softmax(0)


class PairAligner(nn.Module):
    """One student layer and one teacher layer."""

    def __init__(self, options: Mapping[str, Any], student_width: int, teacher_width: int):
        super().__init__()
        kind, sides, affine = options["norm"], options["norm_sides"], options["norm_affine"]
        self.norm_first = options["norm_first"]
        if kind in KINDS and sides == "both":
            raise UserError(
                f"norm_sides: both, but {kind} goes by what was measured before, which of a learning student does not "
                "exist; write norm_sides: teacher (and projector: orthogonal, as in its paper)"
            )
        normed_width = student_width if self.norm_first else teacher_width
        self.projector = build_projector(options["projector"], student_width, teacher_width, options["ensemble"])
        self.student_norm = build_norm(kind, normed_width, affine) if sides == "both" else Unchanged()
        self.teacher_norm = build_norm(kind, teacher_width, affine)
        miles = options["projector"] == "miles"
        self.student_scale, self.teacher_scale = (
            BatchNorm(teacher_width, affine=False, epsilon=MILES_EPSILON) if miles else Unchanged() for _ in range(2)
        )

    def forward(
        self, student: Float[Tensor, "B T D"], teacher: Float[Tensor, "B T E"], mask: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T E"], Float[Tensor, "B T E"]]:
        """Projector, then norm; with `norm_first` the other way round. `miles` scales both sides after its map."""
        if self.norm_first:
            student = self.student_scale(self.projector(self.student_norm(student, mask)), mask)
            return student, self.teacher_scale(self.teacher_norm(teacher, mask), mask)
        student = self.student_norm(self.student_scale(self.projector(student), mask), mask)
        return student, self.teacher_norm(self.teacher_scale(teacher, mask), mask)


class Aligner(nn.Module):
    """All pairs of one loss, and how much each weighs.

    `options` are those of the loss: layers, projector, ensemble, norm, norm_sides, norm_affine, norm_first.
    """

    def __init__(
        self, options: Mapping[str, Any], pairs: Sequence[tuple[int, int]], student_width: int, teacher_width: int
    ):
        super().__init__()
        self.options = dict(options)
        self.layers = list(pairs)
        self.pairs = nn.ModuleList(PairAligner(options, student_width, teacher_width) for _ in pairs)
        self.mixing = PairWeights(len(pairs), options["layers"] == "full_cross")

    @property
    def needs_statistics(self) -> bool:
        """Whether the teacher has to be measured before the first forward pass."""
        return self.options["norm"] in KINDS

    def set_statistics(self, moments: Sequence[Moments]) -> None:
        """Takes what was measured of the teacher's layer of each pair, in the order of the pairs, for whitening."""
        for pair, measured in zip(self.pairs, moments, strict=True):
            norm = pair.get_submodule("teacher_norm")
            assert isinstance(norm, Whitening), f"norm {self.options['norm']} takes no statistics"
            norm.set_moments(measured)

    def pair_weights(self) -> Float[Tensor, "P"]:
        """What each pair weighs; they sum to 1."""
        return self.mixing.pair_weights()

    def forward(
        self, student: Float[Tensor, "B T P D"], teacher: Float[Tensor, "B T P E"], mask: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T P E"], Float[Tensor, "B T P E"]]:
        """Both sides as the loss compares them; what stands outside the mask is taken for 0 before anything else."""
        assert student.shape[2] == len(self.pairs), f"{student.shape[2]} layers for {len(self.pairs)} pairs"
        keep = mask[..., None, None]
        student, teacher = (torch.where(keep, at_least_float32(states), 0.0) for states in (student, teacher))
        aligned = [pair(student[:, :, i], teacher[:, :, i], mask) for i, pair in enumerate(self.pairs)]
        students, teachers = (torch.stack(side, 2) for side in zip(*aligned))
        return at_least_float32(students), at_least_float32(teachers)
