"""Approximate likelihood matching: works across tokenizers. Minixhofer, Vulić & Ponti 2025, 2503.20083.

Student and teacher give the same piece of text (a chunk) a probability each; the two Bernoulli distributions "the text
goes on with this chunk" are matched. Chunks that end where the teacher sees no likely token boundary are merged with
the next one, and the mass of a boundary after the unit is counted in (debiasing), because a tokenizer that would have
written the text with a longer token gives its shorter prefix too little probability.
"""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from tokenkit.losses import loss
from tokenkit.losses.divergences import Share, Temperature
from tokenkit.quantities import at_least_float32

Chunks = Float[Tensor, "B C"]
Values = Float[Tensor, "B U"]
Sizes = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
Weight = Literal["chunk_count", "token_count", "log1p_token_count"]
Count = Literal["chunk_count", "token_count"]
Divergence = Literal["kl", "ce", "reverse_kl", "kl_limit", "abs", "tvd", "renyi", "k2", "k3"]
EPSILON = 1e-6  # keeps log(1 - p) finite at p = 1


SHARED = {"merge": True, "threshold": 0.1, "debias": True, "boundary": "space"}
COUNTED = {"numerator": "chunk_count", "denominator": "chunk_count", "both_sides": True}
PRESETS: dict[str, dict[str, Any]] = {
    # the published code's own defaults, without its faults: merged groups are counted, one-sided chunks are not
    "upstream": {"divergence": "ce", "temperature": 100.0, **SHARED, **COUNTED},
    # the best of the paper's ablations
    "best": {"divergence": "kl", "temperature": 5.0, **SHARED, **COUNTED},
}


def alm_reads(options: Mapping[str, Any]) -> dict[str, str]:
    """The tensors that stand for the mass after a chunk: of a boundary, or of the end of the text."""
    sides = ("student", "teacher") if options["boundary"] == "eos" else ()
    return {f"{side}_chunk_boundary_logp": f"{side}_chunk_eos_logp" for side in sides}


def alm_units(
    teacher_chunk_boundary_logp: Chunks,
    teacher_chunk_tokens: Int[Tensor, "B C"],
    student_chunk_tokens: Int[Tensor, "B C"],
    *,
    merge: bool,
    threshold: float,
    both_sides: bool,
    numerator: Weight,
    denominator: Count,
    chunk_sizes: Sizes,
) -> tuple[Values, Values]:
    """Weight and count of each unit: its column is its chunk, or the running number of its merged group.

    The runs of every size in `chunk_sizes` stand side by side.
    """
    valid = _scored(teacher_chunk_tokens, student_chunk_tokens, both_sides)
    tokens = teacher_chunk_tokens * valid
    if merge:
        tokens = _sum_groups(tokens, valid, _groups(teacher_chunk_boundary_logp, valid, threshold))
    tokens = torch.cat([_runs(tokens, size).sum(-1) for size in chunk_sizes], 1).to(teacher_chunk_boundary_logp.dtype)
    ones = (tokens > 0).to(tokens.dtype)
    measures = {"chunk_count": ones, "token_count": tokens, "log1p_token_count": tokens.log1p()}
    return measures[numerator] / len(chunk_sizes), measures[denominator]


@loss(per="chunk", units=alm_units, reads=alm_reads, presets=PRESETS)
def alm(
    student_chunk_logp: Chunks,
    teacher_chunk_logp: Chunks,
    student_chunk_boundary_logp: Chunks,
    teacher_chunk_boundary_logp: Chunks,
    student_chunk_tokens: Int[Tensor, "B C"],
    teacher_chunk_tokens: Int[Tensor, "B C"],
    *,
    temperature: Temperature = 5.0,
    divergence: Divergence = "kl",
    debias: bool = True,
    boundary: Literal["space", "eos"] = "space",
    merge: bool = True,
    threshold: Share = 0.1,
    both_sides: bool = True,
    numerator: Weight = "chunk_count",
    denominator: Count = "chunk_count",
    chunk_sizes: Sizes = (1,),
    renyi_order: Annotated[float, Field(gt=0)] = 0.5,
) -> Values:
    """Divergence between the Bernoulli distributions of each unit's p^(1/temperature), in nats."""
    valid = _scored(teacher_chunk_tokens, student_chunk_tokens, both_sides)
    student, teacher = student_chunk_logp, teacher_chunk_logp
    student_end, teacher_end = student_chunk_boundary_logp, teacher_chunk_boundary_logp
    if merge:
        group = _groups(teacher_end, valid, threshold)
        last = _last_of_group(valid, group)
        student, teacher = _sum_groups(student, valid, group), _sum_groups(teacher, valid, group)
        student_end, teacher_end = student_end.gather(1, last), teacher_end.gather(1, last)
        valid = _sum_groups(valid.long(), valid, group) > 0
    counted = torch.cat([_runs(valid, size).any(-1) for size in chunk_sizes], 1)
    student = _units_logp(student, student_end if debias else None, valid, chunk_sizes)
    teacher = _units_logp(teacher, teacher_end if debias else None, valid, chunk_sizes)
    # inputs, not outputs, are masked: a -inf or NaN in an unused branch would still reach the gradient
    student = at_least_float32(student).clamp_max(0).masked_fill(~counted, -1.0)
    teacher = at_least_float32(teacher).clamp_max(0).masked_fill(~counted, -1.0)
    if divergence == "renyi":
        return _renyi(teacher, student, renyi_order)
    return DIVERGENCES[divergence](teacher, student, temperature)


def _units_logp(logp: Chunks, end: Chunks | None, valid: Bool[Tensor, "B C"], sizes: tuple[int, ...]) -> Values:
    """Sums over runs of columns, with the mass after the last column that counts."""
    found = []
    for size in sizes:
        inside = _runs(valid, size)
        unit = torch.where(inside, _runs(logp, size), 0).sum(-1)
        if end is not None:
            last = torch.where(inside, torch.arange(size, device=logp.device), 0).amax(-1, keepdim=True)
            unit = unit + _runs(end, size).gather(-1, last).squeeze(-1)
        found.append(unit)
    return torch.cat(found, 1)


def _runs(columns: Tensor, size: int) -> Tensor:
    """Consecutive columns in runs of a size; the last run is filled up with zeros."""
    return pad(columns, (0, -columns.shape[1] % size)).unflatten(1, (-1, size))


def _scored(teacher_tokens: Tensor, student_tokens: Tensor, both_sides: bool) -> Bool[Tensor, "B C"]:
    """Chunks with a scored token on the teacher's side, or on both: an unscored side would claim probability 1."""
    return (teacher_tokens > 0) & (student_tokens > 0) if both_sides else teacher_tokens > 0


@torch.no_grad()
def _groups(boundary_logp: Chunks, valid: Bool[Tensor, "B C"], threshold: float) -> Int[Tensor, "B C"]:
    """Number of likely boundaries before each chunk; only chunks that count may close a group."""
    closes = valid & (boundary_logp.exp() > threshold)
    return closes.cumsum(1) - closes.long()


def _sum_groups(value: Tensor, valid: Bool[Tensor, "B C"], group: Int[Tensor, "B C"]) -> Tensor:
    return torch.zeros_like(value).scatter_add(1, group, torch.where(valid, value, 0))


def _last_of_group(valid: Bool[Tensor, "B C"], group: Int[Tensor, "B C"]) -> Int[Tensor, "B C"]:
    column = torch.arange(group.shape[1], device=group.device).expand_as(group)
    return torch.zeros_like(group).scatter_reduce(1, group, torch.where(valid, column, 0), "amax")


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, accurate at both ends."""
    return torch.where(x < -math.log(2), torch.log1p(-x.exp()), torch.log(-torch.expm1(x)))


def _binary_ce(teacher: Chunks, student: Chunks, temperature: float) -> Chunks:
    a, b = teacher / temperature - EPSILON, student / temperature - EPSILON
    return -(a.exp() * b + (1 - a.exp()) * log1mexp(b))


def _binary_kl(teacher: Chunks, student: Chunks, temperature: float) -> Chunks:
    a, b = teacher / temperature - EPSILON, student / temperature - EPSILON
    return a.exp() * (a - b) + (1 - a.exp()) * (log1mexp(a) - log1mexp(b))


def _kl_limit(teacher: Chunks, student: Chunks, temperature: float) -> Chunks:
    """Limit of temperature * KL as the temperature grows."""
    a, b = teacher - EPSILON, student - EPSILON
    return (a - b) + a * (b / a).log()


def _renyi(teacher: Chunks, student: Chunks, order: float) -> Chunks:
    if order == 1:  # what it goes to there
        return _binary_kl(teacher, student, 1.0)
    a, b = teacher - EPSILON, student - EPSILON
    both = torch.logaddexp(order * a + (1 - order) * b, order * log1mexp(a) + (1 - order) * log1mexp(b))
    return both / (order - 1)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "kl": _binary_kl,
    "ce": _binary_ce,
    "reverse_kl": lambda teacher, student, temperature: _binary_kl(student, teacher, temperature),
    "kl_limit": _kl_limit,
    "abs": lambda teacher, student, temperature: (teacher - student).abs(),
    "tvd": lambda teacher, student, temperature: (
        (teacher / temperature - EPSILON).exp() - (student / temperature - EPSILON).exp()
    ).abs(),
    "k2": lambda teacher, student, temperature: ((teacher - student) / temperature).square() / 2,
    "k3": lambda teacher, student, temperature: (
        torch.expm1((teacher - student) / temperature) - (teacher - student) / temperature
    ),
}
