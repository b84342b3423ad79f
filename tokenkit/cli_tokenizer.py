"""`tokenkit tokenizer ...`: the tools of the learned tokenizer. Flags are the checklist's; a run file says more."""

from typing import Annotated, Any

import typer

from tokenkit.cli_shared import (
    DryRun,
    Quiet,
    Resume,
    Verbs,
    Words,
    echo,
    print_json,
    print_results,
    print_values,
    shown,
)

app = typer.Typer(cls=Verbs, no_args_is_help=True, help="Learn a tokenizer, look at it, prune it, use it.")
Model = Annotated[str | None, typer.Option("--model", metavar="FOLDER", help="A learned tokenizer, or a checkpoint.")]
Corpus = Annotated[str | None, typer.Option("--corpus", metavar="FILE", help="Text: a file, a folder or a glob.")]
Output = Annotated[str | None, typer.Option("--output", metavar="PATH", help="Where the result goes.")]


@app.command()
def prepare(words: Words = None, corpus: Corpus = None, output: Output = None, dry_run: DryRun = False) -> None:
    """Read a corpus once: documents split in two, chunks counted."""
    from tokenkit.verbs.positional import load_positional
    from tokenkit.verbs.tokenizer.prepare import TokenizerPrepareRun
    from tokenkit.verbs.tokenizer.prepare import prepare as run_prepare

    run = load_positional(TokenizerPrepareRun, (), words or [], {"source": _source(corpus), "output": output})
    if not shown(run, dry_run):
        print_values(run_prepare(run, lambda line: typer.echo(line, err=True)))


@app.command()
def pretrain(
    words: Words = None,
    corpus: Corpus = None,
    output: Output = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Train the auto-encoder, choose the pins, package the tokenizer."""
    from tokenkit.verbs.positional import load_positional
    from tokenkit.verbs.tokenizer.pretrain import TokenizerPretrainRun, pretrain_tokenizer

    source = _source(corpus)
    options = {"data": None if source is None else {"source": source}, "output": output}
    run = load_positional(TokenizerPretrainRun, (), words or [], options)
    if not shown(run, dry_run):
        tell = (lambda line: None) if quiet else (lambda line: typer.echo(line, err=True))
        print_results(pretrain_tokenizer(run, resume=resume, quiet=quiet, tell=tell))


@app.command("test")
def examine(
    words: Words = None,
    phase: Annotated[str | None, typer.Option("--phase", metavar="PHASE", help="before, after or final.")] = None,
    model: Model = None,
    output: Output = None,
    comprehensive: Annotated[bool, typer.Option("--comprehensive", help="Every corpus of odd strings too.")] = False,
    corpus: Corpus = None,
    dry_run: DryRun = False,
) -> None:
    """Reconstruct the standard examples, by the network alone and by the whole; in phase final, the gates."""
    from tokenkit.config import UserError
    from tokenkit.verbs.positional import load_positional
    from tokenkit.verbs.tokenizer.test import TokenizerTestRun, failures, result_lines, run_tokenizer_test

    options = {"phase": phase, "model": model, "output": output, "corpus": _source(corpus)}
    run = load_positional(TokenizerTestRun, (), words or [], options | {"comprehensive": comprehensive or None})
    if not shown(run, dry_run):
        results = run_tokenizer_test(run, lambda line: typer.echo(line, err=True))
        echo("\n".join(result_lines(results)))
        failed = failures(results)
        if failed:
            raise UserError("; ".join(failed))


@app.command()
def gates(words: Words = None, model: Model = None, corpus: Corpus = None, dry_run: DryRun = False) -> None:
    """Decide the four go/no-go gates: PASS or FAIL with figures; exit code 2 where one fails."""
    from tokenkit.config import UserError
    from tokenkit.verbs.positional import load_positional
    from tokenkit.verbs.tokenizer.gates import TokenizerGatesRun, failed_gates, gate_lines, tokenizer_gates

    run = load_positional(TokenizerGatesRun, (), words or [], {"model": model, "corpus": _source(corpus)})
    if not shown(run, dry_run):
        found = tokenizer_gates(run, lambda line: typer.echo(line, err=True))
        echo("\n".join(gate_lines(found)))
        if failed_gates(found):
            raise UserError("; ".join(failed_gates(found)))


@app.command()
def compare(
    words: Annotated[list[str] | None, typer.Argument(metavar="BEFORE.JSON AFTER.JSON")] = None,
    report: Annotated[str | None, typer.Option("--report", metavar="FILE", help="Write a page.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Set two results of `test` beside each other: a table, and a page."""
    from tokenkit.verbs.positional import load_positional
    from tokenkit.verbs.tokenizer.compare import TokenizerCompareRun, compare_tests

    run = load_positional(TokenizerCompareRun, ("before", "after"), words or [], {"report": report})
    if not shown(run, dry_run):
        echo("\n".join(compare_tests(run).lines()))


@app.command()
def analyze(
    words: Words = None, model: Model = None, corpus: Corpus = None, output: Output = None, dry_run: DryRun = False
) -> None:
    """Look at the codebook: what is used how often, what collides, what comes back; a page with plots."""
    from tokenkit.verbs.positional import load_positional
    from tokenkit.verbs.tokenizer.analyze import TokenizerAnalyzeRun, analyze_tokenizer

    options = {"model": model, "corpora": _source(corpus), "output": output}
    run = load_positional(TokenizerAnalyzeRun, (), words or [], options)
    if not shown(run, dry_run):
        print_values(analyze_tokenizer(run))


@app.command()
def prune(
    words: Words = None,
    model: Model = None,
    corpus: Corpus = None,
    top_k: Annotated[int | None, typer.Option("--top-k", metavar="N", help="Pins that stay at most.")] = None,
    output: Output = None,
    dry_run: DryRun = False,
) -> None:
    """Keep the pins that save the most ids on a corpus, or give pins to a tokenizer that has none."""
    from tokenkit.verbs.positional import load_positional
    from tokenkit.verbs.tokenizer.prune import TokenizerPruneRun, prune_tokenizer

    options = {"model": model, "corpus": _source(corpus), "top_k": top_k, "output": output}
    run = load_positional(TokenizerPruneRun, (), words or [], options)
    if not shown(run, dry_run):
        print_values(prune_tokenizer(run))


@app.command("manage-checkpoints")
def manage_checkpoints(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="ACTION FOLDER", help="list, select-best, archive or clean; or compare and two files."),
    ] = None,
    output: Output = None,
    keep: Annotated[int | None, typer.Option("--keep", metavar="N", help="Step files that `clean` leaves.")] = None,
    pins: Annotated[str | None, typer.Option("--pins", metavar="FOLDER", help="Take its pins.")] = None,
) -> None:
    """List checkpoints, compare two, keep the best, drop old ones."""
    from tokenkit.config import UserError, build
    from tokenkit.verbs.tokenizer.manage_checkpoints import TokenizerCheckpointsRun, checkpoint_lines
    from tokenkit.verbs.tokenizer.manage_checkpoints import manage_checkpoints as manage

    action, *paths = words or [""]
    if not paths:
        raise UserError("manage-checkpoints: write an action and a folder, such as list checkpoints/")
    values = {"action": action, "output": output, "pins": pins, **({} if keep is None else {"keep": keep})}
    values |= {"checkpoints": paths} if action == "compare" else {"folder": paths[0]}
    found = manage(build(TokenizerCheckpointsRun, values))
    if "checkpoints" in found:
        echo("\n".join(checkpoint_lines(found["checkpoints"])))
    else:
        print_values(found)


@app.command()
def migrate(words: Words = None, dry_run: DryRun = False) -> None:
    """Import a word list: its words as pins, a map of ids, and if asked the model that used them."""
    from tokenkit.config import load
    from tokenkit.verbs.tokenizer.migrate import TokenizerMigrateRun
    from tokenkit.verbs.tokenizer.migrate import migrate as run_migrate

    run = load(TokenizerMigrateRun, words or [])
    if not shown(run, dry_run):
        print_values(run_migrate(run))


@app.command()
def export(
    words: Words = None,
    model: Model = None,
    output: Output = None,
    kind: Annotated[str | None, typer.Option("--kind", metavar="KIND", help="compact, or open for codes too.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Write what transformers loads, and check that it gives the same ids there."""
    from tokenkit.verbs.positional import load_positional
    from tokenkit.verbs.tokenizer.export import TokenizerExportRun, export_tokenizer

    run = load_positional(TokenizerExportRun, (), words or [], {"model": model, "output": output, "kind": kind})
    if not shown(run, dry_run):
        print_values(export_tokenizer(run))


@app.command()
def benchmark(
    words: Words = None, model: Model = None, corpus: Corpus = None, output: Output = None, dry_run: DryRun = False
) -> None:
    """Time a learned tokenizer beside a word tokenizer and others, on the same text."""
    from tokenkit.verbs.positional import load_positional
    from tokenkit.verbs.tokenizer.benchmark import TokenizerBenchmarkRun
    from tokenkit.verbs.tokenizer.benchmark import benchmark as run_benchmark

    options = {"model": model, "source": _source(corpus), "output": output}
    run = load_positional(TokenizerBenchmarkRun, (), words or [], options)
    if not shown(run, dry_run):
        print_values(run_benchmark(run))


@app.command()
def encode(
    words: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="A text, @FILE, or - for input.")] = None,
    model: Model = None,
    text: Annotated[
        str | None, typer.Option("--text", metavar="TEXT", help="The text, instead of the argument.")
    ] = None,
    special: Annotated[bool, typer.Option("--special", help="Between begin and end of text.")] = False,
    kind: Annotated[
        str | None, typer.Option("--kind", metavar="KIND", help="compact or open, if not the model's own.")
    ] = None,
) -> None:
    """Print the ids of a text as JSON."""
    from tokenkit.verbs.tokenizer.code import CodeRun, encode_text

    given = [*(words or []), *([] if text is None else [text])]
    print_json(encode_text(_code_run(CodeRun, model, kind), _one(given, "a text"), special=special))


@app.command()
def decode(
    words: Annotated[list[str] | None, typer.Argument(metavar="IDS", help="Ids: 71 5034, or [71, 5034].")] = None,
    model: Model = None,
    ids: Annotated[str | None, typer.Option("--ids", metavar="IDS", help="The ids, instead of the argument.")] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", metavar="KIND", help="compact or open, if not the model's own.")
    ] = None,
) -> None:
    """Print the text of ids."""
    from tokenkit.verbs.tokenizer.code import CodeRun, decode_ids

    given = " ".join([*(words or []), *([] if ids is None else [ids])])
    echo(decode_ids(_code_run(CodeRun, model, kind), given))


def _source(corpus: str | None) -> dict[str, str] | None:
    return None if corpus is None else {"path": corpus}


def _code_run(schema: Any, model: str | None, kind: str | None) -> Any:
    from tokenkit.config import UserError, build

    if model is None:
        raise UserError("model: missing; write --model FOLDER")
    return build(schema, {"model": model, **({} if kind is None else {"kind": kind})})


def _one(given: list[str], what: str) -> str:
    from tokenkit.config import UserError

    if len(given) != 1:
        raise UserError(f"{len(given)} of {what} given; write one, in quotes")
    return given[0]
