"""What the loop asks of a task and of its batches: a batch becomes named tensors, and the loop knows nothing else."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tokenkit.data.batch import Batch
from tokenkit.objective import Objective


@runtime_checkable
class Stateful(Protocol):
    """Something with a memory of its own, where (seed, step) do not say it all."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold of it."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `state` gave."""
        ...


@runtime_checkable
class Task(Stateful, Protocol):
    """Parameters that are learnt, and what the losses ask of them."""

    @property
    def objective(self) -> Objective:
        """The losses."""
        ...

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        ...

    @property
    def pair(self) -> Mapping[str, Tensor]:
        """Tensors that are the same for every batch."""
        ...

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are learnt, by name."""
        ...

    def modules(self) -> list[nn.Module]:
        """What these parameters are part of, which tells what each of them is."""
        ...

    def last_layer(self) -> list[nn.Parameter]:
        """What balances that look at the last layer alone look at."""
        ...

    def train_mode(self, on: bool) -> None:
        """Training, or evaluation."""
        ...

    def gradients_ready(self, step: int) -> None:
        """The gradients of a step, counted from 0, are added up: those that shall not reach the optimizer go."""
        ...

    def stepped(self, step: int, steps: int) -> None:
        """Optimizer step number `step`, counted from 1, is done; schedules are laid out over `steps`."""
        ...

    def teacher_tensors(self, batch: Batch) -> dict[str, Tensor]:
        """What the losses ask of a teacher, without gradients."""
        ...

    def student_tensors(
        self, batch: Batch, teacher: Mapping[str, Tensor], means: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What the losses ask of that which is learnt."""
        ...


@runtime_checkable
class StepBatches(Stateful, Protocol):
    """Step → microbatches."""

    def at(self, step: int, num_microbatches: int = 1, rank: int = 0, ranks: int = 1) -> list[Batch]:
        """The microbatches of a step counted from 0, together always the same rows.

        Of several processes each gets its share: microbatch i of `rank` is part i * ranks + rank of the step.
        """
        ...

    def place(self, step: int) -> str:
        """Where the rows of a step come from, for messages."""
        ...
