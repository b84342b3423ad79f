"""`tokenkit distill`: a model moved to another tokenizer, or a student under a teacher: trained, measured, exported."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import create_model
from torch import Tensor
from transformers import PreTrainedModel

from tokenkit.config import Config, UserError, dump_yaml, resolved
from tokenkit.data.batch import Batches, DataConfig, read_training_rows, reading_of
from tokenkit.data.example import Row
from tokenkit.data.records import TOKENIZER, Record
from tokenkit.data.source import describe, read_documents
from tokenkit.eval.bits_per_byte import EvalConfig, bits_per_byte
from tokenkit.eval.chunks import score_chunks
from tokenkit.export.expanded import export_model
from tokenkit.models.expand import attach_expansion, old_inputs
from tokenkit.models.generate import generate
from tokenkit.models.load import head_matrix, input_matrix, output_head
from tokenkit.models.lora import attach_lora
from tokenkit.models.view import ModelView
from tokenkit.objective import LossesConfig, Objective, losses_config
from tokenkit.plugins.load import Plugin
from tokenkit.report.content import Aligned, Bar, Chunk, Curve, Fact, Output, Report, Sample
from tokenkit.report.page import write_page
from tokenkit.tokenizers.base import Tokenizer, require_lossless
from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.spec import TokenizerSpec
from tokenkit.train.balance import build_balance, last_layer
from tokenkit.train.folder import RunFolder, write_json
from tokenkit.train.loop import train
from tokenkit.train.schema import TrainConfig
from tokenkit.train.tasks.distill import TextTask
from tokenkit.transfer.apply import transfer_model
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.model import DTYPES, ExportType, ModelChoice, load_pair
from tokenkit.verbs.own_losses import keep_plugins, named_plugins
from tokenkit.verbs.record import evaluated_on
from tokenkit.verbs.sides import Sides, check_record, objective_of, pair_of, wanted_of
from tokenkit.verbs.transfer import TransferOptions
from tokenkit.version import __version__


class ReportConfig(Config):
    """What the page shows beside the numbers."""

    prompts: list[str] = []
    """Texts that teacher, zero-shot and trained model continue."""
    max_new_tokens: int = 48
    """Length of a continuation in the teacher's tokens; other tokenizers get as many bytes."""
    text_bytes: int = 600
    """Bytes of held-out text that are shown in both tokenisations."""


class DistillRun(Config):
    """A run file of `tokenkit distill`."""

    own_losses: ClassVar[tuple[Plugin, ...]] = ()
    output: Path
    model: ModelChoice
    """The student before any change."""
    teacher: ModelChoice | None = None
    """Without one the student is taught by what it was before it changed its tokenizer."""
    record: Path | None = None
    """A folder of `tokenkit record`: taught from it, no teacher is loaded. One that is named beside it is compared with
    what was recorded."""
    target_tokenizer: TokenizerSpec | None = None
    """The student's new tokenizer: `NAME` or `NAME:target=KIND:conversion=...`, or these keys. None keeps its own."""
    transfer: TransferOptions = TransferOptions()
    expand_inputs: bool = False
    """Of a byte-level student: add to each byte's embedding the old one of the longest old token that ends there."""
    plugins: list[Path] = []
    """Python files with losses of your own, which this runs; their names become keys of `losses`."""
    losses: LossesConfig
    data: DataConfig
    train: TrainConfig
    eval: EvalConfig
    report: ReportConfig = ReportConfig()
    export_dtype: ExportType = "float32"

    @classmethod
    def grown(cls, values: dict[str, Any]) -> type[Any]:
        """With the losses of `plugins` among the keys of `losses`."""
        plugins = named_plugins(values)
        if not plugins:
            return cls
        own = {name: entry for plugin in plugins for name, entry in plugin.losses.items()}
        schema = create_model(cls.__name__, __base__=cls, __doc__=cls.__doc__, losses=(losses_config(own), ...))
        schema.own_losses = plugins
        return schema


def distill(run: DistillRun, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Trains, measures, exports and reports; the results that are also in `output/results.json`."""
    sides = prepare(run)
    objective = objective_of(run.losses, sides)
    rows = read_training_rows(run.data)
    batches = _batches(run, sides, objective, rows)
    held_out = read_documents(run.eval.source)
    live, record = (None, sides.teacher) if isinstance(sides.teacher, Record) else (sides.teacher, None)
    if record is not None:
        check_record(record, objective, run.data, rows, sides, run.teacher)
    pair = pair_of(run.data, sides).tensors(objective.pair_needs())
    # refuses before a file is written
    build_balance(run.train.balance, list(objective.weights()), partial(last_layer, sides.student.model), [])
    folder = _claim(run, resume)
    measure = measurement(run.eval, sides.student, sides.student_tokenizer, held_out)
    before = _before_training(run, sides, held_out, measure)
    task = TextTask(
        objective,
        sides.student,
        sides.student_tokenizer,
        live,
        sides.teacher_tokenizer,
        precision=run.train.precision,
        pair=pair,
        teacher_width=record.manifest.hidden_width if record is not None else None,
        seed=run.train.seed,
    )
    progress = train(task, batches, run.train, folder, measure, label="+".join(objective.weights()), quiet=quiet)
    after = measure()
    if progress.step not in folder.logged("bits_per_byte"):
        folder.log({"step": progress.step, **after})
    results = {
        "name": run.output.name,
        "losses": list(objective.weights()),
        "plugins": {str(plugin.path): plugin.sha256 for plugin in run.own_losses},
        "teacher_bits_per_byte": before["teacher"],
        "zero_shot_bits_per_byte": before["zero_shot"],
        "trained_bits_per_byte": after["bits_per_byte"],
        "bits_per_byte_at": {str(step): value for step, value in folder.logged("bits_per_byte").items()},
        "steps": progress.step,
        "tokens": progress.num_tokens,
        "bytes": progress.num_bytes,
        "transfer": asdict(sides.transfer) if sides.transfer else None,
    }
    if not (run.output / "model").exists():
        export_model(sides.student.model, sides.student_tokenizer, run.output / "model", dtype=DTYPES[run.export_dtype])
    write_json(run.output / "results.json", results)
    report = _report(run, sides, held_out, results, before["samples"])
    write_json(run.output / "report.json", report.model_dump(mode="json"))
    write_page(run.output)
    return results


def _batches(run: DistillRun, sides: Sides, objective: Objective, rows: Sequence[Row]) -> Batches:
    student, teacher = sides.student_tokenizer, sides.teacher_tokenizer
    return Batches(
        rows,
        student,
        teacher,
        batch_size=run.train.batch_size,
        seed=run.train.seed,
        reading=reading_of(run.data, student, teacher, objective.shared_needs()),
        record=sides.teacher if isinstance(sides.teacher, Record) else None,
        wanted=wanted_of(objective),
    )


def _claim(run: DistillRun, resume: bool) -> RunFolder:
    folder = RunFolder(run.output)
    folder.claim(resolved(run), resume=resume)
    keep_plugins(run.own_losses, run.output)
    return folder


def prepare(run: DistillRun) -> Sides:
    """Both sides in memory: the tokenizer swapped, the adapters attached, what is not trained frozen."""
    device = pick_device(run.train.device)
    torch.manual_seed(run.train.seed)  # adapters begin at random
    target = load_tokenizer(run.target_tokenizer) if run.target_tokenizer else None
    model, source = load_pair(run.model, device)
    for tokenizer in (source, target or source):
        require_lossless(tokenizer, "a student's tokenizer")
    live = run.record is None
    other = load_pair(run.teacher, device) if run.teacher and live else None
    shared_body = live and other is None and run.train.mode != "full"
    tables = _tables(model) if shared_body else {}
    if live and other is None and not shared_body:
        other = copy.deepcopy(model), source
    samples = continuations(run, *(other or (model, source)), source) if live else []
    if run.expand_inputs and (not isinstance(target, ByteTokenizer) or shared_body):
        raise UserError("expand_inputs: only with target_tokenizer=byte, and train.mode=full or a teacher of its own")
    old = old_inputs(model, source.token_bytes) if run.expand_inputs else None
    report = transfer_model(model, source, target, **run.transfer.model_dump()) if target else None
    if old is not None:
        attach_expansion(model, *old)
    _choose_trained(model, run.train)
    if run.record is not None:
        teacher, teacher_tokenizer = Record(run.record), load_tokenizer(str(run.record / TOKENIZER))
    elif other is None:
        teacher, teacher_tokenizer = ModelView(model, tables=tables, adapters=False), source
    else:
        teacher, teacher_tokenizer = ModelView(other[0].requires_grad_(False)), other[1]
    if run.train.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return Sides(ModelView(model), target or source, teacher, teacher_tokenizer, report, samples)


def _tables(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copies of the embedding, the head and its bias as they are now; one copy where they are one matrix."""
    table, head, bias = input_matrix(model), head_matrix(model), output_head(model).bias
    copied = table.detach().clone()
    tables = {"input": copied, "head": copied if head is table else head.detach().clone()}
    return tables if bias is None else {**tables, "bias": bias.detach().clone()}


def _choose_trained(model: PreTrainedModel, train_config: TrainConfig) -> None:
    """Embedding and head are always trained; of the body all, adapters, or nothing."""
    model.requires_grad_(train_config.mode == "full")
    if train_config.mode == "lora":
        attach_lora(model, **train_config.lora.model_dump())
    for table in (input_matrix(model), head_matrix(model), output_head(model).bias):
        if table is not None:
            table.requires_grad_(True)


def measurement(
    config: EvalConfig, view: ModelView, tokenizer: Tokenizer, held_out: list[str]
) -> Callable[[], dict[str, float]]:
    """A function that measures a model as it stands."""

    def measure() -> dict[str, float]:
        options = config.model_dump(exclude={"source"})
        return {"bits_per_byte": bits_per_byte(view, tokenizer, held_out, **options).value}

    return measure


def _before_training(
    run: DistillRun, sides: Sides, held_out: list[str], measure: Callable[[], dict[str, float]]
) -> dict[str, Any]:
    if isinstance(sides.teacher, Record):
        known = sides.teacher.manifest
        teacher = known.teacher_bits_per_byte if known.evaluated_on == evaluated_on(run.eval, held_out) else None
    else:
        teacher = measurement(run.eval, sides.teacher, sides.teacher_tokenizer, held_out)()["bits_per_byte"]
    samples = continuations(run, sides.student.model, sides.student_tokenizer, sides.teacher_tokenizer)
    return {"teacher": teacher, "zero_shot": measure()["bits_per_byte"], "samples": samples}


def continuations(run: DistillRun, model: PreTrainedModel, tokenizer: Tokenizer, unit: Tokenizer) -> list[str]:
    """Greedy continuations of the prompts, as long as `max_new_tokens` tokens of the `unit` tokenizer."""
    prompts = run.report.prompts
    if not prompts:
        return []
    ratio = len(tokenizer.encode(" ".join(prompts))) / max(1, len(unit.encode(" ".join(prompts))))
    return generate(model, tokenizer, prompts, max_new_tokens=max(1, round(run.report.max_new_tokens * ratio)))


def _report(
    run: DistillRun, sides: Sides, held_out: list[str], results: dict[str, Any], zero_shot_samples: list[str]
) -> Report:
    group, label = short_name(sides.student_tokenizer.name), " + ".join(results["losses"])
    kind = results["losses"][0] if results["losses"] in (["clm"], ["alm"]) else "trained"
    first = f"zero-shot {run.transfer.initializer}" if sides.transfer else "before"
    measured = (("teacher", "teacher"), (first, "zero_shot"), (label, "trained"))
    bars = tuple(
        Bar(group=group, label=name, kind=kind if key == "trained" else key, bits_per_byte=value)
        for name, key in measured
        if (value := results[f"{key}_bits_per_byte"]) is not None  # a recorded teacher may not have been measured
    )
    trained = continuations(run, sides.student.model, sides.student_tokenizer, sides.teacher_tokenizer)
    live = None if isinstance(sides.teacher, Record) else sides.teacher
    columns = [(first, zero_shot_samples), (label, trained)]
    if live is not None:
        columns.insert(0, ("teacher", sides.teacher_samples))
    samples = tuple(
        Sample(prompt=prompt, outputs=tuple(Output(label=name, text=texts[i]) for name, texts in columns))
        for i, prompt in enumerate(run.report.prompts)
    )
    return Report(
        title=f"{short_name(run.model.source if sides.transfer else sides.teacher_tokenizer.name)} → {group}",
        subtitle=f"{label}, {results['steps']:,} steps on {describe(run.data.source)}",
        version=__version__,
        bars=bars,
        curves=(Curve(label=label, kind=kind, metrics="metrics.jsonl"),),
        aligned=(aligned_text(run.report, sides, live, held_out),) if live else (),
        samples=samples,
        facts=_facts(run, sides, results),
        run=dump_yaml(resolved(run)),
    )


def short_name(source: str) -> str:
    """What a page calls a folder or hub id: its last part, and of `RUN/model`, as every run exports one, the run's."""
    return source.rstrip("/").removesuffix("/model").rpartition("/")[2]


def aligned_text(config: ReportConfig, sides: Sides, live: ModelView, held_out: list[str]) -> Aligned:
    """The beginning of the first held-out document in both tokenisations."""
    text = held_out[0].encode()[: config.text_bytes].decode(errors="ignore")
    teacher, student = short_name(sides.teacher_tokenizer.name), short_name(sides.student_tokenizer.name)
    scored = score_chunks(text, live, sides.teacher_tokenizer, sides.student, sides.student_tokenizer)
    return Aligned(
        title=f"{teacher} and {student}, aligned",
        teacher_name=teacher,
        student_name=student,
        chunks=tuple(Chunk(**asdict(chunk)) for chunk in scored),
    )


def _facts(run: DistillRun, sides: Sides, results: dict[str, Any]) -> tuple[Fact, ...]:
    trained = {"full": "all weights", "lora": "adapters and embeddings", "embeddings": "embeddings"}
    facts = {
        "trained": trained[run.train.mode],
        "steps": f"{results['steps']:,} of {run.train.batch_size} rows",
        "text": f"{results['bytes']:,} bytes, {results['tokens']:,} student tokens",
        "vocabulary": f"{sides.teacher_tokenizer.vocab_size:,} → {sides.student_tokenizer.vocab_size:,}",
        "held out": describe(run.eval.source),
    }
    if isinstance(sides.teacher, Record):
        facts["teacher"] = f"recorded: {short_name(sides.teacher.manifest.teacher)}"
    return tuple(Fact(name=name, value=value) for name, value in facts.items())
