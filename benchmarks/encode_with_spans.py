"""Encoding with byte spans beside the library's own `encode_batch`, one thread, every tokenizer of the shared folder.

Prints a Markdown table: medians of CPU time over interleaved repeats in one process, over whole web documents and over
short lines in 43 languages; and with --memory, for one document of 1 and of 10 MB each in a process of its own, the
peak memory per token.
Usage: python benchmarks/encode_with_spans.py [--repeats 7] [--kilobytes 600] [--memory] [NAME ...]
"""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

import argparse
import ctypes
import gzip
import json
import lzma
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tokenizers import Tokenizer

from tokenkit.config import UserError
from tokenkit.tokenizers.load import load_tokenizer

SHARED = Path(os.environ.get("TOKENKIT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
FOLDER, CORPORA = SHARED / "data/tokenizers", SHARED / "data/corpora"


def read_lines(path: Path) -> list[dict[str, str]]:
    """The objects of a gzipped JSON-lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def first(texts: list[str], kilobytes: int) -> list[str]:
    """The first so many kilobytes of the texts."""
    taken, room = [], 1000 * kilobytes
    for text in texts:
        if room <= 0:
            break
        taken.append(text)
        room -= len(text.encode())
    return taken


def bare(name: str) -> Tokenizer:
    """The library's own tokenizer, as anybody would load it."""
    path = FOLDER / name / "tokenizer.json"
    return Tokenizer.from_str(path.read_text("utf-8") if path.exists() else lzma.open(f"{path}.xz", "rt").read())


def times(name: str, texts: list[str], repeats: int) -> tuple[float, int, int]:
    """Median of our time / the library's over the repeats, texts used, and tokens."""
    ours, library = load_tokenizer(str(FOLDER / name)), bare(name)
    accepted, tokens = [], 0
    for text in texts:
        try:
            tokens += len(ours.encode(text))
            accepted.append(text)
        except UserError:
            continue  # a character without a span: counted in the table of byte_view.py
    seconds: list[tuple[float, float]] = []
    for _ in range(repeats + 1):
        begin = time.process_time()
        found = library.encode_batch(accepted, add_special_tokens=False)
        middle = time.process_time()
        encoded = ours.encode_batch(accepted)
        end = time.process_time()
        del found, encoded
        seconds.append((end - middle, middle - begin))
    # The first round warms caches.
    ratio = statistics.median(a for a, _ in seconds[1:]) / statistics.median(b for _, b in seconds[1:])
    return ratio, len(accepted), tokens


def peak(name: str, megabytes: int) -> None:
    """Prints tokens and the growth of the peak, in bytes, of encoding one document of so many megabytes."""
    tokenizer = load_tokenizer(str(FOLDER / name))
    texts = [line["text"] for line in read_lines(CORPORA / "c4_en_mini/train.jsonl.gz")]
    document = "\n\n".join(texts)
    document = (document * (1 + megabytes * 1_000_000 // len(document)))[: megabytes * 1_000_000]
    document = document.encode("ascii", errors="replace").decode()  # one character, one byte, none that is refused
    tokenizer.encode(document[:1000])
    ctypes.CDLL(None).malloc_trim(0)  # what loading freed must not be counted as room that was there
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew here (Linux)
    before = memory("VmRSS")
    tokens = len(tokenizer.encode(document))
    print(json.dumps([tokens, memory("VmHWM") - before]))


def memory(key: str) -> int:
    """Bytes in memory now (VmRSS) or at the peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def memory_table(names: list[str]) -> None:
    """Peak bytes per token for documents of 1 and 10 MB."""
    print("| tokenizer | 1 MB: peak bytes / token | 10 MB: peak bytes / token |\n| --- | ---: | ---: |")
    for name in names:
        cells = []
        for megabytes in (1, 10):
            command = [sys.executable, __file__, "--peak", str(megabytes), name]
            tokens, growth = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            cells.append(f"{growth / tokens:,.0f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """The table of times, or of memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--kilobytes", type=int, default=600)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.names or sorted(path.name for path in FOLDER.iterdir() if any(path.glob("tokenizer.json*")))
    if arguments.peak:
        return peak(names[0], arguments.peak)
    if arguments.memory:
        return memory_table(names)
    documents = first([line["text"] for line in read_lines(CORPORA / "c4_en_mini/train.jsonl.gz")], arguments.kilobytes)
    rows = read_lines(CORPORA / "ntrex/train.jsonl.gz")
    lines = first([text for row in rows for key, text in row.items() if key != "id"], arguments.kilobytes)
    print("| tokenizer | documents: time / encode_batch | lines: time / encode_batch | documents, lines | tokens |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in names:
        (whole, used, tokens), (short, lines_used, more) = (
            times(name, texts, arguments.repeats) for texts in (documents, lines)
        )
        print(f"| {name} | {whole:.2f} | {short:.2f} | {used}, {lines_used} | {tokens + more:,} |", flush=True)
    return None


if __name__ == "__main__":
    main()
