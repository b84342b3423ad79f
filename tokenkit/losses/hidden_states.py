"""Hidden states of both models at the ends of the same pieces of text. Minixhofer, Vulić & Ponti 2025, 2503.20083.

The distance is measured against how large the teacher's states are on average over the step, so that it has no unit.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenkit.losses import loss
from tokenkit.quantities import at_least_float32

EPSILON = 1e-8
READS = {
    ("last", False): {},
    ("last", True): {"student_chunk_hidden": "student_chunk_projected_hidden"},
    ("all", False): {f"{side}_chunk_hidden": f"{side}_chunk_layers" for side in ("student", "teacher")},
    ("qkv", False): {f"{side}_chunk_hidden": f"{side}_chunk_qkv" for side in ("student", "teacher")},
}


def hidden_reads(options: Mapping[str, Any]) -> dict[str, str]:
    """Which states are compared; a projection is learnt for the last ones alone."""
    return READS[options["states"], options["project"] and options["states"] == "last"]


def hidden_units(
    student_chunk_end: Int[Tensor, "B C"],
    teacher_chunk_end: Int[Tensor, "B C"],
    space_after: Bool[Tensor, "B C"],
    *,
    chunks: Literal["naive", "space"],
) -> Bool[Tensor, "B C"]:
    """Chunks that exist on both sides, whether learnt or not; with `space`, those before a space or special token."""
    exist = (student_chunk_end >= 0) & (teacher_chunk_end >= 0)
    return exist & space_after if chunks == "space" else exist


def teacher_size(
    teacher_chunk_hidden: Float[Tensor, "B C *L D"],
    student_chunk_end: Int[Tensor, "B C"],
    teacher_chunk_end: Int[Tensor, "B C"],
    space_after: Bool[Tensor, "B C"],
    *,
    chunks: Literal["naive", "space"],
    normalization: Literal["l2", "l2_channelwise", "l1", "l1_channelwise"],
) -> tuple[Float[Tensor, "*L D"], Float[Tensor, ""]]:
    """Sum over the chunks that count of each channel's square (or absolute value), and how many they are."""
    counted = hidden_units(student_chunk_end, teacher_chunk_end, space_after, chunks=chunks)
    states = at_least_float32(teacher_chunk_hidden)
    size = states.abs() if normalization.startswith("l1") else states.square()
    counted_here = counted.view(*counted.shape, *[1] * (states.ndim - 2))
    return torch.where(counted_here, size, 0).sum((0, 1)), counted.sum().to(states.dtype)


@loss(per="chunk", units=hidden_units, reads=hidden_reads, step_mean=teacher_size)
def hidden_states(
    student_chunk_hidden: Float[Tensor, "B C *L D"],
    teacher_chunk_hidden: Float[Tensor, "B C *L D"],
    step_mean: Float[Tensor, "*L D"],
    *,
    states: Literal["last", "all", "qkv"] = "last",
    chunks: Literal["naive", "space"] = "naive",
    normalization: Literal["l2", "l2_channelwise", "l1", "l1_channelwise"] = "l2_channelwise",
    project: bool = False,
) -> Float[Tensor, "B C"]:
    """Squared (l1: absolute) distance over the teacher's mean size, averaged over channels and layers; no unit."""
    difference = at_least_float32(student_chunk_hidden) - at_least_float32(teacher_chunk_hidden)
    distance = difference.abs() if normalization.startswith("l1") else difference.square()
    size = step_mean if normalization.endswith("channelwise") else step_mean.mean(-1, keepdim=True)
    return (distance / (size + EPSILON)).flatten(2).mean(-1)
