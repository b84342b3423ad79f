"""Training and distilling with tokenkit beside TRL 1.16: the same models, rows and batches, one thread, CPU time.

Every way of training gets, in turn, a process of its own for some steps; only steps after the first one count, never
loading, tokenising beforehand (TRL's) or saving. tokenkit's steps are those of its training loop, with the tokenising
and aligning that it does at every step. TRL is given ids that are ready, and is told to leave out gradient
checkpointing, bfloat16, packing, logging, saving and workers. Prints Markdown tables of ratios: medians over
interleaved repeats, their smallest and largest, and the most memory beside the loaded models.
Usage: python -m benchmarks.trl_training [--settings small large] [--repeats 5] [--steps 4] [--ways "ALM" ...]
       [--json FILE]
Needs trl (`pip install trl==1.16.0`) and the shared data folder.
"""

import os

os.environ.update(
    OMP_NUM_THREADS="1",
    RAYON_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    TRL_EXPERIMENTAL_SILENCE="1",
    TRANSFORMERS_VERBOSITY="error",
)

import argparse
import importlib.metadata
import multiprocessing
import statistics
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.trl_training_models import SETTINGS, make_models
from benchmarks.trl_training_ways import GROUPS, WAYS, run_round
from tokenkit.report.claims import Row, make_claim, measured, own_command, save_claim

Answers = dict[str, list[dict[str, float]]]


def in_a_process(way: str, folder: Path, steps: int) -> dict[str, float]:
    """One round: CPU seconds of a step, and bytes beside the models."""
    fork = multiprocessing.get_context("fork")  # packages are imported once, for all
    ours, its = fork.Pipe(duplex=False)
    process = fork.Process(target=_round, args=(its, way, folder, steps))
    process.start()
    its.close()
    try:
        return ours.recv()
    except EOFError:
        raise SystemExit(f"{way}: ended early; what it wrote above says why") from None
    finally:
        process.join()


def _round(answer: Connection, way: str, folder: Path, steps: int) -> None:
    sys.stdout = sys.stderr  # what libraries print is no table
    answer.send(run_round(way, folder, steps))


def rounds(ways: list[str], folder: Path, repeats: int, steps: int) -> Answers:
    """What each way answers, all in turn."""
    found: Answers = {way: [] for way in ways}
    for repeat in range(repeats):
        for way in ways:
            found[way].append(in_a_process(way, folder, steps))
            print(f"round {repeat}, {way}: {found[way][-1]}", file=sys.stderr, flush=True)
    return found


def ratio(peer: list[float], own: list[float]) -> str:
    """What the peer takes in parts of ours: of the medians, and the smallest and largest of the rounds."""
    each = [a / b for a, b in zip(peer, own, strict=True)]
    return f"**{statistics.median(peer) / statistics.median(own):.2f}** ({min(each):.2f} to {max(each):.2f})"


def table(setting: str, found: Answers) -> str:
    """One line for each pair that is compared."""
    lines = [f"| {setting}: tokenkit | TRL | TRL's CPU time / tokenkit's | TRL's memory / tokenkit's |"]
    lines.append("| --- | --- | ---: | ---: |")
    for ours, theirs in GROUPS:
        if ours in found and theirs in found:
            cells = [ratio(*([r[key] for r in found[way]] for way in (theirs, ours))) for key in ("seconds", "bytes")]
            lines.append(f"| {ours} | {theirs} | {' | '.join(cells)} |")
    return "\n".join(lines)


def claim_rows(setting: str, found: Answers) -> list[Row]:
    """Every pair that is compared, by time and by memory."""
    rows, units = [], (("CPU seconds of a step", "seconds", 1.0), ("peak MB beside the models", "bytes", 1e-6))
    for ours, theirs in GROUPS:
        if ours in found and theirs in found:
            for unit, key, scale in units:
                sides = ([scale * one[key] for one in found[way]] for way in (ours, theirs))
                rows.append(measured(f"{ours}, {setting}", f"TRL {theirs}", unit, *sides))
    return rows


def write_claim(path: Path, rows: list[Row]) -> None:
    """What was found, in the common form."""
    sentence = (
        "A step of the training loop beside TRL's trainers over the same models, rows and batches; tokenkit "
        "tokenises and aligns at every step, TRL gets ids that are ready."
    )
    peers = {"trl": importlib.metadata.version("trl")}
    save_claim(path, make_claim("training", sentence, own_command(), rows, peers))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", choices=SETTINGS, nargs="+", default=list(SETTINGS))
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="that count in a round; one more goes before them")
    parser.add_argument("--json", type=Path, help="write the claim there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for setting in options.settings:
        with tempfile.TemporaryDirectory() as folder:
            make_models(setting, Path(folder))
            found = rounds(options.ways, Path(folder), options.repeats, options.steps)
        print(f"\n{table(setting, found)}", flush=True)
        rows += claim_rows(setting, found)
    if options.json is not None:
        write_claim(options.json, rows)


if __name__ == "__main__":
    main()
