"""The loop: fetch, gradients, clip, step, and five plain ifs: measure, log, save, stop, done."""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from tokenkit.config import UserError
from tokenkit.train.balance import build_balance
from tokenkit.train.checkpoint import Checkpoints, Progress, StepFolders, Training
from tokenkit.train.folder import RunFolder
from tokenkit.train.optimizer import build_optimizer, learning_rate_factor, set_learning_rate
from tokenkit.train.schema import BestConfig, LoopConfig
from tokenkit.train.step import StepResult, accumulate_gradients
from tokenkit.train.tasks import StepBatches, Task


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
    task: Task,
    batches: StepBatches,
    config: LoopConfig,
    folder: RunFolder,
    evaluate: Callable[[], dict[str, float]],
    *,
    checkpoints: Checkpoints | None = None,
    label: str = "train",
    quiet: bool = False,
) -> Progress:
    """Trains to `config.steps`, from the newest checkpoint if there is one; Interrupted if asked to leave.

    `checkpoints` are the run folder's step folders where nothing else is given.
    """
    checkpoints = checkpoints or StepFolders(folder.checkpoints)
    training = _training(task, batches, config)
    progress = checkpoints.load(training)
    if progress is None:
        progress = Progress()
        if 0 in config.eval_at and 0 not in folder.logged("step"):
            folder.log({"step": 0, **evaluate()})
    folder.truncate_metrics(progress.step)
    task.train_mode(True)
    with _stop_signals() as stop, _progress_bar(label, config.steps, progress.step, quiet) as advance:
        while progress.step < config.steps and not is_enough(progress, config):
            began = time.perf_counter()
            result, norm, rate = _step(task, batches, config, training, progress.step, checkpoints)
            task.stepped(progress.step + 1, config.horizon)
            progress = progress.after(result.loss, result.num_tokens, result.num_bytes)
            speed = result.num_tokens / (time.perf_counter() - began)
            advance(result.loss, speed)
            leaving = stop.signal_number != 0 or progress.step == config.stop_after
            last = progress.step == config.steps
            if progress.step % config.log_every == 0 or last:
                folder.log(_metrics(progress, result, norm, rate, speed))
            if _is_measured(progress.step, config):
                task.train_mode(False)
                values = evaluate()
                task.train_mode(True)
                folder.log({"step": progress.step, **values})
                progress, improved = judged(progress, values, config.best)
                checkpoints.measured(training, progress, improved)
            last = last or is_enough(progress, config)
            if progress.step % config.save_every == 0 or last or leaving:
                checkpoints.save(training, progress, config.keep_checkpoints, last)
            if leaving and not last:
                raise Interrupted(progress.step, stop.signal_number)
    task.train_mode(False)
    return progress


def judged(progress: Progress, values: Mapping[str, float], best: BestConfig | None) -> tuple[Progress, bool]:
    """The progress after a measurement, and whether it is the best one so far."""
    if best is None:
        return progress, False
    if best.metric not in values:
        raise UserError(f"train.best.metric: {best.metric!r} is not measured; write one of {', '.join(values)}")
    value = values[best.metric]
    if best.better(value, progress.best_value):
        return replace(progress, value=value, best_value=value, best_step=progress.step, since_best=0), True
    return replace(progress, value=value, since_best=progress.since_best + 1), False


def is_enough(progress: Progress, config: LoopConfig) -> bool:
    """Whether a run ends here although it has steps left."""
    stopping, best, value = config.early_stopping, config.best, progress.best_value
    if stopping is None or best is None:
        return False
    if stopping.target is not None and value is not None and not best.better(stopping.target, value):
        return True
    return stopping.patience is not None and progress.since_best >= stopping.patience


def _is_measured(step: int, config: LoopConfig) -> bool:
    every = config.eval_every
    return step in config.eval_at or (every is not None and (step % every == 0 or step == config.steps))


def _training(task: Task, batches: StepBatches, config: LoopConfig) -> Training:
    parameters = task.trainable()
    names = list(task.objective.weights())
    balance = build_balance(config.balance, names, task.last_layer, list(parameters.values()))
    optimizer = build_optimizer(parameters, config.optimizer)
    return Training(parameters, optimizer, balance, {"task": task, "batches": batches})


def _step(
    task: Task, batches: StepBatches, config: LoopConfig, training: Training, step: int, checkpoints: Checkpoints
) -> tuple[StepResult, float, float]:
    training.optimizer.zero_grad(set_to_none=True)
    seed = (config.seed * 1_000_003 + step) * 1_009  # one stream per step, whatever happened before it
    weights = task.objective.weights_at(step, config.horizon)
    result = accumulate_gradients(task, batches.at(step, config.accumulation), seed, training.balance, weights)
    trained = [p for p in training.parameters.values() if p.grad is not None]
    limit = config.optimizer.max_grad_norm
    norm = torch.nn.utils.clip_grad_norm_(trained, math.inf if limit is None else limit).item()
    if not (math.isfinite(result.loss) and math.isfinite(norm)):
        raise UserError(_not_finite(result, norm, step, batches, checkpoints))
    factor = learning_rate_factor(step, steps=config.horizon, config=config.optimizer)
    rate = config.optimizer.learning_rate * factor
    set_learning_rate(training.optimizer, rate)
    training.optimizer.step()
    return result, norm, rate


def _not_finite(result: StepResult, norm: float, step: int, batches: StepBatches, checkpoints: Checkpoints) -> str:
    kept = checkpoints.newest()
    good = f"the last good checkpoint is {kept}" if kept else "no checkpoint had been saved yet"
    what = f"the loss is {result.loss}" if not math.isfinite(result.loss) else f"the gradient norm is {norm}"
    return (
        f"step {step + 1}: {what} in the batch of {batches.place(step)}; stopped, {good}; lower "
        "train.optimizer.learning_rate or look at these rows"
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
