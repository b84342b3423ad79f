"""The loop: fetch, gradients, clip, step, and five plain ifs: measure, log, save, stop, done."""

import math
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType

from torch import Tensor

from tokenkit.config import UserError
from tokenkit.report.progress import progress as progress_bar
from tokenkit.train.audit import Audit
from tokenkit.train.balance import build_balance
from tokenkit.train.checkpoint import Checkpoints, Progress, StepFolders, Training
from tokenkit.train.compile import Compiled, apply_liger, compiled
from tokenkit.train.diagnosis import Diagnosis
from tokenkit.train.folder import RunFolder
from tokenkit.train.noise import Noise
from tokenkit.train.optimizer import build_optimizer, set_learning_rate
from tokenkit.train.parallel import clip, first, largest, leaders, leads, ranks
from tokenkit.train.parameter_kinds import parameter_kinds
from tokenkit.train.profile import profiled
from tokenkit.train.scaler import Guard
from tokenkit.train.schema import BestConfig, LoopConfig
from tokenkit.train.step import Beside, StepResult, accumulate_gradients
from tokenkit.train.tasks import StepBatches, Task
from tokenkit.train.trained import rate_at


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
    with _begun(task, batches, config, folder) as run, _stop_signals() as stop:
        progress = checkpoints.load(run.training)
        if progress is None:
            progress = Progress()
            if 0 in config.eval_at and first(lambda: 0 not in folder.logged("step")):
                folder.log({"step": 0, **_measured(run, evaluate), **run.audit.evaluation_values()})
        folder.truncate_metrics(progress.step)
        task.train_mode(True)
        with progress_bar(label, config.steps, done=progress.step, quiet=quiet or not leads()) as advance:
            while progress.step < config.steps and not is_enough(progress, config):
                with run.audit.step():
                    result, norm, rate = _step(run, progress.step)
                    task.stepped(progress.step + 1, config.horizon)
                progress = progress.after(result.loss, result.num_tokens, result.num_bytes)
                run.audit.count(result.num_tokens)
                run.profile_step()
                advance(says=f"loss {result.loss:.4f}  {run.audit.speed:,.0f} tokens/s")
                asked = largest(stop.signal_number)  # one process that is asked to leave asks all
                leaving = asked != 0 or progress.step == config.stop_after
                last = progress.step == config.steps
                logging = progress.step % config.log_every == 0 or last
                saving = progress.step % config.save_every == 0 or last or leaving
                measuring = _is_measured(progress.step, config)
                if logging or saving or measuring or task.device.type == "cpu":  # the look makes a host wait for a GPU
                    _check_finite(run, checkpoints)
                if logging:
                    beside = run.audit.values() | run.compiled.values() | run.guard.values()
                    folder.log(_metrics(progress, result, norm.item(), rate) | beside)
                if run.is_diagnosed(progress.step):
                    folder.log({"step": progress.step, **run.diagnosis.values()})
                if measuring:
                    values = _measured(run, evaluate)
                    folder.log({"step": progress.step, **values, **run.audit.evaluation_values()})
                    progress, improved = judged(progress, values, config.best)
                    checkpoints.measured(run.training, progress, improved)
                last = last or is_enough(progress, config)
                if saving or last:
                    checkpoints.save(run.training, progress, config.keep_checkpoints, last)
                if leaving and not last:
                    raise Interrupted(progress.step, asked)
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


@dataclass(frozen=True)
class _Run:
    """What the steps of a run have in common."""

    task: Task
    batches: StepBatches
    config: LoopConfig
    training: Training
    audit: Audit
    noise: Noise
    diagnosis: Diagnosis
    compiled: Compiled
    guard: Guard
    profile_step: Callable[[], None]

    def is_diagnosed(self, step: int) -> bool:
        """Whether each loss's gradient is looked at in a step, counted from 1."""
        every = self.config.diagnose_every
        return every is not None and step % every == 0


@contextmanager
def _begun(task: Task, batches: StepBatches, config: LoopConfig, folder: RunFolder) -> Iterator[_Run]:
    """What a run needs; what is changed for it from outside is put back at its end."""
    here = ranks()
    if config.batch_size < config.accumulation * here.data:
        raise UserError(
            f"train.batch_size: {config.batch_size} rows cannot be cut for {here.data} processes into "
            f"{config.accumulation} microbatches each; write {config.accumulation * here.data} or more"
        )
    noise = Noise(config.noise, task)
    if config.liger:
        apply_liger(task)
    parameters, names = task.trainable(), list(task.objective.weights())
    balance = build_balance(config.balance, names, task.last_layer, list(parameters.values()))
    diagnosis = Diagnosis(
        list(parameters.values()), names, batch_rows=config.batch_size, noise_scale=config.noise_scale
    )
    guard = Guard(task.device, scaling=config.precision == "float16")
    owners = {"task": task, "batches": batches, "diagnosis": diagnosis, "guard": guard}
    kinds = parameter_kinds(parameters, task.modules())
    training = Training(parameters, build_optimizer(parameters, config.optimizer, kinds), balance, owners)
    audit = Audit(task.device, config.collect_garbage_every)
    profile = profiled(folder.path / "profile", config.profile if leads() else None, task.device)
    with audit.run(), compiled(task, config.compile) as graphs, profile as profile_step:
        yield _Run(task, batches, config, training, audit, noise, diagnosis, graphs, guard, profile_step)


def _measured(run: _Run, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
    with run.audit.evaluation():
        run.task.train_mode(False)
        values = run.compiled.attempt(evaluate)
        run.task.train_mode(True)
    return leaders(values)


def _step(run: _Run, step: int) -> tuple[StepResult, Tensor, float]:
    task, config, training, clock, guard = run.task, run.config, run.training, run.audit.clock, run.guard
    with clock("data"):
        here = ranks()
        batches = run.batches.at(step, config.accumulation, here.data_rank, here.data)
    seed = (config.seed * 1_000_003 + step) * 1_009  # one stream per step, whatever happened before it
    weights = task.objective.weights_at(step, config.horizon)
    scale = guard.scale if guard.scaling else None
    look = partial(run.diagnosis.look, scale=scale) if run.is_diagnosed(step + 1) else None
    beside = Beside(clock, run.noise, look, guard.scaled if guard.scaling else None)

    def gradients() -> StepResult:
        training.optimizer.zero_grad(set_to_none=True)
        return accumulate_gradients(task, batches, seed, training.balance, weights, beside)

    with clock("losses"), run.noise.weights(training.parameters, seed):  # what is no other part's is theirs
        result = run.compiled.attempt(gradients)
    with clock("optimizer"):
        guard.unscale(training.parameters.values())
        task.gradients_ready(step)
        trained = [p for p in training.parameters.values() if p.grad is not None]
        limit = config.optimizer.max_grad_norm
        norm = clip(trained, math.inf if limit is None else limit)
        run.noise.gradients(training.parameters, step, seed)
        rate = rate_at(step, config)
        set_learning_rate(training.optimizer, rate)
        guard.step(training.optimizer, step, result.loss, norm)
    return result, norm, rate


def _check_finite(run: _Run, checkpoints: Checkpoints) -> None:
    """UserError for a step whose numbers were not finite; no weight has moved in it, or since."""
    bad = run.guard.look()
    if bad is None:
        return
    kept = checkpoints.newest()
    good = f"the last good checkpoint is {kept}" if kept else "no checkpoint had been saved yet"
    what = f"the loss is {bad.loss}" if not math.isfinite(bad.loss) else f"the gradient norm is {bad.norm}"
    what = f"{what} for {bad.in_a_row} steps, at every scale," if run.guard.scaling else what
    raise UserError(
        f"step {bad.step + 1}: {what} in the batch of {run.batches.place(bad.step)}; stopped, {good}; lower "
        "train.optimizer.learning_rate or look at these rows"
    )


def _metrics(progress: Progress, result: StepResult, norm: float, rate: float) -> dict[str, float | int]:
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
