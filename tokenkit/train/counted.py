"""Batches that count what they hold: tokens, tokens that are learnt, and places that only fill a row up."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tokenkit.data.batch import Batch
from tokenkit.train.parallel import total
from tokenkit.train.tasks import StepBatches

NAMES = ("positions", "tokens", "learnt", "steps")


class Counted:
    """Other batches, counted on the student's side. Counts go into checkpoints, so a resumed run goes on counting."""

    def __init__(self, batches: StepBatches):
        self.batches = batches
        self.counts = dict.fromkeys(NAMES, 0)
        """`positions` that were computed, `tokens` that rows hold, tokens that are `learnt`; over so many `steps`."""

    def at(self, step: int, num_microbatches: int = 1, rank: int = 0, ranks: int = 1) -> list[Batch]:
        """The microbatches of a step, which count from here on."""
        parts = self.batches.at(step, num_microbatches, rank, ranks)
        own = [0, 0, 0]
        for part in parts:
            inputs = part.tensors["student_inputs"]
            own[0] += part.tensors.get("student_positions", inputs).numel()
            # the last token of a row has nothing after it, and is read all the same
            own[1] += int(part.tensors["student_token_mask"].sum()) + len(inputs)
            own[2] += part.num_tokens
        for name, value in zip(NAMES, [*total(torch.tensor(own)).tolist(), 1]):
            self.counts[name] += value
        return parts

    def place(self, step: int) -> str:
        """Where the rows of a step come from."""
        return self.batches.place(step)

    def state(self) -> dict[str, Tensor]:
        """The counts, beside what the batches remember."""
        return self.batches.state() | {"counts": torch.tensor([self.counts[name] for name in NAMES])}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts the counts back; a checkpoint of an older version has none."""
        if "counts" in tensors:
            self.counts = dict(zip(NAMES, tensors["counts"].tolist()))
        self.batches.load_state({name: tensor for name, tensor in tensors.items() if name != "counts"})
