"""Steps of a student taught from a record of its teacher's 64 best ids, beside steps under the live teacher. CPU time.

The embedded model (4.26 million weights) teaches one of a quarter of its size. A whole step is timed: rows tokenised,
what was recorded read from disk, both passes, the optimizer. Beside it stands what the record leaves out: KL of all
ids, and of the best ones with the rest as one, of a student that has been taught a little.
Usage: python benchmarks/record_speed.py [--steps 30] [--top_k 64]
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from tokenkit.config import build
from tokenkit.data.corpus import read_training_rows
from tokenkit.losses import LOSSES
from tokenkit.train.optimizer import build_optimizer
from tokenkit.train.step import accumulate_gradients
from tokenkit.verbs.distill import batches_of, task_of
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.prepare import prepare
from tokenkit.verbs.record import RecordRun, record
from tokenkit.verbs.sides import objective_of

TEACHER = "tokenkit/assets/demo_teacher"
STUDENT = {"config": {"hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": 2}, "start": "random"}
DATA = {"source": {"stdlib": "train", "max_bytes": 400_000}, "window_bytes": 512}


def run_of(folder: Path, **changes: object) -> DistillRun:
    values = {
        "output": folder / "out",
        "model": {"source": TEACHER},
        "student": STUDENT,
        "data": DATA,
        "train": {"steps": 1000, "batch_size": 8, "device": "cpu"},
        "eval": {"source": {"stdlib": "held_out", "max_bytes": 4096}},
    }
    return build(DistillRun, values | changes)


class Side:
    """A run that can make its next step."""

    def __init__(self, run: DistillRun):
        rows = read_training_rows(run.data)
        self.sides = prepare(run, rows)
        objective = objective_of(run.losses, self.sides)
        self.batches = batches_of(run, self.sides, objective, rows)
        self.task = task_of(run, self.sides, objective)
        self.optimizer = build_optimizer(self.task.trainable(), run.train.optimizer)
        self.seconds: list[float] = []
        self.number = 0

    def step(self) -> float:
        began = time.process_time()
        self.optimizer.zero_grad(set_to_none=True)
        result = accumulate_gradients(self.task, self.batches.at(self.number), self.number)
        self.optimizer.step()
        self.seconds.append(time.process_time() - began)
        self.number += 1
        return result.loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--top_k", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kept = {"output": folder / "record", "teacher": {"source": TEACHER}, "data": DATA, "top_k": arguments.top_k}
        done = record(build(RecordRun, kept | {"store": "float16"}), quiet=True)
        live = Side(run_of(folder, losses={"forward_kl": {}}))
        recorded = Side(run_of(folder, losses={"top_k_kl": {"top_k": arguments.top_k}}, record=folder / "record"))
        sizes = [sum(p.numel() for p in live.sides.student.model.parameters())]
        sizes.append(sum(p.numel() for p in live.sides.teacher.model.parameters()))
        for _ in range(arguments.steps):
            losses = live.step(), recorded.step()
        medians = [statistics.median(side.seconds[2:]) for side in (live, recorded)]
        full, tail = kl_of(live, arguments.top_k)
    print(f"student {sizes[0]:,} weights, teacher {sizes[1]:,} ({sizes[1] / sizes[0]:.1f} times)")
    print(f"record: {done['bytes_per_token']:.1f} bytes per token, top {arguments.top_k}, float16")
    print(f"a step from the record takes {medians[1] / medians[0]:.2f} of one under the live teacher")
    print(f"(medians of {arguments.steps - 2} steps in turn, CPU time; {medians[0] / medians[1]:.2f} times as fast)")
    print(f"losses of the last step: all ids {losses[0]:.4f}, best {arguments.top_k} and the rest {losses[1]:.4f}")
    print(f"the same student and rows: KL of all ids {full:.4f} nats, of the best and the rest {tail:.4f}")


@torch.no_grad()
def kl_of(side: Side, top_k: int) -> tuple[float, float]:
    """KL per token of all ids and of the best ones with the rest as one, of the live run's student on further rows."""
    sums, count = torch.zeros(2, dtype=torch.float64), 0
    for number in range(40, 44):
        (batch,) = side.batches.at(number)
        inputs, labels = batch.tensors["student_inputs"], batch.tensors["student_labels"]
        needs = {"logits", "top_logp", "top_ids", "tail_logp"}
        teacher = side.sides.teacher.leaves(needs, inputs, labels, top_k=top_k)
        student = side.sides.student.leaves(needs, inputs, labels, top_ids=teacher["top_ids"])
        full = LOSSES["forward_kl"].fn(student["logits"], teacher["logits"])
        best = [student["top_logp"], student["tail_logp"], teacher["top_logp"], teacher["tail_logp"]]
        tail = LOSSES["top_k_kl"].fn(*best, top_k=top_k)
        mask = labels >= 0
        sums += torch.stack([full[mask].double().sum(), tail[mask].double().sum()])
        count += int(mask.sum())
    return tuple((sums / count).tolist())


if __name__ == "__main__":
    main()
