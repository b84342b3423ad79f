"""`tokenkit demo`: the embedded model moved to a Unigram tokenizer and to bytes, four ways, in minutes on two cores."""

import json
import statistics
from pathlib import Path
from typing import Any, Literal

import typer
from pydantic import Field

from tokenkit.config import Config, build, dump_yaml, load, resolved
from tokenkit.data.batch import DataConfig
from tokenkit.eval.bits_per_byte import EvalConfig
from tokenkit.report.content import Bar, Curve, Fact, Kind, Report, Sample, read_report
from tokenkit.report.page import write_page
from tokenkit.report.tables import bits_per_byte_rows, bits_per_byte_table, markdown_table
from tokenkit.report.terminal import show
from tokenkit.train.folder import RUN_FILE, RunFolder, write_json, write_text
from tokenkit.train.schema import TrainConfig
from tokenkit.verbs.distill import distill
from tokenkit.verbs.distill_run import DistillRun, ReportConfig
from tokenkit.verbs.model import ModelChoice
from tokenkit.version import __version__

ASSETS = Path(__file__).parents[1] / "assets"
TARGETS = {"unigram": str(ASSETS / "demo_unigram"), "byte": "byte"}
# ALM's gradients at temperature 5 are a tenth of the cross-entropy's; so weighted, both meet the same clip.
METHODS: dict[Kind, dict[str, Any]] = {"clm": {"clm": {}}, "alm": {"alm": {"weight": 10.0}}}


class DemoRun(Config):
    """A run file of `tokenkit demo`; without one, the embedded one is taken."""

    output: Path
    targets: list[Literal["unigram", "byte"]] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    """Order of the text and random draws; with several, figures are means and standard deviations."""
    data: DataConfig
    """Little text, seen several times: where a teacher matters. With plenty, see docs/log.md."""
    train: TrainConfig
    eval: EvalConfig
    report: ReportConfig


def demo_run(words: list[str]) -> DemoRun:
    """The run of command-line words: overrides fall on the embedded run file where they name none."""
    given = any("=" not in word for word in words)
    return load(DemoRun, words if given else [str(ASSETS / "demo.yaml"), *words])


def demo(run: DemoRun, *, quiet: bool = False) -> dict[str, Any]:
    """Trains what is not there yet, prints the table, writes results.json and the page; the results."""
    folder = RunFolder(run.output)
    folder.claim(resolved(run), resume=(run.output / RUN_FILE).is_file())
    typer.echo(
        f"The embedded model, trained on Python's standard library, is moved to {' and '.join(run.targets)}.\n"
        "With the embedded run file that takes about 7 minutes on two cores."
    )
    entries: dict[str, dict[str, list[dict[str, Any]]]] = {
        target: {method: [_one(run, target, method, seed, quiet) for seed in run.seeds] for method in METHODS}
        for target in run.targets
    }
    results = _results(run, entries)
    write_json(run.output / "results.json", results)
    report = _report(run, results)
    write_text(run.output / "results.md", markdown_table(bits_per_byte_rows(report.bars)))
    write_json(run.output / "report.json", report.model_dump(mode="json"))
    page = write_page(run.output)
    show(bits_per_byte_table(report.bars))
    for sample in report.samples[:2]:
        typer.echo(f"{sample.prompt!r} goes on")
        for output in sample.outputs:
            typer.echo(f"  {output.label}: {output.text[:70]!r}")
    typer.echo(f"The page: {page}\nThe models: {run.output}/*/alm/model")
    return results


def _name(method: str, seed: int, run: DemoRun) -> str:
    return method if seed == run.seeds[0] else f"{method}-seed{seed}"


def _one(run: DemoRun, target: str, method: Kind, seed: int, quiet: bool) -> dict[str, Any]:
    """The results of one distillation, run now or found finished."""
    output = run.output / target / _name(method, seed, run)
    if (output / "results.json").is_file():
        return json.loads((output / "results.json").read_text("utf-8"))
    typer.echo(f"{target}, {method.upper()}, seed {seed}: {run.train.steps} steps ...")
    one = build(
        DistillRun,
        {
            "output": output,
            "model": ModelChoice(source=str(ASSETS / "demo_teacher")),
            "target_tokenizer": TARGETS[target],
            "losses": METHODS[method],
            "data": run.data,
            "train": run.train.model_copy(update={"seed": seed}),
            "eval": run.eval.model_dump(),
            "report": run.report,
            "export_dtype": "bfloat16",
        },
    )
    return distill(one, resume=(output / RUN_FILE).is_file(), quiet=quiet, brief=True)


def _results(run: DemoRun, entries: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    targets: dict[str, dict[str, Any]] = {}
    for target, methods in entries.items():
        found = {f"{m}_bpb": [one["trained_bits_per_byte"] for one in many] for m, many in methods.items()}
        first = methods["alm"][0]
        targets[target] = {"zero_shot_bpb": first["zero_shot_bits_per_byte"]}
        targets[target] |= {name: statistics.mean(values) for name, values in found.items()}
        if len(run.seeds) > 1:
            targets[target] |= {f"{name}_sd": statistics.stdev(values) for name, values in found.items()}
        targets[target] |= {"steps": first["steps"], "bytes": first["bytes"], "transfer": first["transfer"]["plan"]}
    teacher = next(iter(entries.values()))["alm"][0]["teacher_bits_per_byte"]
    return {"teacher_bpb": teacher, "seeds": run.seeds, "targets": targets}


def _amount(run: DemoRun) -> str:
    limits = [source.max_bytes for source in run.data.sources]
    known = [limit for limit in limits if limit is not None]
    return f"{sum(known):,} bytes of" if len(known) == len(limits) else ""


def _report(run: DemoRun, results: dict[str, Any]) -> Report:
    """One page for all targets, put together from the pages of the runs with the first seed."""
    bars: list[Bar] = []
    curves, aligned, samples = [], [], {}
    for target, figures in results["targets"].items():
        rows = (
            ("teacher", "teacher", results["teacher_bpb"], None),
            ("zero-shot FVT", "zero_shot", figures["zero_shot_bpb"], None),
            ("CLM", "clm", figures["clm_bpb"], figures.get("clm_bpb_sd")),
            ("ALM", "alm", figures["alm_bpb"], figures.get("alm_bpb_sd")),
        )
        bars += [Bar(group=target, label=label, kind=k, bits_per_byte=v, sd=sd) for label, k, v, sd in rows]
        for method in METHODS:
            name = f"{target} · {method.upper()}"
            curves.append(Curve(label=name, kind=method, metrics=f"{target}/{method}/metrics.jsonl"))
        page = read_report(run.output / target / "alm")
        aligned += page.aligned
        for sample in page.samples:
            outputs = [o.model_copy(update={"label": f"{target} · {o.label}"}) for o in sample.outputs[1:]]
            samples.setdefault(sample.prompt, [sample.outputs[0]]).extend(outputs)
    return Report(
        title="One model, three tokenizers",
        subtitle=f"The embedded model after {run.train.steps} steps on {_amount(run)} Python's standard library",
        version=__version__,
        bars=tuple(bars),
        curves=tuple(curves),
        aligned=tuple(aligned),
        samples=tuple(Sample(prompt=prompt, outputs=tuple(outputs)) for prompt, outputs in samples.items()),
        facts=(
            Fact(name="steps", value=f"{run.train.steps} of {run.train.batch_size} × {run.data.window_bytes} bytes"),
            Fact(name="seeds", value=", ".join(map(str, run.seeds))),
            Fact(name="held out", value=f"{run.eval.source.max_bytes:,} bytes of other modules"),
        ),
        run=dump_yaml(resolved(run)),
    )
