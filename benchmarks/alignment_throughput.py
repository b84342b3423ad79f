"""Byte spans and alignment of GPT-2 (student) and Llama-3 (teacher) over real text: tokenkit beside peers, one thread.

Prints a Markdown table of medians over interleaved repeats in one run. Needs the shared data folder; for TRL's rows
`pip install trl`, for the JAX toolkit's a checkout of bminixhofer/tokenkit.
Usage: python benchmarks/alignment_throughput.py [--repeats 7] [--kilobytes 600] [--upstream CHECKOUT] [--memory]
       [--json FILE]
"""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

import argparse
import gzip
import importlib.metadata
import json
import lzma
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import PIPE
from typing import Any

from tokenizers import Tokenizer

from tokenkit.align.spans import align
from tokenkit.report.claims import Row, absent, make_claim, measured, own_command, save_claim
from tokenkit.tokenizers.load import load_tokenizer

UPSTREAM = "JAX toolkit: align"
OWN, WHOLE = "tokenkit: align", "tokenkit: encode both, align"
TRL, TRL_WHOLE = "TRL: align", "TRL: encode both, align"
SHARED = Path(os.environ.get("TOKENKIT_SHARED", Path(__file__).parents[2] / "shared"))


def read_texts(kilobytes: int) -> list[str]:
    """Web documents, the first so many kilobytes of them."""
    texts: list[str] = []
    room = 1000 * kilobytes
    with gzip.open(SHARED / "data/corpora/c4_en_mini/train.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            texts.append(json.loads(line)["text"])
            room -= len(texts[-1].encode())
            if room <= 0:
                break
    return texts


def bare(name: str) -> Tokenizer:
    """The library's own tokenizer, as anybody would load it."""
    path = SHARED / "data/tokenizers" / name / "tokenizer.json"
    return Tokenizer.from_str(path.read_text("utf-8") if path.exists() else lzma.open(f"{path}.xz", "rt").read())


def jobs(texts: list[str]) -> dict[str, Callable[[], Any]]:
    """What is timed, by name. Alignments run over encodings made before the clock starts."""
    student, teacher = (load_tokenizer(str(SHARED / "data/tokenizers" / name)) for name in ("gpt2", "llama3"))
    backends = bare("gpt2"), bare("llama3")
    encoded = list(zip(student.encode_batch(texts), teacher.encode_batch(texts)))

    def floor() -> None:
        for backend in backends:
            backend.encode_batch(texts, add_special_tokens=False)

    def ours() -> None:
        for a, b in zip(student.encode_batch(texts), teacher.encode_batch(texts)):
            align(a, b)

    timed: dict[str, Callable[[], Any]] = {
        "floor: `tokenizers` alone, both sides": floor,
        "tokenkit: encode both, align": ours,
        "tokenkit: align": lambda: [align(a, b) for a, b in encoded],
    }
    try:
        from trl.experimental.gold.gold_trainer import ULDLoss
        from trl.experimental.utils import encode_with_byte_offsets
    except ImportError as error:
        print(f"without TRL's rows: {error}; pip install trl\n")
        return timed
    offsets = [[spans for _, spans in encode_with_byte_offsets(one, texts)] for one in backends]

    def trl_whole() -> None:
        sides = [encode_with_byte_offsets(one, texts) for one in backends]
        for (_, a), (_, b) in zip(*sides):
            ULDLoss._align_by_byte_offsets(a, b)

    timed["TRL: encode both, align"] = trl_whole
    timed["TRL: align"] = lambda: [ULDLoss._align_by_byte_offsets(a, b) for a, b in zip(*offsets)]
    return timed


class Upstream:
    """The JAX toolkit in a process of its own, for its package has our name."""

    def __init__(self, checkout: Path, texts: list[str], folder: Path) -> None:
        for side, name in (("student", "gpt2"), ("teacher", "llama3")):
            (folder / side).mkdir()
            (folder / side / "tokenizer.json").write_text(bare(name).to_str(), "utf-8")
            shutil.copy(SHARED / "data/tokenizers" / name / "tokenizer_config.json", folder / side)
        (folder / "texts.json").write_text(json.dumps(texts), "utf-8")
        command = [sys.executable, str(Path(__file__).with_name("upstream_worker.py")), str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        self.process = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True, env=environment)

    def measure(self) -> tuple[float, int]:
        """CPU seconds of one pass, and the chunks it found."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        seconds, chunks = self.process.stdout.readline().split()
        return float(seconds), int(chunks)


def print_memory() -> None:
    """Peak bytes per token that aligning one document takes, for a document of 1 MB and one of 10 MB."""
    student, teacher = (load_tokenizer(str(SHARED / "data/tokenizers" / name)) for name in ("gpt2", "llama3"))
    text = "\n".join(read_texts(2000))
    print("| document | tokens of both | peak bytes / token |\n| --- | ---: | ---: |")
    for megabytes in (1, 10):
        document = (text * (1 + megabytes * 1_000_000 // len(text)))[: megabytes * 1_000_000]
        a, b = student.encode(document), teacher.encode(document)
        tracemalloc.start()
        align(a, b)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        print(f"| {megabytes} MB | {len(a) + len(b):,} | {peak / (len(a) + len(b)):.1f} |")


def misspelt(texts: list[str], chunks: Sequence[Any]) -> int:
    """How many chunks, (student range, teacher range) per text, do not spell the same bytes on both sides."""
    sides = [load_tokenizer(str(SHARED / "data/tokenizers" / name)) for name in ("gpt2", "llama3")]
    tables = [tokenizer.token_bytes for tokenizer in sides]
    ids = [[encoding.ids for encoding in tokenizer.encode_batch(texts)] for tokenizer in sides]
    wrong = 0
    for number, pairs in enumerate(chunks):
        for ranges in pairs:
            spelt = [b"".join(table[i] for i in of[number][slice(*r)]) for table, of, r in zip(tables, ids, ranges)]
            wrong += spelt[0] != spelt[1]
    return wrong


def claim_rows(texts: list[str], timed: dict[str, Callable[[], Any]], seconds: dict[str, list[float]]) -> list[Row]:
    """Times beside the peers, and what is right of the answers."""
    ours = [[((s[0], s[1]), (s[2], s[3])) for s in found.spans.tolist()] for found in timed[OWN]()]
    exact, wrong = sum(map(len, ours)), misspelt(texts, ours)
    unit, kinds = "CPU seconds", ("chunks", "chunks whose sides differ")
    floor = "the library alone, both sides"
    rows = [measured("encode both, align", floor, unit, seconds[WHOLE], next(iter(seconds.values())))]
    if TRL in timed:
        theirs = [[((a[0], a[-1] + 1), (b[0], b[-1] + 1)) for a, b in zip(*sides)] for sides in timed[TRL]()]
        rows += [
            measured("align", "TRL", unit, seconds[OWN], seconds[TRL]),
            measured("encode both, align", "TRL", unit, seconds[WHOLE], seconds[TRL_WHOLE]),
            measured("align", "TRL", kinds[0], [exact], [sum(map(len, theirs))], better="equal"),
            measured("align", "TRL", kinds[1], [wrong], [misspelt(texts, theirs)], better="equal"),
        ]
    else:
        rows.append(absent("align", "TRL", unit, "trl is not installed", seconds[OWN]))
    return rows


def upstream_rows(chunks: int, own: list[float], seconds: list[float] | None, found: int) -> list[Row]:
    """Beside the JAX toolkit, which cannot be installed from the package index."""
    if seconds is None:
        why = "needs a checkout of its repository, named by TOKENKIT_UPSTREAM"
        return [absent("align", "JAX toolkit", "CPU seconds", why, own)]
    return [
        measured("align", "JAX toolkit", "CPU seconds", own, seconds),
        measured("align", "JAX toolkit", "chunks", [chunks], [found], better="equal"),
    ]


def write_claim(path: Path, rows: list[Row], upstream: bool) -> None:
    """What was found, in the common form."""
    sentence = (
        "GPT-2 and Llama-3 over web text, one thread: how long aligning takes, alone and with the encoding of "
        "both sides, and how many chunks the peers find in the same text."
    )
    peers = {"JAX toolkit": "bcacdef" if upstream else "absent: no checkout"}
    try:
        peers["trl"] = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        peers["trl"] = "absent: not installed"
    save_claim(path, make_claim("alignment", sentence, own_command(), rows, peers))


def main() -> None:
    """Times every job `--repeats` times in turn and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--kilobytes", type=int, default=600)
    checkout = os.environ.get("TOKENKIT_UPSTREAM")
    parser.add_argument("--upstream", type=Path, default=checkout, help="a checkout of bminixhofer/tokenkit")
    parser.add_argument("--memory", action="store_true", help="memory per token instead of time")
    parser.add_argument("--json", type=Path, help="write the claim there")
    arguments = parser.parse_args()
    if arguments.memory:
        print_memory()
        return
    texts = read_texts(arguments.kilobytes)
    timed = jobs(texts)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    upstream = None
    with tempfile.TemporaryDirectory() as folder:
        if arguments.upstream is not None:
            upstream = Upstream(arguments.upstream, texts, Path(folder))
            seconds[UPSTREAM] = []
            upstream.measure()
    for repeat in range(arguments.repeats + 1):
        if upstream is not None and repeat:
            seconds[UPSTREAM].append(upstream.measure()[0])
        for name, job in timed.items():
            begin = time.process_time()
            job()
            if repeat:  # the first round warms caches
                seconds[name].append(time.process_time() - begin)
    report(texts, timed, seconds, upstream)
    if arguments.json is not None:
        found = upstream.measure()[1] if upstream is not None else 0
        chunks = sum(len(one) for one in timed[OWN]())
        rows = claim_rows(texts, timed, seconds)
        rows += upstream_rows(chunks, seconds[OWN], seconds.get(UPSTREAM), found)
        write_claim(arguments.json, rows, upstream is not None)
    if upstream is not None:
        upstream.process.kill()


def report(texts: list[str], timed: dict[str, Any], seconds: dict[str, list[float]], upstream: Upstream | None) -> None:
    """Prints the tables."""
    tokens = sum(len(encoding.ids) for encoding in bare("gpt2").encode_batch(texts))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    floor = next(iter(medians.values()))
    print(f"{len(texts)} documents, {sum(len(text.encode()) for text in texts)} bytes, {tokens} student tokens\n")
    print("| job | k student tokens / CPU-s | time / floor |\n| --- | ---: | ---: |")
    for name, median in medians.items():
        print(f"| {name} | {tokens / median / 1000:,.0f} | {median / floor:.3f} |")
    if upstream is not None:
        exact = sum(len(chunks) for chunks in timed["tokenkit: align"]())
        print(f"\nJAX toolkit / tokenkit: align {medians[UPSTREAM] / medians['tokenkit: align']:.1f}; ", end="")
        print(f"it finds {upstream.measure()[1]:,} of {exact:,} chunks")
    if "TRL: align" in medians:
        print(f"\nTRL / tokenkit: align {medians['TRL: align'] / medians['tokenkit: align']:.1f}, whole ", end="")
        print(f"{medians['TRL: encode both, align'] / medians['tokenkit: encode both, align']:.2f}")


if __name__ == "__main__":
    main()
