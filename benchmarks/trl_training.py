"""Training and distilling with tokenkit beside TRL 1.16: the same models, rows and batches, one thread, CPU time.

Every way of training has a process of its own, which is told in turn to train for some steps; only steps after the
first ones count, never loading, tokenising beforehand (TRL's) or saving. tokenkit's steps are those of its training
loop, with the tokenising and aligning that it does at every step. TRL is given ids that are ready, and what it is
told to leave out: gradient checkpointing, bfloat16, packing, logging, saving and workers. Prints Markdown tables of
ratios: medians over interleaved repeats, and the most memory beside the loaded models.
Usage: python -m benchmarks.trl_training [--settings small large] [--repeats 7] [--steps 4] [--ways "ALM" ...]
Needs trl (`pip install trl==1.16.0`) and the shared data folder.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import PIPE, Popen

from benchmarks.trl_training_models import SETTINGS, make_models
from benchmarks.trl_training_ways import GROUPS, WAYS

QUIET = {
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


@contextmanager
def worker(way: str, folder: Path, steps: int) -> Iterator[Popen]:
    """A process that trains one way whenever it is sent a line, and answers with a line."""
    command = [sys.executable, "-m", "benchmarks.trl_training_ways", way, str(folder), str(steps)]
    process = Popen(command, stdin=PIPE, stdout=PIPE, text=True, env=os.environ | QUIET)
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait()


def ask(process: Popen) -> dict[str, float]:
    """One round of it: CPU seconds of a step, and bytes beside the models."""
    process.stdin.write("go\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a worker has ended early; what it wrote above says why")
    return json.loads(line)


def rounds(ways: list[str], folder: Path, repeats: int, steps: int) -> dict[str, list[dict[str, float]]]:
    """What each way answers, all in turn; the first round of each is for its memory and for warming up alone."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with ExitStack() as stack:
        processes = {way: stack.enter_context(worker(way, folder, steps)) for way in ways}
        for repeat in range(repeats + 1):
            for way, process in processes.items():
                found[way].append(ask(process))
                print(f"round {repeat}, {way}: {found[way][-1]}", file=sys.stderr, flush=True)
    return found


def ratio(peer: list[float], own: list[float]) -> str:
    """How many times as long the peer takes: of the medians, and the smallest and largest of the rounds."""
    each = [a / b for a, b in zip(peer, own, strict=True)]
    return f"**{statistics.median(peer) / statistics.median(own):.2f}** ({min(each):.2f} to {max(each):.2f})"


def table(setting: str, found: dict[str, list[dict[str, float]]]) -> str:
    """One line for each pair that is compared."""
    lines = [f"| {setting}: tokenkit | TRL | TRL's CPU time / tokenkit's | TRL's memory / tokenkit's |"]
    lines.append("| --- | --- | ---: | ---: |")
    for ours, theirs in GROUPS:
        if ours in found and theirs in found:
            seconds = [[r["cpu_seconds"] for r in found[way][1:]] for way in (theirs, ours)]
            memory = found[theirs][0]["bytes"] / found[ours][0]["bytes"]
            lines.append(f"| {ours} | {theirs} | {ratio(*seconds)} | {memory:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", choices=SETTINGS, nargs="+", default=list(SETTINGS))
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="that count in a round; two more go before them")
    options = parser.parse_args()
    for setting in options.settings:
        with tempfile.TemporaryDirectory() as folder:
            make_models(setting, Path(folder))
            found = rounds(options.ways, Path(folder), options.repeats, options.steps)
        print(f"\n{table(setting, found)}", flush=True)


if __name__ == "__main__":
    main()
