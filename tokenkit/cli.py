"""The command line: one thin function per verb. Heavy imports stand inside, so that help is quick."""

import sys
from typing import Annotated

import typer

from tokenkit import cli_report, cli_sweep, cli_tokenizer, cli_transfer, cli_vocabulary
from tokenkit.cli_shared import (
    DryRun,
    On,
    Price,
    Quiet,
    Resume,
    TrainDryRun,
    Verbs,
    Words,
    check_processes,
    print_distilled,
    print_json,
    print_results,
    print_rich,
    print_values,
    run_script,
    shown,
    shown_training,
)
from tokenkit.config import load

app = typer.Typer(
    name="tokenkit",
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Give a language model a new tokenizer, a smaller body or ternary weights, and keep what it knows.",
)
app.add_typer(cli_tokenizer.app, name="tokenizer")
app.add_typer(cli_vocabulary.app, name="vocabulary")
app.add_typer(cli_transfer.app)
app.add_typer(cli_report.app)
app.add_typer(cli_sweep.app)


@app.command()
def demo(words: Words = None, dry_run: DryRun = False, quiet: Quiet = False) -> None:
    """Move the embedded model to a Unigram tokenizer and to bytes; a table, a page, models."""
    from tokenkit.verbs.demo import demo, demo_run

    run = demo_run(words or [])
    if not shown(run, dry_run):
        demo(run, quiet=quiet)


@app.command()
def pretrain(
    words: Words = None,
    dry_run: TrainDryRun = False,
    on: On = None,
    price: Price = None,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Train a small model and its tokenizer from nothing."""
    from tokenkit.verbs.pretrain import PretrainRun, pretrain

    run = load(PretrainRun, words or [])
    if not shown_training(run, dry_run, on, price):
        print_results(pretrain(run, resume=resume, quiet=quiet))


@app.command()
def distill(
    words: Words = None,
    preset: cli_sweep.Preset = None,
    smoke: cli_sweep.Smoke = False,
    dry_run: TrainDryRun = False,
    on: On = None,
    price: Price = None,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Transfer a model to another tokenizer and train it under what it was, or under another teacher."""
    from tokenkit.verbs.distill_run import DistillRun
    from tokenkit.verbs.stages import distill_stages, last_folder

    chosen = cli_sweep.chosen_preset(preset, words or [], smoke)
    run = chosen or load(DistillRun, words or [])
    if not shown_training(run, dry_run, on, price):
        cli_sweep.make_teacher(preset, run, smoke, quiet)
        print_distilled(distill_stages(run, resume=resume, quiet=quiet), last_folder(run))


@app.command()
def record(words: Words = None, dry_run: DryRun = False, resume: Resume = False, quiet: Quiet = False) -> None:
    """Let a teacher read a corpus once, to teach students of any tokenizer from what is then on disk."""
    from tokenkit.verbs.record import RecordRun, record

    run = load(RecordRun, words or [])
    if not shown(run, dry_run):
        print_values(record(run, resume=resume, quiet=quiet))


@app.command()
def synthesize(words: Words = None, dry_run: DryRun = False, resume: Resume = False, quiet: Quiet = False) -> None:
    """Let a teacher write texts, or questions and answers, to teach students on."""
    from tokenkit.verbs.synthesize import SynthesizeRun, synthesize

    run = load(SynthesizeRun, words or [])
    if not shown(run, dry_run):
        print_values(synthesize(run, resume=resume, quiet=quiet))


@app.command("filter")
def filter_source(words: Words = None, dry_run: DryRun = False) -> None:
    """Keep the documents of a source that read like text; count why the others do not."""
    from tokenkit.verbs.filter import FilterRun, filter_source

    run = load(FilterRun, words or [])
    if not shown(run, dry_run):
        print_values(filter_source(run))


@app.command("eval")
def evaluate(words: Words = None, dry_run: DryRun = False) -> None:
    """Bits per byte of a model, how its tokenizer cuts the text, and tasks; beside what it was before."""
    from tokenkit.verbs.evaluate import EvalRun, before_after_table, evaluate

    run = load(EvalRun, words or [])
    if not shown(run, dry_run):
        figures = evaluate(run)
        print_values({key: value for key, value in figures.items() if key not in ("benchmarks", "before")})
        if "before" in figures:
            print_rich(before_after_table(figures))
        if "benchmarks" in figures:
            from tokenkit.verbs.benchmarks import benchmark_table

            print_rich(benchmark_table(figures["benchmarks"]))


@app.command("eval-lockstep")
def eval_lockstep(words: Words = None, dry_run: DryRun = False) -> None:
    """Several models as one, over shared tokens, mapped tokens or bytes: bits per byte, and what it writes."""
    from tokenkit.verbs.eval_lockstep import EvalLockstepRun, eval_lockstep, lockstep_table

    run = load(EvalLockstepRun, words or [])
    if not shown(run, dry_run):
        figures = eval_lockstep(run)
        if "members" in figures:
            print_rich(lockstep_table(figures))
        print_values(figures)


@app.command()
def align(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="A B TEXT",
            help="Two tokenizers, and a text, @FILE or - for standard input; or a run file and KEY=VALUE.",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[str | None, typer.Option(metavar="MODE", help="Chunks: unconstrained, or space.")] = None,
    messages: Annotated[
        str | None, typer.Option(metavar="FILE", help="Instead of a text: a .jsonl file of conversations.")
    ] = None,
    row: Annotated[int | None, typer.Option(metavar="N", help="Which conversation of it, from 0.")] = None,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Write a page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Show two tokenisations of a text or a conversation, aligned."""
    from tokenkit.verbs.align import AlignRun, compare_run
    from tokenkit.verbs.positional import load_positional

    names = ("teacher", "student", "text") if messages is None else ("teacher", "student")
    options = {"mode": mode, "html": html, "messages": messages, "row": row}
    run = load_positional(AlignRun, names, words or [], options)
    if not shown(run, dry_run):
        from tokenkit.align.show import show

        found = compare_run(run)
        print_json(found.as_json()) if as_json else print_rich(show(found))


@app.command()
def doctor(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="A B",
            help="The tokenizer that a model has, and the one it is to have; or a run file and KEY=VALUE.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="FOLDER", help="The model; no weight is read.")] = None,
    corpus: Annotated[str | None, typer.Option(metavar="FILE", help="Text to measure on.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Say what to expect of a pair of tokenizers before any hour is spent on it."""
    from tokenkit.verbs.doctor import DoctorRun, doctor
    from tokenkit.verbs.positional import load_positional

    source = None if corpus is None else {"path": corpus}
    run = load_positional(DoctorRun, ("source", "target"), words or [], {"model": model, "corpus": source})
    if not shown(run, dry_run):
        from tokenkit.align.doctor_show import render

        found = doctor(run)
        print_json(found.as_json()) if as_json else print_rich(render(found))


@app.command()
def audit(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="A folder or hub id; or a run file. Then KEY=VALUE.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Look for what is wrong with a model's rows and ids, and for tokens that a donor may have planted."""
    from tokenkit.verbs.audit import audit, load_audit

    run = load_audit(words or [])
    if not shown(run, dry_run):
        from tokenkit.report.audit import render_audit

        found = audit(run)
        print_json(found.as_json()) if as_json else print_rich(render_audit(found))


@app.command()
def inspect(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="A [B]",
            help="Folders, .safetensors files, or gpt2:n_layer=6 (a model type, keys); or a run file and KEY=VALUE.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Count what a checkpoint or a configuration holds; of two, say why they differ in size."""
    from tokenkit.verbs.inspect import inspect, load_inspect

    run = load_inspect(words or [])
    if not shown(run, dry_run):
        from tokenkit.eval.size_difference import Difference, inventory_json
        from tokenkit.report.inventory import render_difference, render_inventory

        found = inspect(run)
        if as_json:
            print_json(found.as_json() if isinstance(found, Difference) else inventory_json(found))
        else:
            print_rich(render_difference(found) if isinstance(found, Difference) else render_inventory(found))


@app.command()
def mined_mapping(words: Words = None, dry_run: DryRun = False) -> None:
    """For every token of a vocabulary the nearest one of another: least edits, equal bytes or prefix."""
    from tokenkit.verbs.mined_mapping import MinedMappingRun, mined_mapping

    run = load(MinedMappingRun, words or [])
    if not shown(run, dry_run):
        print_values(mined_mapping(run))


@app.command("tokenizer-info")
def tokenizer_info(words: Words = None, dry_run: DryRun = False, resume: Resume = False, quiet: Quiet = False) -> None:
    """Count two tokenizers' tokens on a text, and measure their tokenisation bias."""
    from tokenkit.verbs.tokenizer_info import TokenizerInfoRun, tokenizer_info

    run = load(TokenizerInfoRun, words or [])
    if not shown(run, dry_run):
        print_values(tokenizer_info(run, resume=resume, quiet=quiet))


@app.command("check-loss")
def check_loss(
    file: Annotated[str, typer.Argument(metavar="MY_LOSS.PY", help="A file with functions under @loss; it is run.")],
    name: Annotated[str | None, typer.Option(metavar="NAME", help="One loss of the file.")] = None,
) -> None:
    """Hold the losses of a file to what every loss is held to."""
    from pathlib import Path

    from tokenkit.verbs.check_loss import check_losses, failures, table

    checks = check_losses(Path(file), name)
    print_rich(table(checks))
    failed = failures(Path(file), checks)
    for line in failed:
        typer.echo(f"tokenkit: {line}", err=True)
    if failed:
        raise typer.Exit(2)


@app.command()
def generate(words: Words = None, dry_run: DryRun = False) -> None:
    """Let a model continue prompts."""
    from tokenkit.verbs.generate import GenerateRun, prepared

    run = load(GenerateRun, words or [])
    if shown(run, dry_run):
        return
    generation = prepared(run)
    if run.stream:
        for piece in generation.pieces():
            typer.echo(piece, nl=False)
            sys.stdout.flush()
        typer.echo()
    else:
        for text in generation.texts(run.output):
            typer.echo(text)
    drafting = generation.drafting()
    if drafting is not None:
        typer.echo(drafting, err=True)


@app.command()
def export(words: Words = None, dry_run: DryRun = False) -> None:
    """Write a model for others: int8, int4, ternary, ONNX, GGUF, torch.export; verified."""
    from tokenkit.verbs.export import ExportRun, export

    run = load(ExportRun, words or [])
    if not shown(run, dry_run):
        print_values(export(run))


@app.command("merge-lora")
def merge_lora(words: Words = None, dry_run: DryRun = False) -> None:
    """Put PEFT's LoRA adapters into their base model: an ordinary folder."""
    from tokenkit.verbs.merge_lora import MergeLoraRun, merge_lora

    run = load(MergeLoraRun, words or [])
    if not shown(run, dry_run):
        print_values(merge_lora(run))


@app.command()
def schema(
    verb: Annotated[list[str], typer.Argument(metavar="VERB", help="The verb whose run file is described.")],
    plugin: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="A file of own losses, to be described too; it is run.")
    ] = None,
) -> None:
    """Print the JSON schema of a verb's run file, for editors and for checking."""
    import json

    from tokenkit.verbs import run_schema

    described = run_schema(" ".join(verb)).grown({"plugins": plugin or []})
    typer.echo(json.dumps(described.model_json_schema(), indent=2))


def main() -> None:
    """Runs the command line; a user's mistake is one line and exit code 2, an obeyed signal 128 plus its number."""

    def act() -> None:
        check_processes(sys.argv[1:])
        app(prog_name="tokenkit")

    run_script("tokenkit", act)


if __name__ == "__main__":
    main()
