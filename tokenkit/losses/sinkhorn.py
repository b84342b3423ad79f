"""Optimal transport between the positions of a text, by their next-token distributions. Cui+ 2024, 2402.17110 (SinKD).

What the student says at one place may resemble what the teacher says at another: a plan moves every position of the
student onto the teacher's at the least cost, softened by entropy. Cuturi 2013, 1306.0895; debiased: Feydy+ 2019,
1810.08278.
"""

from typing import Annotated

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenkit.losses import loss
from tokenkit.losses.divergences import Temperature
from tokenkit.quantities import at_least_float32

TILE = 2**22  # differences that a GPU holds at one time in the backward pass
PATIENCE = 10_000  # iterations after which a tolerance is given up
Epsilon = Annotated[float, Field(gt=0)]
Cost = Float[Tensor, "N N"]


@loss(per="row")
def sinkhorn(
    student_logits: Float[Tensor, "B T V"],
    teacher_logits: Float[Tensor, "B T V"],
    student_label_mask: Bool[Tensor, "B T"],
    *,
    epsilon: Epsilon = 0.1,
    iterations: Annotated[int, Field(ge=1)] = 20,
    temperature: Temperature = 1.0,
    debiased: bool = False,
    symmetric: bool = False,
    sum: bool = False,
) -> Float[Tensor, "B 1"]:
    """Cost of the plan between the scored positions of each row, L1 of probabilities, in [0, 2] per position.

    With `sum` the positions are added up instead. `symmetric` is the mean of the plans scaled along the teacher's and
    along the student's positions first, which are one plan after enough iterations. `debiased` takes off half the cost
    of each side with itself, so that it is 0 where the sides are equal.
    """
    values = []
    for student, teacher, scored in zip(student_logits, teacher_logits, student_label_mask):
        count = int(scored.sum())
        if count == 0:  # a sum over nothing that still hangs on the student
            values.append(at_least_float32(student[scored]).sum())
            continue
        q, p = ((at_least_float32(x[scored]) / temperature).softmax(-1) for x in (student, teacher))
        value = _transport(q, p, epsilon, iterations, symmetric)
        if debiased:
            value = value - (_transport(q, q, epsilon, iterations, symmetric) / 2)
            value = value - (_transport(p, p, epsilon, iterations, symmetric) / 2)
        values.append(value if sum else value / count)
    return torch.stack(values).unsqueeze(1)


def _transport(
    q: Float[Tensor, "N V"], p: Float[Tensor, "N V"], epsilon: float, iterations: int, symmetric: bool
) -> Float[Tensor, ""]:
    cost = l1_cost(q, p)
    found = (sinkhorn_plan(cost, epsilon, iterations) * cost).sum()
    if symmetric:
        turned = cost.T
        found = (found + (sinkhorn_plan(turned, epsilon, iterations) * turned).sum()) / 2
    return found


def sinkhorn_plan(
    cost: Cost, epsilon: float = 0.1, iterations: int = 20, tolerance: float | None = None
) -> Float[Tensor, "N N"]:
    """exp(-cost / epsilon), its rows and then its columns scaled to sum 1, again and again; gradients are of just that.

    With a `tolerance`, until no row's sum is further from 1 than it, whatever `iterations` says.
    """
    log_kernel = -cost / epsilon
    rows, columns = _Potentials.apply(log_kernel, iterations, tolerance)
    return (log_kernel + rows.unsqueeze(1) + columns).exp()


class _Potentials(torch.autograd.Function):
    """What scales rows and columns, as logarithms; two vectors per iteration are kept, and no matrix but the kernel."""

    @staticmethod
    def forward(ctx, log_kernel, iterations, tolerance):
        columns = log_kernel.new_zeros(len(log_kernel))
        kept = [columns]
        for _ in range(iterations if tolerance is None else PATIENCE):
            rows = -(log_kernel + columns).logsumexp(1)
            columns = -(log_kernel + rows.unsqueeze(1)).logsumexp(0)
            kept += [rows, columns]
            if tolerance is not None and _off(log_kernel, rows, columns) <= tolerance:
                break
        ctx.save_for_backward(log_kernel, torch.stack(kept))
        return rows, columns

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyrefly: ignore [bad-override] (a decorator hides the signature)
        rows_grad, columns_grad = grad_outputs
        log_kernel, kept = ctx.saved_tensors
        grad = torch.zeros_like(log_kernel)
        for place in range(len(kept) - 2, 0, -2):
            before, rows, columns = kept[place - 1], kept[place], kept[place + 1]
            share = (log_kernel + rows.unsqueeze(1) + columns).exp()  # of each row in its column's sum
            grad -= share * columns_grad
            rows_grad = rows_grad - share @ columns_grad
            share = (log_kernel + rows.unsqueeze(1) + before).exp()
            grad -= share * rows_grad.unsqueeze(1)
            rows_grad, columns_grad = torch.zeros_like(rows_grad), -(rows_grad @ share)
        return grad, None, None


def _off(log_kernel: Cost, rows: Float[Tensor, "N"], columns: Float[Tensor, "N"]) -> float:
    """How far the sum of a row is from 1; columns have just been scaled."""
    return float(((log_kernel + rows.unsqueeze(1) + columns).exp().sum(1) - 1).abs().max())


def l1_cost(a: Float[Tensor, "N V"], b: Float[Tensor, "M V"]) -> Float[Tensor, "N M"]:
    """Sum of |difference| of every row of one and every row of the other; rows x rows x columns are never held."""
    return _L1.apply(a, b)


class _L1(torch.autograd.Function):
    """In parts of the columns, because the library's backward pass holds all differences of a part on a GPU."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        cost = a.new_zeros(len(a), len(b))
        for part in _parts(a, b):
            cost += torch.cdist(a[:, part], b[:, part], p=1)
        return cost

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyrefly: ignore [bad-override] (a decorator hides the signature)
        a, b = ctx.saved_tensors
        a_grad, b_grad = (torch.empty_like(x) if ctx.needs_input_grad[i] else None for i, x in enumerate((a, b)))
        for part in _parts(a, b):
            a_part, b_part = (
                x[:, part].detach().requires_grad_(needed) for x, needed in zip((a, b), ctx.needs_input_grad)
            )
            with torch.enable_grad():
                cost = torch.cdist(a_part, b_part, p=1)
            needed = [x for x in (a_part, b_part) if x.requires_grad]
            found = iter(torch.autograd.grad(cost, needed, grad_outputs[0]))
            for whole in (a_grad, b_grad):
                if whole is not None:
                    whole[:, part] = next(found)
        return a_grad, b_grad


def _parts(a: Tensor, b: Tensor) -> list[slice]:
    size = max(1, TILE // (len(a) * len(b)))
    return [slice(start, start + size) for start in range(0, a.shape[1], size)]
