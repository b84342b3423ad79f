"""Universal logit distillation: sorted probabilities, whatever the tokens are. Boizard+ 2024, 2402.12030.

As published, position t of one side is compared with position t of the other, though they stand at different places of
the text; with `positions: aligned` the distributions after the same bytes are.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from tokenkit.losses import loss
from tokenkit.losses.divergences import Temperature
from tokenkit.quantities import at_least_float32

SORTED_ROWS = 64  # that are sorted at a time


def uld_reads(options: Mapping[str, Any]) -> dict[str, str]:
    """Logits at the same bytes stand for those at the same position."""
    if options["positions"] == "positional":
        return {}
    return {f"{side}_logits": f"{side}_chunk_logits" for side in ("student", "teacher")}


def uld_units(
    student_label_mask: Bool[Tensor, "B T"],
    student_token_mask: Bool[Tensor, "B T"],
    student_chunk_end: Int[Tensor, "B C"],
    teacher_label_mask: Bool[Tensor, "B S"],
    teacher_token_mask: Bool[Tensor, "B S"],
    teacher_chunk_end: Int[Tensor, "B C"],
    *,
    positions: Literal["aligned", "positional"],
) -> Bool[Tensor, "B U"]:
    """Ends of chunks after which both sides learn what follows, or positions at which they do."""
    if positions == "aligned":
        student = learnt_after(student_label_mask, student_token_mask, student_chunk_end)
        return student & learnt_after(teacher_label_mask, teacher_token_mask, teacher_chunk_end)
    width = student_label_mask.shape[1]
    return student_label_mask & _to_width(teacher_label_mask, width, 1)


def learnt_after(
    label_mask: Bool[Tensor, "B T"], token_mask: Bool[Tensor, "B T"], chunk_end: Int[Tensor, "B C"]
) -> Bool[Tensor, "B C"]:
    """Chunks that exist and are followed by a token that is learnt, or by nothing."""
    return (chunk_end >= 0) & (label_mask | ~token_mask).gather(1, chunk_end.clamp_min(0))


@loss(per="token", units=uld_units, reads=uld_reads)
def uld(
    student_logits: Float[Tensor, "B U V"],
    teacher_logits: Float[Tensor, "B R W"],
    *,
    positions: Literal["aligned", "positional"] = "aligned",
    temperature: Temperature = 1.0,
) -> Float[Tensor, "B U"]:
    """L1 distance of the probabilities in falling order, the smaller vocabulary filled up with zeros; in [0, 2]."""
    return sorted_distance(
        (at_least_float32(student_logits) / temperature).softmax(-1),
        _to_width(at_least_float32(teacher_logits) / temperature, student_logits.shape[1], 1).softmax(-1),
    )


def sorted_distance(p: Float[Tensor, "*N V"], q: Float[Tensor, "*N W"]) -> Float[Tensor, "*N"]:
    """Sum of |p - q| after sorting both; the Wasserstein-1 distance under a cost that knows no tokens.

    Of probabilities, or what else is at least 0.
    """
    if p.device.type == "cpu" and p.dtype == q.dtype == torch.float32 and not q.requires_grad:
        return _SortedDistance.apply(p.reshape(-1, p.shape[-1]), q.reshape(-1, q.shape[-1])).view(p.shape[:-1])
    p, q = (x.sort(-1, descending=True).values for x in (p, q))
    width = max(p.shape[-1], q.shape[-1])
    return (_to_width(p, width, -1) - _to_width(q, width, -1)).abs().sum(-1)


class _SortedDistance(torch.autograd.Function):
    """`sorted_distance` of rows by NumPy's sorting networks, which torch lacks on a CPU, some rows at a time."""

    @staticmethod
    def forward(ctx, p, q):
        values = p.new_empty(len(p))
        signs = torch.empty_like(p, dtype=torch.int8) if ctx.needs_input_grad[0] else None
        width = max(p.shape[1], q.shape[1])
        for rows in range(0, len(p), SORTED_ROWS):
            some = slice(rows, rows + SORTED_ROWS)
            own, order = _falling(p[some])
            other = torch.from_numpy(np.sort(q[some].numpy(), -1)).flip(-1)
            gap = _to_width(own, width, -1).sub_(_to_width(other, width, -1))
            values[some] = gap.abs().sum(-1)
            if signs is not None:
                signs[some] = torch.empty_like(signs[some]).scatter_(1, order, gap[:, : p.shape[1]].sign_().char())
        ctx.save_for_backward(signs)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # pyrefly: ignore [bad-override] (a decorator hides the signature)
        (signs,) = ctx.saved_tensors
        return (None if signs is None else signs * gradients[0].unsqueeze(1)), None


def _falling(values: Float[Tensor, "N V"]) -> tuple[Float[Tensor, "N V"], Int[Tensor, "N V"]]:
    """Values from 0 up in falling order, and their columns: sorted as one integer, as their bits rise with them."""
    bits = values.detach().contiguous().numpy().view(np.int32)
    keys = (~bits).astype(np.int64) << 32 | np.arange(bits.shape[1])
    keys.sort(-1)
    found = (~(keys >> 32)).astype(np.int32).view(np.float32)
    return torch.from_numpy(found), torch.from_numpy(keys & 0xFFFFFFFF)


def without(values: Float[Tensor, "*N V"], columns: Int[Tensor, "P"]) -> Float[Tensor, "*N R"]:
    """All columns but these."""
    others = torch.ones(values.shape[-1], dtype=torch.bool, device=values.device)
    others[columns] = False
    return columns_of(values, others.nonzero().squeeze(1))


def columns_of(values: Float[Tensor, "*N V"], columns: Int[Tensor, "P"]) -> Float[Tensor, "*N P"]:
    """These columns, in this order; a gather, whose backward pass adds nothing up where indexing would."""
    return values.gather(-1, columns.expand(*values.shape[:-1], -1))


def _to_width(values: Tensor, width: int, dim: int) -> Tensor:
    """Cut, or filled up with zeros, to a width."""
    missing = width - values.shape[dim]
    if missing <= 0:
        return values.narrow(dim, 0, width)
    behind = [0] * (2 * (values.ndim - 1 - dim % values.ndim)) + [0, missing]
    return pad(values, behind)
