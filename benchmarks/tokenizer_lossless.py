"""Every file of a folder, unpacked, and random byte strings, through a learned tokenizer and back, byte by byte.

Usage: python benchmarks/tokenizer_lossless.py PACKAGE FOLDER [--kind compact|open] [--random N] [--per-file BYTES]
"""

import argparse
import gzip
import lzma
import random
from collections.abc import Iterator
from pathlib import Path

from tokenkit.eval.edges import try_strings
from tokenkit.tokenizers.autoencoder.tokenizer import AutoEncoderTokenizer

PIECE = 1 << 16
OPENERS = {".gz": gzip.open, ".xz": lzma.open}


def pieces(path: Path, most: int | None) -> Iterator[bytes]:
    """The bytes of a file, unpacked, in pieces that end anywhere."""
    left = most if most is not None else 1 << 62
    with OPENERS.get(path.suffix, open)(path, "rb") as file:
        while left > 0 and (piece := file.read(min(PIECE, left))):
            left -= len(piece)
            yield piece


def main() -> None:
    """Prints strings, bytes and what was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=["compact", "open"])
    parser.add_argument("--random", type=int, default=1_000_000)
    parser.add_argument("--per-file", type=int)
    args = parser.parse_args()
    tokenizer = AutoEncoderTokenizer.load(args.package, args.kind)
    files = sorted(path for path in args.folder.rglob("*") if path.is_file())
    found = [try_strings(tokenizer, path.name, pieces(path, args.per_file)) for path in files]
    rng = random.Random(0)
    found.append(try_strings(tokenizer, "random", (rng.randbytes(rng.randrange(65)) for _ in range(args.random))))
    for result in found:
        if result.wrong:
            print(f"{result.corpus}: {result.wrong} wrong; {result.first_wrong}")
    rest, last = found[:-1], found[-1]
    print(f"{tokenizer.kind}: {len(files)} files, {sum(r.bytes for r in rest):,} bytes")
    print(f"{sum(r.wrong for r in rest)} of {sum(r.tried for r in rest):,} pieces wrong")
    print(f"{last.wrong} of {last.tried:,} random strings wrong")


if __name__ == "__main__":
    main()
