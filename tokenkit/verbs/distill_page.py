"""The page of a `tokenkit distill` run: what was measured, how it went, both tokenisations, samples."""

from dataclasses import asdict
from typing import Any

from tokenkit.config import dump_yaml, resolved
from tokenkit.data.records import Record
from tokenkit.data.source import describe
from tokenkit.eval.chunks import score_chunks
from tokenkit.models.view import ModelView
from tokenkit.report.content import Aligned, Bar, Chunk, Curve, Fact, Output, Report, Sample
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.prepare import continuations
from tokenkit.verbs.sides import Sides
from tokenkit.version import __version__


def report_of(
    run: DistillRun, sides: Sides, held_out: list[str], results: dict[str, Any], zero_shot_samples: list[str]
) -> Report:
    """What the page of a distillation shows: figures, curves, texts before and after."""
    group, label = student_name(run, sides), " + ".join(results["losses"])
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
        subtitle=f"{label}, {results['steps']:,} steps on {run.data.describe()}",
        version=__version__,
        bars=bars,
        curves=(Curve(label=label, kind=kind, metrics="metrics.jsonl"),),
        aligned=(aligned_text(run, sides, live, held_out),) if live else (),
        samples=samples,
        facts=_facts(run, sides, results),
        run=dump_yaml(resolved(run)),
    )


def student_name(run: DistillRun, sides: Sides) -> str:
    """What a page calls the student: its new tokenizer, or the run where shape or matrices are what is new."""
    changed = {"student", "ternary"} & sides.made.keys()
    return run.output.name if changed and not sides.transfer else short_name(sides.student_tokenizer.name)


def short_name(source: str) -> str:
    """What a page calls a folder or hub id: its last part, and of `RUN/model`, as every run exports one, the run's."""
    return source.rstrip("/").removesuffix("/model").rpartition("/")[2]


def aligned_text(run: DistillRun, sides: Sides, live: ModelView, held_out: list[str]) -> Aligned:
    """The beginning of the first held-out document in both tokenisations."""
    text = held_out[0].encode()[: run.report.text_bytes].decode(errors="ignore")
    teacher, student = short_name(sides.teacher_tokenizer.name), student_name(run, sides)
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
        "held out": describe(run.eval.source),
    }
    if sides.student_tokenizer.fingerprint != sides.teacher_tokenizer.fingerprint:
        facts["vocabulary"] = f"{sides.teacher_tokenizer.vocab_size:,} → {sides.student_tokenizer.vocab_size:,}"
    if "student" in sides.made:
        made = sides.made["student"]
        facts["weights"] = f"{made['parameters_before']:,} → {made['parameters_after']:,}"
    if "ternary" in sides.made:
        made = sides.made["ternary"]
        facts["ternary"] = f"{made['ternary_weights']:,} of {made['parameters']:,} weights"
    if "kl_to_teacher" in results["trained"]:
        before, after = results["zero_shot"], results["trained"]
        facts["KL to the teacher"] = f"{before['kl_to_teacher']:.4f} → {after['kl_to_teacher']:.4f} nats per token"
        facts["same likeliest token"] = f"{before['top1_agreement']:.1%} → {after['top1_agreement']:.1%}"
    if results["retention"] is not None:
        facts["retention"] = f"{results['retention']:.1%} of the teacher's bits per byte"
    if isinstance(sides.teacher, Record):
        facts["teacher"] = f"recorded: {short_name(sides.teacher.manifest.teacher)}"
    return tuple(Fact(name=name, value=value) for name, value in facts.items())
