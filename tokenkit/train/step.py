"""The gradients of one optimizer step: count the units of the whole step first, then divide."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from tokenkit.data.batch import Batch
from tokenkit.losses import Units
from tokenkit.quantities import Quantities
from tokenkit.train.balance import Balance
from tokenkit.train.tasks.distill import TextTask


@dataclass(frozen=True)
class StepResult:
    """Mean of each loss over the step, how many units of it counted, and the weighted sum of the means."""

    loss: float
    losses: dict[str, float]
    units: dict[str, int]
    num_tokens: int
    num_bytes: int
    weights: dict[str, float] = field(default_factory=dict)
    """What each loss's gradient was multiplied with."""


def accumulate_gradients(
    task: TextTask,
    batches: list[Batch],
    seed: int,
    balance: Balance | None = None,
    weights: Mapping[str, float] | None = None,
) -> StepResult:
    """Adds the step's gradients to the trainable parameters; cut into microbatches in any way, they are the same.

    `seed` decides the dropout of each microbatch, so that a resumed run draws the same. `weights` are the
    run file's at this step, those without a schedule where none are given.
    """
    objective = task.objective
    weights = objective.weights() if weights is None else weights
    prepared: list[tuple[Batch, dict[str, Tensor] | None, dict[str, Units]]] = []
    for batch in batches:
        batch = batch.to(task.device)
        teacher = task.teacher_tensors(batch) if objective.counting_needs_teacher else None
        prepared.append((batch, teacher, objective.units(Quantities(batch.tensors, teacher or {}))))
    counts = {n: sum(units[n].count.double().sum().item() for _, _, units in prepared) for n in objective.weights()}

    def shares(number: int) -> dict[str, Tensor]:
        """What a microbatch adds to the mean of each loss over the step; a loss without units is left out."""
        batch, teacher, units = prepared[number]
        teacher = task.teacher_tensors(batch) if teacher is None else teacher
        torch.manual_seed(seed + number)
        sums = objective.sums(Quantities(batch.tensors, teacher, task.student_tensors(batch)), units)
        return {name: value / counts[name] for name, value in sums.items() if counts[name]}

    shared = (balance or Balance()).backward([partial(shares, number) for number in range(len(prepared))], weights)
    means = {name: shared.means.get(name, 0.0) for name in counts}
    return StepResult(
        sum(weight * means[name] for name, weight in weights.items()),
        means,
        {name: sum(int((units[name].weight > 0).sum()) for _, _, units in prepared) for name in counts},
        sum(batch.num_tokens for batch in batches),
        sum(batch.num_bytes for batch in batches),
        shared.weights,
    )
