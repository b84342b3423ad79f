"""Where the time of a training step goes, in parts of what a plain loop over the same rows takes; one thread, CPU time.

The plain loop is Transformers code over batches that are ready, padded to their longest row: `model(ids, labels).loss`,
its backward pass, the clip and AdamW; where there is a teacher, its logits too. Beside it stand the parts of
tokenkit's step, its data among them, and the operations of torch's profiler that take longest. Medians over
interleaved repeats. Usage: python -m benchmarks.step_profile [--settings small large] [--repeats 7] [--operations 12]
Needs the shared data folder.
"""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.trl_training_models import SETTINGS, make_models, windows
from tokenkit.data.batch import Batch, Batches
from tokenkit.models.load import load_model
from tokenkit.models.view import ModelView
from tokenkit.objective import LossesConfig, Objective
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.train.audit import PARTS, Clock
from tokenkit.train.optimizer import build_optimizer
from tokenkit.train.schema import OptimizerConfig
from tokenkit.train.step import Beside, accumulate_gradients
from tokenkit.train.tasks.distill import TextTask

BATCH_ROWS, STEPS = 4, 4
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, schedule="constant", max_grad_norm=1.0)


class ProcessorClock(Clock):
    """Processor seconds instead of those of a wall clock: other programs of the machine do not count."""

    def _now(self) -> float:
        return time.process_time()


class Bench:
    """A student, alone or under a teacher with another tokenizer."""

    def __init__(self, folder: Path, losses: dict, teacher: bool):
        self.student, tokenizer = (
            ModelView(load_model(str(folder / "student"))),
            load_tokenizer(str(folder / "student")),
        )
        self.teacher = ModelView(load_model(str(folder / "other"))) if teacher else None
        other = load_tokenizer(str(folder / "other")) if teacher else None
        objective = Objective.of(LossesConfig.model_validate(losses))
        self.task = TextTask(objective, self.student, tokenizer, self.teacher, other)
        self.task.train_mode(True)
        self.batches = Batches(windows(), tokenizer, other, batch_size=BATCH_ROWS, seed=0)
        self.ready = [self.batches.at(step)[0] for step in range(STEPS)]
        self.optimizer = build_optimizer(self.task.trainable(), OPTIMIZER)

    def plain(self) -> None:
        """The same steps without tokenkit."""
        parameters = list(self.student.model.parameters())
        for batch in self.ready:
            self.optimizer.zero_grad(set_to_none=True)
            inputs, labels = _unpadded(batch)
            self.student.model(input_ids=inputs, labels=labels, use_cache=False).loss.backward()
            if self.teacher is not None:
                with torch.no_grad():
                    mask = batch.tensors["teacher_token_mask"]
                    longest = int(mask.sum(1).max()) + 1
                    self.teacher.model(input_ids=batch.tensors["teacher_inputs"][:, :longest], use_cache=False)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            self.optimizer.step()

    def step(self, number: int, clock: Clock) -> None:
        """What the training loop does in a step."""
        with clock("data"):
            batches = self.batches.at(number)
        with clock("losses"):
            self.optimizer.zero_grad(set_to_none=True)
            result = accumulate_gradients(self.task, batches, number, beside=Beside(clock))
        with clock("optimizer"):
            trained = [p for p in self.task.trainable().values() if p.grad is not None]
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
            assert math.isfinite(result.loss + norm)
            self.optimizer.step()

    def ours(self) -> dict[str, float]:
        """The parts of the steps."""
        clock = ProcessorClock()
        for number in range(STEPS):
            self.step(number, clock)
        return clock.read()

    def operations(self, rows: int) -> str:
        """The profiler's table of a step."""
        with profile(activities=[ProfilerActivity.CPU]) as found:
            self.step(0, Clock())
        return found.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=40)


def _unpadded(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids up to the longest row's last, and labels as Transformers has them, which shifts them itself."""
    longest = int(batch.tensors["student_token_mask"].sum(1).max()) + 1
    inputs = batch.tensors["student_inputs"][:, :longest]
    labels = torch.full_like(inputs, -100)
    scored = batch.tensors["student_labels"][:, : longest - 1]
    labels[:, 1:] = torch.where(scored >= 0, scored, -100)
    return inputs, labels


def timed(job: Callable[[], object]) -> float:
    began = time.process_time()
    job()
    return time.process_time() - began


def table(setting: str, benches: dict[str, Bench], repeats: int) -> str:
    """The parts of each bench's steps, as shares of its plain loop's time."""
    plain: dict[str, list[float]] = {name: [] for name in benches}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in benches}
    for repeat in range(repeats + 1):
        for name, bench in benches.items():
            seconds, found = timed(bench.plain), bench.ours()
            if repeat:  # the first round warms caches
                plain[name].append(seconds)
                parts[name].append(found)
    lines = [
        f"| {setting}: step / plain loop | {' | '.join([*PARTS, 'whole'])} |",
        f"| --- |{' ---: |' * (len(PARTS) + 1)}",
    ]
    for name in benches:
        whole = statistics.median(plain[name])
        shares = [statistics.median(found[part] for found in parts[name]) / whole for part in PARTS]
        all_parts = statistics.median(sum(found.values()) for found in parts[name]) / whole
        lines.append(f"| {name} | {' | '.join(f'{share:.3f}' for share in shares)} | **{all_parts:.3f}** |")
    return "\n".join(lines)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", choices=SETTINGS, nargs="+", default=list(SETTINGS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--operations", type=int, default=0, help="of the profiler's table that are printed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for setting in options.settings:
        with tempfile.TemporaryDirectory() as folder:
            make_models(setting, Path(folder))
            benches = {
                "CLM": Bench(Path(folder), {"clm": {}}, False),
                "ALM, live teacher": Bench(Path(folder), {"alm": {}}, True),
            }
        print(f"\n{table(setting, benches, options.repeats)}", flush=True)
        for name, bench in benches.items() if options.operations else ():
            print(f"\n{setting}, {name}:\n{bench.operations(options.operations)}", flush=True)


if __name__ == "__main__":
    main()
