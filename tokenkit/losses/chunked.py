"""Divergences of two models under their heads, some positions at a time. Idea: Hsu+ 2024, 2410.10989 (Liger kernels).

Logits exist for one chunk of positions only and are computed again in the backward pass, so what is held grows with the
chunk and not with the text. One vocabulary.
"""

from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenkit.losses import loss
from tokenkit.losses.divergences import Share, Temperature, jensen_shannon, kl_of_logs, log_probabilities
from tokenkit.quantities import at_least_float32
from tokenkit.scores import PLAIN, LogitForm

Kind = Literal["kl", "reverse_kl", "jsd"]
CHUNK = {"cpu": 2**22, "cuda": 2**26}  # logits of one side that exist at one time, where no chunk is asked for


@loss(per="token")
def chunked_divergence(
    student_divergence: Float[Tensor, "B T"],
    *,
    kind: Kind = "kl",
    beta: Share = 0.5,
    temperature: Temperature = 1.0,
    temperature_squared: bool = True,
    chunk: Annotated[int, Field(ge=1)] | None = None,
) -> Float[Tensor, "B T"]:
    """Forward or reverse KL, or JSD, in nats, of hidden states under both heads; no logits are held.

    The task has computed it with these options; what is left is the squared temperature. `chunk` is in positions.
    """
    return student_divergence * (temperature**2 if temperature_squared else 1)


def divergence_scores(
    student_hidden: Float[Tensor, "*N D"],
    student_head: Float[Tensor, "V D"],
    student_form: LogitForm,
    teacher_hidden: Float[Tensor, "*N E"],
    teacher_head: Float[Tensor, "V E"] | None,
    teacher_form: LogitForm = PLAIN,
    kind: Kind = "kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk: int | None = None,
    counted: Bool[Tensor, "*N"] | None = None,
) -> Float[Tensor, "*N"]:
    """The divergence of each position in nats, without a factor for the temperature; gradients are the student's alone.

    Without a `teacher_head`, `teacher_hidden` are the teacher's logits. Positions that are not `counted` give 0 and
    cost nothing. `beta` is for the generalised Jensen-Shannon divergence. `chunk` is in positions.
    """
    shape = student_hidden.shape[:-1]
    own, other = (x.reshape(-1, x.shape[-1]) for x in (student_hidden, teacher_hidden.detach()))
    rows = None if counted is None else counted.reshape(-1).nonzero().squeeze(1)
    if rows is not None:
        own, other = own[rows], other[rows]
    size = max(1, CHUNK[student_head.device.type] // len(student_head)) if chunk is None else chunk
    teacher = _Teacher(other, None if teacher_head is None else teacher_head.detach(), teacher_form)
    settings = _Settings(student_form, teacher, kind, beta, temperature, size)
    values = _Divergence.apply(own, student_head, student_form.bias, settings)
    if rows is not None:
        values = values.new_zeros(shape.numel()).index_copy(0, rows, values)
    return values.view(shape)


class _Teacher:
    """The logits of a few positions, from hidden states and a head or as they are."""

    def __init__(self, states: Tensor, head: Tensor | None, form: LogitForm):
        self.states, self.head, self.form = states, head, form

    def logits(self, rows: slice) -> Float[Tensor, "N V"]:
        states = self.states[rows]
        return states if self.head is None else _logits(states, self.head, self.form)


class _Settings:
    """What a divergence is of, beside the student's tensors."""

    def __init__(self, form: LogitForm, teacher: _Teacher, kind: Kind, beta: float, temperature: float, size: int):
        self.form, self.teacher, self.kind = form, teacher, kind
        self.beta, self.temperature, self.size = beta, temperature, size

    def rows(self, count: int) -> list[slice]:
        return [slice(start, start + self.size) for start in range(0, count, self.size)]

    def values(self, products: Float[Tensor, "N V"], rows: slice) -> Float[Tensor, "N"]:
        p, q = log_probabilities(self.teacher.logits(rows), self.form(products), self.temperature)
        if self.kind == "jsd":
            return jensen_shannon(p, q, self.beta)
        return kl_of_logs(p, q) if self.kind == "kl" else kl_of_logs(q, p)


class _Divergence(torch.autograd.Function):
    """One value per row; only the hidden states and the head are kept."""

    @staticmethod
    def forward(ctx, hidden, head, bias, settings):
        ctx.save_for_backward(hidden, head, bias)
        ctx.settings = settings
        parts = [settings.values(_products(hidden[rows], head), rows) for rows in settings.rows(len(hidden))]
        return torch.cat(parts) if parts else at_least_float32(hidden).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyrefly: ignore [bad-override] (a decorator hides the signature)
        (gradient,) = grad_outputs
        hidden, head, bias = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        hidden_grad = torch.empty_like(hidden) if wanted[0] else None
        head_grad, bias_grad = (
            torch.zeros_like(x, dtype=gradient.dtype) if needed else None
            for x, needed in ((head, wanted[1]), (bias, wanted[2]))
        )
        for rows in ctx.settings.rows(len(hidden)):
            products = _products(hidden[rows], head).requires_grad_()
            with torch.enable_grad():
                values = ctx.settings.values(products, rows)
            (grad,) = torch.autograd.grad(values, products, gradient[rows])
            del values, products
            if bias_grad is not None:
                bias_grad += grad.sum(0)
            grad = grad.to(hidden.dtype)
            if hidden_grad is not None:
                hidden_grad[rows] = grad @ head.to(hidden.dtype)
            if head_grad is not None:
                head_grad += grad.T @ hidden[rows]
        found = zip((hidden_grad, head_grad, bias_grad), (hidden, head, bias))
        return *(None if grad is None else grad.to(of.dtype) for grad, of in found), None


def _products(hidden: Float[Tensor, "N D"], head: Float[Tensor, "V D"]) -> Float[Tensor, "N V"]:
    return at_least_float32(hidden @ head.to(hidden.dtype).T)


def _logits(hidden: Float[Tensor, "N D"], head: Float[Tensor, "V D"], form: LogitForm) -> Float[Tensor, "N V"]:
    return form(_products(hidden, head))
