"""What `--dry-run` says of a training run: the whole run as YAML, and what it will take, as comments behind it."""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from tokenkit.config import UserError, dump_yaml, resolved
from tokenkit.models.attention import check_attention
from tokenkit.models.devices import data_sheet
from tokenkit.models.memory import Shared, Side, Spent, parameter_bytes, step_spent, tables_of, without_memory
from tokenkit.models.rates import Rates, measure_rates
from tokenkit.models.view import ModelView
from tokenkit.objective import LossesConfig, Objective
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.train.schema import TrainConfig
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.estimate_parts import HALVES, Estimate, Place, optimizer_bytes, told
from tokenkit.verbs.estimate_shared import (
    Layout,
    gathered_bytes,
    host_bytes,
    layer_bytes,
    table_bytes,
    teacher_bytes,
    traffic,
    width_bytes,
)
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

STEP_PASSES = 9  # over what is trained: its norm, and AdamW reading four tensors and writing three


def dry_run_text(run: DistillRun | PretrainRun, on: str | None = None, price: float | None = None) -> str:
    """The resolved run, or runs by the names of its stages, and as comments what each takes.

    `on` names a device that is not here, and `price` is that of an hour of it.
    """
    sheet = data_sheet(on) if on is not None else None
    if price is not None and sheet is None:
        raise UserError(f"--price: {price:g}, but no device is named that it is paid for; write --on NAME beside it")
    place = Place("cpu", on or "", sheet, price) if sheet is not None else None
    if isinstance(run, PretrainRun):
        return dump_yaml(resolved(run)) + _commented(lambda: estimate_pretrain(run, place=place), run.train, "")
    stages = run.by_stage()
    values = {name: resolved(stage) for name, stage in stages.items()}
    text = dump_yaml(values if run.stages else resolved(run))
    first = next(iter(stages.values()))
    for name, stage in stages.items():
        begun = stage if stage is first else _as_first(stage, first)
        estimate = lambda begun=begun: estimate_distill(begun, place=place)  # noqa: E731
        text += _commented(estimate, stage.train, f"{name}: " if name else "")
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


def estimate_distill(
    run: DistillRun, rates: Rates | None = None, place: Place | None = None, *, other_way: bool = True
) -> Estimate:
    """What a run of `tokenkit distill` takes; UserError where a configuration or a tokenizer is not to be had.

    `other_way`: also what activations would take with gradient_checkpointing the other way, for as much time again.
    """
    place = place or _here(run.train)
    choices, shape = teachers_of(run), student_config(run)
    shapes = [config_of(choice) for choice in choices]  # before anything that may ask the hub
    target = load_tokenizer(run.target_tokenizer) if run.target_tokenizer else None
    texts, rows = sample_windows(run.data), _rows(run.train)
    own = lengths_of(run.data, target or tokenizer_of(run.model), texts, rows)
    theirs = lengths_of(run.data, tokenizer_of(choices[0]), texts, rows) if choices else None
    objective = Objective.of(run.losses)
    needs = {side: _needs(objective, side) for side in ("student", "teacher")}
    layout = _layout(run.train, has_shared_body(run))
    with without_memory(place.device):
        ways = _ways(run.train)[: 2 if other_way else 1]
        students = [empty_student(run, shape, target, checkpointing=on) for on in ways]
        teachers = [empty_model(one, run.train) for one in shapes]
        if any("attentions" in names for names in needs.values()):
            for one in (*students, *teachers):
                one.set_attn_implementation("eager")
        taught = None
        if teachers and theirs is not None:
            taught = Side(ModelView(teachers[0].eval()), rows, theirs.longest, needs["teacher"], place.kind)
        sides = [Side(_view(one, objective), rows, own.longest, needs["student"], place.kind) for one in students]
        spent = [_spent(side, taught, run.train, layout) for side in sides]
    if layout.shared_body:
        held, quantised = table_bytes(teachers[0]), False
    else:
        held = sum(held_bytes(one, choice) for one, choice in zip(teachers, choices))
        quantised = any(choice.quantize is not None for choice in choices)
        held = teacher_bytes(teachers[0], held, layout, quantised=quantised) if teachers else 0
    found = _whole(students[0], held, spent, run.train, layout, place)
    found.host = host_bytes(students[0], teachers, table_bytes(teachers[0]) if layout.shared_body else 0, layout)
    found.tokens, found.teacher_tokens = own, theirs
    _timed(found, (students[0], teachers), spent[0], run.train, layout, rates)
    found.notes += _notes(run)
    return found


def _here(train: TrainConfig) -> Place:
    device = pick_device(train.device, "train.device")
    check_attention(train.attention, device, train.precision)
    return Place(device)


def _view(model: PreTrainedModel, objective: Objective) -> ModelView:
    view = ModelView(model)
    view.alike = objective.scores_alike
    return view


def estimate_pretrain(run: PretrainRun, rates: Rates | None = None, place: Place | None = None) -> Estimate:
    """What a run of `tokenkit pretrain` takes."""
    assert run.train is not None
    assert run.model is not None
    place = place or _here(run.train)
    choice, rows, layout = run.tokenizer, _rows(run.train), _layout(run.train, False)
    tokenizer = None if choice.load is None else load_tokenizer(choice.load)
    new = choice.train.vocab_size if choice.train is not None else 0
    texts = sample_windows(run.data)
    own = lengths_of(run.data, tokenizer, texts, rows) if tokenizer is not None else _guessed(run)
    fields = {key: value for key, value in run.model.items() if key != "model_type"}
    config = AutoConfig.for_model(run.model["model_type"], **fields, vocab_size=_rows_of(tokenizer, new))
    objective = Objective.of(LossesConfig.model_validate({"clm": {}}))
    with without_memory(place.device):
        made = [trained_as(empty_model(config, run.train), run.train, checkpointing=on) for on in _ways(run.train)]
        needs = _needs(objective, "student")
        sides = [Side(_view(one, objective), rows, own.longest, needs, place.kind) for one in made]
        spent = [_spent(side, None, run.train, layout) for side in sides]
    found = _whole(made[0], 0, spent, run.train, layout, place)
    found.host, found.tokens = parameter_bytes(made[0]), own
    _timed(found, (made[0], []), spent[0], run.train, layout, rates)
    return found


def _rows_of(tokenizer: Tokenizer | None, new: int) -> int:
    return new if tokenizer is None else tokenizer.vocab_size


def _guessed(run: PretrainRun) -> Lengths:
    """Of a tokenizer that is still to be learnt: nobody knows how it will cut."""
    length = run.data.window_bytes / 3.5
    return Lengths(length, round(length), guessed="the tokenizer is not learnt yet")


def _ways(train: TrainConfig) -> tuple[bool, bool]:
    return train.gradient_checkpointing, not train.gradient_checkpointing


def _layout(train: TrainConfig, shared_body: bool) -> Layout:
    model, data = train.parallel.model, train.parallel.data or 1
    return Layout(data, model, train.accumulation, shared_body, train.gradient_checkpointing)


def _rows(train: TrainConfig) -> int:
    """Rows of a microbatch in each process."""
    return ceil(train.batch_size / (train.accumulation * (train.parallel.data or 1)))


def _needs(objective: Objective, side: Any) -> set[str]:
    """What the losses ask of a side, with what the task makes of both."""
    found, made = objective.needs(side), objective.by_task()
    found |= {"label_logp"} if "student_divergence" in made else set()
    return found | ({"logits"} if {"dual_student_logits", "dual_teacher_logits"} & made else set())


def _spent(student: Side, teacher: Side | None, train: TrainConfig, layout: Layout) -> Spent:
    width, shared = tables_of(student.view.model)[0].shape[1], Shared(layout.processes, layout.model)
    half = HALVES[train.precision]
    return step_spent(student, teacher, half=half, microbatches=train.accumulation, width=width, shared=shared)


def _whole(
    student: PreTrainedModel, teacher: int, spent: Sequence[Spent], train: TrainConfig, layout: Layout, place: Place
) -> Estimate:
    """The parts of a process's memory; `spent` as the run says, and with activation checkpointing the other way.

    The most is held either while layers compute, or at the end, when tables and their gradients are.
    """
    shards, own = layout.processes, spent[0]
    weights, moments = parameter_bytes(student) // shards, optimizer_bytes(student, train.optimizer) // shards
    gradients = parameter_bytes(student, trained=True) // shards
    during, at_end = gathered_bytes(student, layout)
    ended = layer_bytes(student, trained=True) // shards + at_end
    return Estimate(
        layout.data,
        layout.model,
        place,
        train.precision,
        _rows(train),
        weights=weights,
        gradients=gradients,
        optimizer=moments,
        teacher=teacher,
        activations=own.kept_bytes - own.copied_bytes,
        copies=own.copied_bytes,
        gathered=max(during, at_end),
        peak=weights + moments + teacher + max(own.peak_bytes + during, ended),
        host=0,
        other_kept=spent[-1].kept_bytes,
    )


def _timed(
    found: Estimate,
    sides: tuple[PreTrainedModel, list[PreTrainedModel]],
    spent: Spent,
    train: TrainConfig,
    layout: Layout,
    rates: Rates | None,
) -> None:
    """Puts down what a step takes, at the lengths that rows usually have."""
    student, teachers = sides
    half, sheet = HALVES[train.precision], found.place.sheet
    if rates is None:
        rates = sheet.rates() if sheet is not None else measure_rates(found.place.device, half)
    usual = found.tokens.usual / max(1, found.tokens.longest)
    found.seconds = usual * rates.seconds(spent) + STEP_PASSES * found.gradients / rates.bytes_per_second
    found.flops = usual * spent.flops
    found.step_tokens = found.rows * train.accumulation * found.tokens.usual
    found.rate = rates.flops[4 if half is None else 2]
    read = found.rows * found.tokens.usual * width_bytes(student, half)
    taught = 0.0
    if teachers and found.teacher_tokens is not None:
        taught = found.rows * found.teacher_tokens.usual * width_bytes(teachers[0], half)
    found.traffic = traffic(student, teachers, layout, read, taught)
    found.waiting = found.traffic.seconds(sheet, layout) if sheet is not None else 0.0


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
