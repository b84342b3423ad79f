"""The gradients of one optimizer step: count the units of the whole step first, then divide."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from tokenkit.data.batch import Batch
from tokenkit.losses import Units
from tokenkit.quantities import Quantities
from tokenkit.train.audit import Clock
from tokenkit.train.balance import Balance, Forward
from tokenkit.train.noise import Noise
from tokenkit.train.parallel import add_gradients, ranks, total
from tokenkit.train.tasks import Task


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


@dataclass(frozen=True)
class Beside:
    """What may go along with a step: a clock for its parts, noise, a look at its losses before they are balanced."""

    clock: Clock = field(default_factory=Clock)
    noise: Noise | None = None
    look: Callable[[Sequence[Forward], Mapping[str, float]], Sequence[Forward]] | None = None
    """Gets the microbatches as a balance does, and returns them for the balance."""
    scaled: Callable[[Tensor], Tensor] | None = None
    """A loss with the same value whose gradient is multiplied by what half precision needs."""


def accumulate_gradients(
    task: Task,
    batches: list[Batch],
    seed: int,
    balance: Balance | None = None,
    weights: Mapping[str, float] | None = None,
    beside: Beside | None = None,
) -> StepResult:
    """Adds the step's gradients to the trainable parameters; cut into microbatches in any way, they are the same.

    Processes of a run that read different rows of the step all end with the gradients of the whole of it.

    `seed` decides the dropout of each microbatch, so that a resumed run draws the same. `weights` are the
    run file's at this step, those without a schedule where none are given.
    """
    objective, beside = task.objective, beside or Beside()
    weights = objective.weights() if weights is None else weights
    clock = beside.clock
    read = _Reading(task, batches, seed, beside)
    counts = {name: total(torch.stack([u[name].counts() for u in read.units]).sum(0)) for name in objective.weights()}

    def shares(number: int) -> dict[str, Tensor]:
        """What a microbatch adds to the mean of each loss over the step; a loss without units is left out."""
        tensors, found = read.tensors(number), {}
        with clock("losses"):
            for name, value in objective.sums(tensors, read.units[number]).items():
                counted = counts[name] > 0
                if counted.any():
                    share = (value[counted] / counts[name][counted].to(value.dtype)).sum()
                    found[name] = share if beside.scaled is None else beside.scaled(share)
        return found

    forwards: Sequence[Forward] = [partial(shares, number) for number in range(len(batches))]
    with clock("backward"):  # what it spends on the forward passes inside counts for those
        if beside.look is not None:
            forwards = beside.look(forwards, weights)
        shared = (balance or Balance()).backward(forwards, weights)
        add_gradients(task.trainable().values())
    units = [sum(int((own[name].weight > 0).sum()) for own in read.units) for name in counts]
    read_here = [sum(batch.num_tokens for batch in batches), sum(batch.num_bytes for batch in batches)]
    *units, num_tokens, num_bytes = total(torch.tensor([*units, *read_here])).tolist()
    means = {name: shared.means.get(name, 0.0) for name in counts}
    return StepResult(
        sum(weight * means[name] for name, weight in weights.items()),
        means,
        dict(zip(counts, units)),
        num_tokens,
        num_bytes,
        shared.weights,
    )


class _Reading:
    """The tensors of a step's microbatches, and what must be known of all of them before the first backward pass.

    Where counting needs the teacher it reads everything first, and what is small enough is kept. Where it needs the
    student too, the student reads a single microbatch once, and several of them a second time without gradients.
    """

    def __init__(self, task: Task, batches: list[Batch], seed: int, beside: Beside):
        self.task, self.beside = task, beside
        here = ranks()  # dropout is a function of which part of the whole step is read
        self._seeds = [seed + number * here.data + here.data_rank for number in range(len(batches))]
        with beside.clock("data"):
            self.batches = [batch.to(task.device) for batch in batches]
        objective = task.objective
        self._teacher: dict[int, dict[str, Tensor]] = {}
        self._student: dict[int, dict[str, Tensor]] = {}
        numbers = range(len(batches))
        alone = len(batches) == 1
        early = objective.counting_needs_teacher
        teachers = {number: self._teach(number) if early else {} for number in numbers}
        parts = [Quantities(self._data(number), teachers[number]) for number in numbers]
        self.means = objective.step_means(parts, total)
        self.units: list[dict[str, Units]] = []
        for number in numbers:
            student: dict[str, Tensor] = {}
            if objective.counting_needs_student:
                with torch.set_grad_enabled(alone):
                    student = self._read(number, teachers[number])
            self.units.append(objective.units(Quantities(self._data(number), teachers[number], self.means, student)))
            if alone and student:
                self._student[number] = student
        if early:
            kept = {n: t for n, t in teachers.items() if alone or all(v.ndim < 3 for v in t.values())}
            self._teacher = kept  # logits and hidden states of a whole step are more than fits: these are read again

    def tensors(self, number: int) -> Quantities:
        """Everything that is known of a microbatch, the student's with gradients."""
        teacher = self._teacher.get(number)
        if teacher is None:
            teacher = self._teach(number)
        student = self._student.pop(number, None)
        if student is None:
            student = self._read(number, teacher)
        return Quantities(self._data(number), teacher, self.means, student)

    def _data(self, number: int) -> dict[str, Tensor]:
        return self.batches[number].tensors | dict(self.task.pair)

    def _teach(self, number: int) -> dict[str, Tensor]:
        noise = self.beside.noise
        with self.beside.clock("teacher"):
            found = self.task.teacher_tensors(self.batches[number])
            return noise.teacher(found, self._seeds[number]) if noise else found

    def _read(self, number: int, teacher: dict[str, Tensor]) -> dict[str, Tensor]:
        noise, batch, seed = self.beside.noise, self.batches[number], self._seeds[number]
        with self.beside.clock("student_forward"), noise.student(batch, seed) if noise else nullcontext():
            torch.manual_seed(seed)
            return self.task.student_tensors(batch, teacher, self.means)
