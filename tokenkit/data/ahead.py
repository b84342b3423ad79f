"""Coming steps are tokenised and aligned by other processes while a step is computed; what they hold stays the same.

The rows of a step follow from its number, so a process needs nothing but that. It is forked when the first step is
asked for, and shares the corpus with the run until then. Each has at most two steps ready.
"""

import signal
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from multiprocessing import get_all_start_methods
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tokenkit.config import UserError
from tokenkit.data.batch import Batch

READY = 2  # steps that a process has ready at most

Request = tuple[int, int, int]  # microbatches, rank, ranks


@runtime_checkable
class Numbered(Protocol):
    """Batches that follow from the number of their step alone."""

    def at(self, step: int, num_microbatches: int = 1, rank: int = 0, ranks: int = 1) -> list[Batch]:
        """The microbatches of a step."""
        ...

    def place(self, step: int) -> str:
        """Where the rows of a step come from, for messages."""
        ...

    def rows_read(self, steps: int) -> dict[str, int]:
        """How many rows of each source the first steps read."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing to put back."""
        ...


class Around:
    """Batches that are made of other ones, which say and remember all but what a step holds."""

    def __init__(self, batches: Numbered):
        self.batches = batches

    def place(self, step: int) -> str:
        """Where the rows of a step come from, for messages."""
        return self.batches.place(step)

    def rows_read(self, steps: int) -> dict[str, int]:
        """How many rows of each source the first steps read."""
        return self.batches.rows_read(steps)

    def state(self) -> dict[str, Tensor]:
        """What the batches remember: nothing, where a step follows from its number."""
        return self.batches.state()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts it back."""
        self.batches.load_state(tensors)


class _Steps(Dataset):
    """A step's microbatches by its number; a user's error is a value, for it has to stay one line."""

    def __init__(self, batches: Numbered, request: Request):
        self.batches, self.request = batches, request

    def __getitem__(self, index: int) -> list[Batch] | str:
        try:
            return self.batches.at(index, *self.request)
        except UserError as error:
            return str(error)


class Ahead(Around):
    """Other batches, made by processes. Where a step is not the one after the last, they begin again with it."""

    def __init__(self, batches: Numbered, workers: int):
        super().__init__(batches)
        self.workers = workers
        self._coming: Iterator[list[Batch] | str] | None = None
        self._next: tuple[int, Request] = (-1, (0, 0, 0))

    def at(self, step: int, num_microbatches: int = 1, rank: int = 0, ranks: int = 1) -> list[Batch]:
        """The microbatches of a step."""
        request = num_microbatches, rank, ranks
        if self._coming is None or self._next != (step, request):
            self.close()
            self._coming = self._begun(step, request)
        found = next(self._coming)
        self._next = step + 1, request
        if isinstance(found, str):
            self.close()
            raise UserError(found)
        return found

    def close(self) -> None:
        """Ends the processes, and waits for that."""
        self._coming = None  # the last reference: the loader ends its processes

    def _begun(self, step: int, request: Request) -> Iterator[list[Batch] | str]:
        options: dict[str, Any] = {
            "sampler": count(step),
            "num_workers": self.workers,
            "prefetch_factor": READY,
            "collate_fn": _as_it_is,
            "multiprocessing_context": "fork",
            "worker_init_fn": _left_alone,
            "generator": torch.Generator(),  # of its own, or beginning would draw from the run's
        }
        with warnings.catch_warnings():
            # the processes only tokenise: they touch none of the threads that a fork leaves behind
            warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
            warnings.filterwarnings("ignore", "This DataLoader will create .* worker processes", UserWarning)
            return iter(DataLoader(_Steps(self.batches, request), batch_size=None, **options))


def _as_it_is(value: Any) -> Any:
    return value


def _left_alone(number: int) -> None:
    """The run alone answers to signals, also to those that all its processes get, and finishes its step first."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)


@contextmanager
def made_ahead(batches: Numbered, workers: int) -> Iterator[Numbered]:
    """The batches, made by so many processes, which end with the block however it ends; 0: as they are."""
    if workers == 0:
        yield batches
        return
    if "fork" not in get_all_start_methods():
        raise UserError(f"data.workers: {workers}, but this system cannot fork processes; write workers=0")
    ahead = Ahead(batches, workers)
    try:
        yield ahead
    finally:
        ahead.close()
