"""`tokenkit distill`: a model moved to another tokenizer, or a student under a teacher: trained, measured, exported."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenkit.config import Config, dump_yaml, resolved
from tokenkit.data.batch import Batches, DataConfig, read_training_rows, reading_of
from tokenkit.data.source import describe, read_documents
from tokenkit.eval.bits_per_byte import EvalConfig, bits_per_byte
from tokenkit.eval.chunks import score_chunks
from tokenkit.export.huggingface import export_huggingface
from tokenkit.models.generate import generate
from tokenkit.models.load import head_matrix, input_matrix
from tokenkit.models.lora import attach_lora
from tokenkit.models.view import ModelView
from tokenkit.objective import LossesConfig, Objective
from tokenkit.report.content import Aligned, Bar, Chunk, Curve, Fact, Output, Report, Sample
from tokenkit.report.page import write_page
from tokenkit.tokenizers.base import Tokenizer, require_lossless
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.spec import TokenizerSpec
from tokenkit.train.folder import RunFolder, write_json
from tokenkit.train.loop import train
from tokenkit.train.schema import TrainConfig
from tokenkit.train.tasks.distill import TextTask
from tokenkit.transfer.apply import TransferReport, transfer_model
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.model import DTYPES, ExportType, ModelChoice, load_pair
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

    output: Path
    model: ModelChoice
    """The student before any change."""
    teacher: ModelChoice | None = None
    """Without one the student is taught by what it was before it changed its tokenizer."""
    target_tokenizer: TokenizerSpec | None = None
    """The student's new tokenizer: `NAME` or `NAME:target=KIND:conversion=...`, or these keys. None keeps its own."""
    transfer: TransferOptions = TransferOptions()
    losses: LossesConfig
    data: DataConfig
    train: TrainConfig
    eval: EvalConfig
    report: ReportConfig = ReportConfig()
    export_dtype: ExportType = "float32"


@dataclass
class Sides:
    """Student and teacher of a run, ready to be trained and compared."""

    student: ModelView
    student_tokenizer: Tokenizer
    teacher: ModelView
    teacher_tokenizer: Tokenizer
    transfer: TransferReport | None
    teacher_samples: list[str]


def distill(run: DistillRun, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Trains, measures, exports and reports; the results that are also in `output/results.json`."""
    sides = prepare(run)
    objective = Objective.of(run.losses)
    objective.check_vocabularies(
        sides.student_tokenizer.vocab_size,
        sides.teacher_tokenizer.vocab_size,
        sides.student_tokenizer.fingerprint == sides.teacher_tokenizer.fingerprint,
    )
    rows = read_training_rows(run.data)
    reading = reading_of(run.data, sides.student_tokenizer, sides.teacher_tokenizer)
    held_out = read_documents(run.eval.source)
    folder = RunFolder(run.output)
    folder.claim(resolved(run), resume=resume)
    measure = measurement(run.eval, sides.student, sides.student_tokenizer, held_out)
    before = _before_training(run, sides, held_out, measure)
    task = TextTask(
        objective,
        sides.student,
        sides.student_tokenizer,
        sides.teacher,
        sides.teacher_tokenizer,
        precision=run.train.precision,
    )
    batches = Batches(
        rows,
        sides.student_tokenizer,
        sides.teacher_tokenizer,
        batch_size=run.train.batch_size,
        seed=run.train.seed,
        reading=reading,
    )
    progress = train(task, batches, run.train, folder, measure, label="+".join(objective.weights()), quiet=quiet)
    after = measure()
    if progress.step not in folder.logged("bits_per_byte"):
        folder.log({"step": progress.step, **after})
    results = {
        "name": run.output.name,
        "losses": list(objective.weights()),
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
        export_huggingface(
            sides.student.model, sides.student_tokenizer, run.output / "model", dtype=DTYPES[run.export_dtype]
        )
    write_json(run.output / "results.json", results)
    report = _report(run, sides, held_out, results, before["samples"])
    write_json(run.output / "report.json", report.model_dump(mode="json"))
    write_page(run.output)
    return results


def prepare(run: DistillRun) -> Sides:
    """Both sides in memory: the tokenizer swapped, the adapters attached, what is not trained frozen."""
    device = pick_device(run.train.device)
    torch.manual_seed(run.train.seed)  # adapters begin at random
    target = load_tokenizer(run.target_tokenizer) if run.target_tokenizer else None
    model, source = load_pair(run.model, device)
    for tokenizer in (source, target or source):
        require_lossless(tokenizer, "a student's tokenizer")
    other = load_pair(run.teacher, device) if run.teacher else None
    shared_body = other is None and run.train.mode != "full"
    tables = _tables(model) if shared_body else {}
    if other is None and not shared_body:
        other = copy.deepcopy(model), source
    samples = continuations(run, *(other or (model, source)), source)
    report = transfer_model(model, source, target, **run.transfer.model_dump()) if target else None
    _choose_trained(model, run.train)
    if other is None:
        teacher, teacher_tokenizer = ModelView(model, tables=tables, adapters=False), source
    else:
        teacher, teacher_tokenizer = ModelView(other[0].requires_grad_(False)), other[1]
    if run.train.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return Sides(ModelView(model), target or source, teacher, teacher_tokenizer, report, samples)


def _tables(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copies of the embedding and the head as they are now; one copy where they are one matrix."""
    table, head = input_matrix(model), head_matrix(model)
    copied = table.detach().clone()
    return {"input": copied, "head": copied if head is table else head.detach().clone()}


def _choose_trained(model: PreTrainedModel, train_config: TrainConfig) -> None:
    """Embedding and head are always trained; of the body all, adapters, or nothing."""
    model.requires_grad_(train_config.mode == "full")
    if train_config.mode == "lora":
        attach_lora(model, **train_config.lora.model_dump())
    for table in (input_matrix(model), head_matrix(model)):
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
    bars = (
        Bar(group=group, label="teacher", kind="teacher", bits_per_byte=results["teacher_bits_per_byte"]),
        Bar(group=group, label=first, kind="zero_shot", bits_per_byte=results["zero_shot_bits_per_byte"]),
        Bar(group=group, label=label, kind=kind, bits_per_byte=results["trained_bits_per_byte"]),
    )
    trained = continuations(run, sides.student.model, sides.student_tokenizer, sides.teacher_tokenizer)
    columns = (("teacher", sides.teacher_samples), (first, zero_shot_samples), (label, trained))
    samples = tuple(
        Sample(prompt=prompt, outputs=tuple(Output(label=name, text=texts[i]) for name, texts in columns))
        for i, prompt in enumerate(run.report.prompts)
    )
    return Report(
        title=f"{short_name(run.model.source)} → {group}",
        subtitle=f"{label}, {results['steps']:,} steps on {describe(run.data.source)}",
        version=__version__,
        bars=bars,
        curves=(Curve(label=label, kind=kind, metrics="metrics.jsonl"),),
        aligned=(aligned_text(run.report, sides, held_out),),
        samples=samples,
        facts=_facts(run, sides, results),
        run=dump_yaml(resolved(run)),
    )


def short_name(source: str) -> str:
    """A folder's or hub id's last part: what a page calls it."""
    return source.rstrip("/").rpartition("/")[2]


def aligned_text(config: ReportConfig, sides: Sides, held_out: list[str]) -> Aligned:
    """The beginning of the first held-out document in both tokenisations."""
    text = held_out[0].encode()[: config.text_bytes].decode(errors="ignore")
    teacher, student = short_name(sides.teacher_tokenizer.name), short_name(sides.student_tokenizer.name)
    scored = score_chunks(text, sides.teacher, sides.teacher_tokenizer, sides.student, sides.student_tokenizer)
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
    return tuple(Fact(name=name, value=value) for name, value in facts.items())
