"""What `--dry-run` says of a training run: the whole run as YAML, and what it will take, as comments behind it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from tokenkit.config import UserError, dump_yaml, resolved
from tokenkit.models.attention import check_attention
from tokenkit.models.blocks import block_list
from tokenkit.models.load import head_matrix, input_matrix
from tokenkit.models.memory import Side, Spent, parameter_bytes, step_spent, without_memory
from tokenkit.models.rates import Rates, measure_rates
from tokenkit.models.view import ModelView
from tokenkit.objective import LossesConfig, Objective
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.train.optimizer_schema import OptimizerConfig
from tokenkit.train.schema import TrainConfig
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.estimate_sides import (
    Lengths,
    config_of,
    empty_model,
    empty_student,
    has_shared_body,
    held_bytes,
    lengths_of,
    sample_windows,
    student_config,
    teachers_of,
    tokenizer_of,
    trained_as,
)
from tokenkit.verbs.pretrain import PretrainRun

HALVES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
STEP_PASSES = 9  # over what is trained: its norm, and AdamW reading four tensors and writing three
QUANTISED_FROM = 4096  # numbers of a tensor from which bitsandbytes keeps its state in 8 bits
BLOCKS = 1 + 4 / 256  # bytes of such a number, with its block's scale
LARGEST_ROTATED = 10_000  # rows or columns of a matrix that soap still rotates


@dataclass
class Estimate:
    """Bytes of one process, and seconds of a step."""

    data: int
    model: int
    device: str
    precision: str
    rows: int
    """Of text in a microbatch."""
    tokens: Lengths
    teacher_tokens: Lengths | None
    weights: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int
    """Kept for the backward pass."""
    peak: int
    """The most at one time, beside what the program itself takes."""
    other_activations: int = 0
    """With gradient_checkpointing the other way."""
    flops: float = 0.0
    """Of a step, teacher included."""
    seconds: float = 0.0
    step_tokens: float = 0.0
    """Of the student's, that a process reads in a step."""
    rate: float = 0.0
    notes: list[str] = field(default_factory=list)


def dry_run_text(run: DistillRun | PretrainRun) -> str:
    """The resolved run, or runs by the names of its stages, and as comments what each takes."""
    if isinstance(run, PretrainRun):
        return dump_yaml(resolved(run)) + _commented(lambda: estimate_pretrain(run), run.train, "")
    stages = run.by_stage()
    values = {name: resolved(stage) for name, stage in stages.items()}
    text = dump_yaml(values if run.stages else resolved(run))
    first = next(iter(stages.values()))
    for name, stage in stages.items():
        begun = stage if stage is first else _as_first(stage, first)
        text += _commented(lambda begun=begun: estimate_distill(begun), stage.train, f"{name}: " if name else "")
    return text


def _as_first(stage: DistillRun, first: DistillRun) -> DistillRun:
    """A later stage, on a student that is made as the first one's is: the model it will find is not there yet."""
    made = {"model": first.model, "student": stage.student or first.student}
    return stage.model_copy(update={**made, "target_tokenizer": stage.target_tokenizer or first.target_tokenizer})


def _commented(estimate: Callable[[], Estimate], train: TrainConfig | None, name: str) -> str:
    if train is None:
        return ""
    try:
        lines = told(estimate(), train)
    except UserError as error:
        lines = [f"memory: not estimated ({error})"]
    except RuntimeError as error:  # torch: code that looks into tensors cannot be gone through without their memory
        why = (str(error).splitlines() or [type(error).__name__])[0]
        lines = [f"memory: not estimated ({type(error).__name__}: {why})"]
    return "".join(f"# {name}{line}\n" for line in lines)


def told(found: Estimate, train: TrainConfig) -> list[str]:
    """The estimate in words."""
    here = f"{found.data} x {found.model} processes" if found.data * found.model > 1 else "one process"
    other = "without" if train.gradient_checkpointing else "with"
    teacher = "" if found.teacher_tokens is None else f", teacher {found.teacher_tokens.longest:,}"
    guess = f" (a guess: {found.tokens.guessed})" if found.tokens.guessed else ""
    parts = {
        "student weights": found.weights,
        "gradients": found.gradients,
        f"optimizer ({train.optimizer.name})": found.optimizer,
        "teacher": found.teacher,
        "activations": found.activations,
    }
    speed = found.step_tokens / found.seconds if found.seconds else 0.0
    return [
        f"memory per process, estimated for {here} on {found.device}, {found.precision}, {train.mode}:",
        *(f"  {name + ':':<26}{_size(value):>10}" for name, value in parts.items()),
        f"  {'peak:':<26}{_size(found.peak):>10}  beside what the program itself takes",
        f"  activations {other} gradient_checkpointing: {_size(found.other_activations)}",
        f"  a microbatch: {found.rows} rows of up to {found.tokens.longest:,} tokens{teacher}{guess}",
        f"time per step, estimated: {found.seconds:.3g} s, {speed:,.0f} tokens/s a process; {found.flops / 1e9:,.1f} "
        f"GFLOP at a measured {found.rate / 1e9:,.0f} GFLOP/s for products",
        *found.notes,
    ]


def _size(count: int | float) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e10 else f"{count / 1e9:,.1f} GB"


def estimate_distill(run: DistillRun, rates: Rates | None = None) -> Estimate:
    """What a run of `tokenkit distill` takes; UserError where a configuration or a tokenizer is not to be had."""
    device = pick_device(run.train.device, "train.device")
    check_attention(run.train.attention, device, run.train.precision)
    choices, shape = teachers_of(run), student_config(run)
    shapes = [config_of(choice) for choice in choices]  # before anything that may ask the hub
    target = load_tokenizer(run.target_tokenizer) if run.target_tokenizer else None
    texts = sample_windows(run.data)
    data, model, rows = _layout(run.train)
    own = lengths_of(run.data, target or tokenizer_of(run.model), texts, rows)
    theirs = lengths_of(run.data, tokenizer_of(choices[0]), texts, rows) if choices else None
    needs = {side: _needs(Objective.of(run.losses), side) for side in ("student", "teacher")}
    with without_memory(device):
        student, other = (empty_student(run, shape, target, checkpointing=on) for on in _ways(run.train))
        teachers = [empty_model(one, run.train) for one in shapes]
        if any("attentions" in names for names in needs.values()):
            for one in (student, other, *teachers):
                one.set_attn_implementation("eager")
        taught = None
        if teachers and theirs is not None:
            taught = Side(ModelView(teachers[0].eval()), rows, theirs.longest, needs["teacher"])
        sides = [Side(ModelView(one), rows, own.longest, needs["student"]) for one in (student, other)]
        spent, others = (_spent(side, taught, run.train) for side in sides)
    if has_shared_body(run):
        held = sum(table.numel() * 4 for table in _tables(teachers[0]))
    else:
        held = sum(held_bytes(one, choice) for one, choice in zip(teachers, choices))
    found = _whole(student, held, spent, others, run.train, (data, model), device)
    found.tokens, found.teacher_tokens = own, theirs
    _timed(found, student, spent, run.train, rates)
    found.notes += _notes(run)
    return found


def estimate_pretrain(run: PretrainRun, rates: Rates | None = None) -> Estimate:
    """What a run of `tokenkit pretrain` takes."""
    assert run.train is not None
    assert run.model is not None
    device = pick_device(run.train.device, "train.device")
    choice, (data, model, rows) = run.tokenizer, _layout(run.train)
    tokenizer = None if choice.load is None else load_tokenizer(choice.load)
    new = choice.train.vocab_size if choice.train is not None else 0
    texts = sample_windows(run.data)
    own = lengths_of(run.data, tokenizer, texts, rows) if tokenizer is not None else _guessed(run, rows)
    fields = {key: value for key, value in run.model.items() if key != "model_type"}
    config = AutoConfig.for_model(run.model["model_type"], **fields, vocab_size=_rows_of(tokenizer, new))
    with without_memory(device):
        made = [trained_as(empty_model(config, run.train), run.train, checkpointing=on) for on in _ways(run.train)]
        needs = _needs(Objective.of(LossesConfig.model_validate({"clm": {}})), "student")
        sides = [Side(ModelView(one), rows, own.longest, needs) for one in made]
        spent, others = (_spent(side, None, run.train) for side in sides)
    found = _whole(made[0], 0, spent, others, run.train, (data, model), device)
    found.tokens = own
    _timed(found, made[0], spent, run.train, rates)
    return found


def _rows_of(tokenizer: Tokenizer | None, new: int) -> int:
    return new if tokenizer is None else tokenizer.vocab_size


def _guessed(run: PretrainRun, rows: int) -> Lengths:
    """Of a tokenizer that is still to be learnt: nobody knows how it will cut."""
    length = run.data.window_bytes / 3.5
    return Lengths(length, round(length), guessed="the tokenizer is not learnt yet")


def _ways(train: TrainConfig) -> tuple[bool, bool]:
    return train.gradient_checkpointing, not train.gradient_checkpointing


def _layout(train: TrainConfig) -> tuple[int, int, int]:
    """Processes along data and model, and rows of a microbatch in each."""
    model, data = train.parallel.model, train.parallel.data or 1
    return data, model, ceil(train.batch_size / (train.accumulation * data))


def _needs(objective: Objective, side: Any) -> set[str]:
    """What the losses ask of a side, with what the task makes of both."""
    found, made = objective.needs(side), objective.by_task()
    found |= {"label_logp"} if "student_divergence" in made else set()
    return found | ({"logits"} if {"dual_student_logits", "dual_teacher_logits"} & made else set())


def _spent(student: Side, teacher: Side | None, train: TrainConfig) -> Spent:
    model = student.view.model
    width = head_matrix(model).shape[1]
    half = HALVES[train.precision]
    return step_spent(student, teacher, half=half, microbatches=train.accumulation, width=width)


def _tables(model: PreTrainedModel) -> list[nn.Parameter]:
    return list({id(table): table for table in (input_matrix(model), head_matrix(model))}.values())


def _whole(
    student: PreTrainedModel,
    teacher: int,
    spent: Spent,
    others: Spent,
    train: TrainConfig,
    layout: tuple[int, int],
    device: str,
) -> Estimate:
    """The parts of a process's memory; where several share the models, with what is gathered while a layer computes."""
    data, model = layout
    shards = data * model
    weights, gradients = parameter_bytes(student), parameter_bytes(student, trained=True)
    state = optimizer_bytes(student, train.optimizer)
    beside = max(0, spent.peak_bytes - gradients)  # activations and what comes and goes, when the most is held
    shared = spent.wide_bytes / max(1, spent.kept_bytes) * (1 - 1 / model)
    gathered = 0
    if shards > 1:
        tables = sum(table.numel() * 4 for table in _tables(student))
        gathered = 2 * (tables + (weights - tables) // max(1, len(block_list(student)[1])))
    own, grads, moments, other_weights = (round(part / shards) for part in (weights, gradients, state, teacher))
    most = own + grads + moments + other_weights + round(beside * (1 - shared)) + gathered
    rows = _layout(train)[2]
    kept, other = (round(one.kept_bytes * (1 - shared)) for one in (spent, others))
    return Estimate(
        data,
        model,
        device,
        train.precision,
        rows,
        Lengths(0.0, 0),
        None,
        weights=own,
        gradients=grads,
        optimizer=moments,
        teacher=other_weights,
        activations=kept,
        peak=most,
        other_activations=other,
    )


def _timed(found: Estimate, student: PreTrainedModel, spent: Spent, train: TrainConfig, rates: Rates | None) -> None:
    """Puts down what a step takes, at the lengths that rows usually have."""
    half = HALVES[train.precision]
    speeds = rates or measure_rates(found.device, half)
    usual = found.tokens.usual / max(1, found.tokens.longest)
    trained = parameter_bytes(student, trained=True)
    found.seconds = usual * speeds.seconds(spent) / found.model + STEP_PASSES * trained / speeds.bytes_per_second
    found.flops = usual * spent.flops / found.model
    found.step_tokens = found.rows * train.accumulation * found.tokens.usual
    found.rate = speeds.flops[4 if half is None else 2]


def optimizer_bytes(model: nn.Module, config: OptimizerConfig) -> int:
    """What the optimizer remembers of all that is trained."""
    return round(sum(_state_bytes(parameter, config) for parameter in model.parameters() if parameter.requires_grad))


def _state_bytes(parameter: nn.Parameter, config: OptimizerConfig) -> int | float:
    count, moments = parameter.numel(), 1 if "lion" in config.name else 2
    if "8bit" in config.name:
        return moments * count * (BLOCKS if count >= QUANTISED_FROM else 4)
    if config.name == "muon":
        table = parameter.ndim == 2 and max(parameter.shape) > 8 * min(parameter.shape)  # tables are AdamW's there
        return 4 * count * (1 if parameter.ndim == 2 and not table else 2)
    rotated = [side for side in parameter.shape if side <= LARGEST_ROTATED] if parameter.ndim == 2 else []
    turned = 2 * sum(side * side for side in rotated) if config.name == "soap" else 0
    return 4 * (moments * count + turned)


def _notes(run: DistillRun) -> list[str]:
    """What the estimate leaves out of a run."""
    left: Mapping[str, bool] = {
        "student.prune": run.student is not None and run.student.prune is not None,
        "ternary": run.ternary is not None,
        "hypernet": run.hypernet is not None,
        "expand_inputs": run.expand_inputs,
        "on_policy": run.on_policy is not None,
        "train.compile": run.train.compile is not None,
    }
    named = [key for key, there in left.items() if there]
    return [f"not counted: {', '.join(named)}"] if named else []
