"""The gradients of one optimizer step: count the units of the whole step first, then divide."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenkit.data.batch import Batch
from tokenkit.quantities import Quantities
from tokenkit.train.tasks.distill import TextTask


@dataclass(frozen=True)
class StepResult:
    """Mean of each loss over the step's units, how many units it had, and the weighted sum."""

    loss: float
    losses: dict[str, float]
    units: dict[str, int]
    num_tokens: int
    num_bytes: int


def accumulate_gradients(task: TextTask, batches: list[Batch], seed: int) -> StepResult:
    """Adds the step's gradients to the trainable parameters; cut into microbatches in any way, they are the same.

    `seed` decides the dropout of each microbatch, so that a resumed run draws the same.
    """
    objective = task.objective
    prepared: list[tuple[Batch, dict[str, Tensor] | None, dict[str, Tensor]]] = []
    for batch in batches:
        batch = batch.to(task.device)
        teacher = task.teacher_tensors(batch) if objective.counting_needs_teacher else None
        prepared.append((batch, teacher, objective.masks(Quantities(batch.tensors, teacher or {}))))
    units = {name: sum(int(masks[name].sum()) for _, _, masks in prepared) for name in objective.weights()}
    totals = dict.fromkeys(units, 0.0)
    for number, (batch, teacher, masks) in enumerate(prepared):
        teacher = task.teacher_tensors(batch) if teacher is None else teacher
        torch.manual_seed(seed + number)
        sums = objective.sums(Quantities(batch.tensors, teacher, task.student_tensors(batch)), masks)
        weighted = [w * sums[name] / units[name] for name, w in objective.weights().items() if units[name]]
        if weighted:
            torch.stack(weighted).sum().backward()
        for name, value in sums.items():
            totals[name] += value.item()
    means = {name: total / max(1, units[name]) for name, total in totals.items()}
    return StepResult(
        sum(weight * means[name] for name, weight in objective.weights().items()),
        means,
        units,
        sum(batch.num_tokens for batch in batches),
        sum(batch.num_bytes for batch in batches),
    )
