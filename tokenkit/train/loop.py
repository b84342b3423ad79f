"""The loop: fetch, gradients, clip, step, and five plain ifs: measure, log, save, stop, done."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from tokenkit.config import UserError
from tokenkit.data.batch import Batches
from tokenkit.train.balance import Balance, build_balance
from tokenkit.train.checkpoint import Progress, list_checkpoints, load_newest, read_balance, save_checkpoint
from tokenkit.train.folder import RunFolder
from tokenkit.train.optimizer import build_optimizer, learning_rate_factor, set_learning_rate
from tokenkit.train.schema import TrainConfig
from tokenkit.train.step import StepResult, accumulate_gradients
from tokenkit.train.tasks.distill import TextTask


class Interrupted(Exception):
    """The run was asked to stop; its state is saved. `signal_number` is 0 for `train.stop_after`."""

    def __init__(self, step: int, signal_number: int):
        super().__init__(f"stopped after step {step}; continue with --resume")
        self.signal_number = signal_number


@dataclass
class StopRequest:
    """The signal that asked for an end, if one did."""

    signal_number: int = 0


def train(
    task: TextTask,
    batches: Batches,
    config: TrainConfig,
    folder: RunFolder,
    evaluate: Callable[[], dict[str, float]],
    *,
    label: str = "train",
    quiet: bool = False,
) -> Progress:
    """Trains to `config.steps`, from the newest checkpoint if the folder has one; Interrupted if asked to leave."""
    parameters = task.trainable()
    optimizer = build_optimizer(parameters, config.optimizer)
    names = list(task.objective.weights())
    balance = build_balance(config.balance, names, task.student.model, list(parameters.values()))
    progress = load_newest(folder.checkpoints, parameters, optimizer)
    if progress is None:
        progress = Progress()
        if 0 in config.eval_at and not folder.logged("bits_per_byte"):
            folder.log({"step": 0, **evaluate()})
    else:
        balance.state |= read_balance(folder.checkpoints, progress.step)
    folder.truncate_metrics(progress.step)
    task.train_mode(True)
    with _stop_signals() as stop, _progress_bar(label, config.steps, progress.step, quiet) as advance:
        while progress.step < config.steps:
            began = time.perf_counter()
            result, norm, rate = _step(task, batches, config, optimizer, balance, progress.step, folder)
            progress = Progress(
                progress.step + 1, progress.num_tokens + result.num_tokens, progress.num_bytes + result.num_bytes
            )
            speed = result.num_tokens / (time.perf_counter() - began)
            advance(result.loss, speed)
            leaving = stop.signal_number != 0 or progress.step == config.stop_after
            last = progress.step == config.steps
            if progress.step % config.log_every == 0 or last:
                folder.log(_metrics(progress, result, norm, rate, speed))
            if progress.step in config.eval_at:
                task.train_mode(False)
                folder.log({"step": progress.step, **evaluate()})
                task.train_mode(True)
            if progress.step % config.save_every == 0 or last or leaving:
                keep = config.keep_checkpoints
                save_checkpoint(folder.checkpoints, parameters, optimizer, progress, keep, balance.state)
            if leaving and not last:
                raise Interrupted(progress.step, stop.signal_number)
    task.train_mode(False)
    return progress


def _step(
    task: TextTask,
    batches: Batches,
    config: TrainConfig,
    optimizer: torch.optim.Optimizer,
    balance: Balance,
    step: int,
    folder: RunFolder,
) -> tuple[StepResult, float, float]:
    optimizer.zero_grad(set_to_none=True)
    seed = (config.seed * 1_000_003 + step) * 1_009  # one stream per step, whatever happened before it
    weights = task.objective.weights_at(step, config.steps)
    result = accumulate_gradients(task, batches.at(step, config.accumulation), seed, balance, weights)
    trained = [p for p in task.trainable().values() if p.grad is not None]
    limit = config.optimizer.max_grad_norm
    norm = torch.nn.utils.clip_grad_norm_(trained, math.inf if limit is None else limit).item()
    if not (math.isfinite(result.loss) and math.isfinite(norm)):
        raise UserError(_not_finite(result, norm, step, batches, folder))
    rate = config.optimizer.learning_rate * learning_rate_factor(step, steps=config.steps, config=config.optimizer)
    set_learning_rate(optimizer, rate)
    optimizer.step()
    return result, norm, rate


def _not_finite(result: StepResult, norm: float, step: int, batches: Batches, folder: RunFolder) -> str:
    rows = batches.rows(step)
    places = ", ".join(f"document {w.document} byte {w.start_byte}" for w in (batches.windows[row] for row in rows[:3]))
    kept = list_checkpoints(folder.checkpoints)
    good = f"the last good checkpoint is {kept[0]}" if kept else "no checkpoint had been saved yet"
    what = f"the loss is {result.loss}" if not math.isfinite(result.loss) else f"the gradient norm is {norm}"
    return (
        f"step {step + 1}: {what} in the batch of rows {rows[:8]}{'…' if len(rows) > 8 else ''} ({places}"
        f"{', …' if len(rows) > 3 else ''}); stopped, {good}; lower train.optimizer.learning_rate or look at these rows"
    )


def _metrics(progress: Progress, result: StepResult, norm: float, rate: float, speed: float) -> dict[str, float | int]:
    return {
        "step": progress.step,
        "loss": result.loss,
        **{f"loss/{name}": value for name, value in result.losses.items()},
        **{f"weight/{name}": value for name, value in result.weights.items()},
        **{f"units/{name}": count for name, count in result.units.items()},
        "gradient_norm": norm,
        "learning_rate": rate,
        "tokens": progress.num_tokens,
        "bytes": progress.num_bytes,
        "tokens_per_second": round(speed, 1),
    }


@contextmanager
def _stop_signals() -> Iterator[StopRequest]:
    """SIGINT and SIGTERM ask the loop to save and leave after the step at hand; a second SIGINT stops at once."""
    request = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        if request.signal_number == signal.SIGINT == number:
            raise KeyboardInterrupt
        request.signal_number = number

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress_bar(label: str, steps: int, done: int, quiet: bool) -> Iterator[Callable[[float, float], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with ProgressBar(*columns, console=Console(stderr=True), disable=quiet, transient=True) as bar:
        task = bar.add_task(label, total=steps, completed=done, loss=math.nan, speed=0.0)
        yield lambda loss, speed: bar.update(task, advance=1, loss=loss, speed=speed)
