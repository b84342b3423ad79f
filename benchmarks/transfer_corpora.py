"""Text of the two pairs that initialisers are compared on, out of what benchmarks/tokenizer_corpora.py writes.

Writes OUTPUT/{english,mixed}/{train,test}.jsonl: English alone, and code with 43 languages and English. Test documents
of the mixed pair are modules held out of the standard library and news held out of the same languages.
Usage: python benchmarks/transfer_corpora.py outputs/tokenizer_corpora outputs/transfer_corpora
"""

import argparse
import hashlib
from pathlib import Path

from tokenizer_corpora import CORPORA, rows, write

from tokenkit.data.source import SourceConfig, read_documents


def some(path: Path, num_bytes: int, every: int = 1) -> list[str]:
    """Every so many-th document of a file, up to so many bytes."""
    documents = read_documents(SourceConfig(path=str(path)))[::every]
    taken, total = [], 0
    for document in documents:
        if total >= num_bytes:
            break
        taken.append(document)
        total += len(document.encode())
    return taken


def news() -> list[str]:
    """The held-out news, a document per language."""
    found = rows(CORPORA / "ntrex/valid.jsonl.gz")
    return ["\n".join(row[name] for row in found[:12]) for name in found[0] if name != "id"]


def main() -> None:
    """Writes everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpora", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    train, test, output = arguments.corpora / "train", arguments.corpora / "test", arguments.output
    write(output / "english/train.jsonl", some(train / "english.jsonl", 8_000_000))
    write(output / "english/test.jsonl", some(test / "english.jsonl", 150_000))
    mixed = [*some(train / "code.jsonl", 4_000_000, every=2), *some(train / "languages.jsonl", 4_000_000)]
    write(output / "mixed/train.jsonl", [*mixed, *some(train / "english.jsonl", 2_000_000, every=3)])
    held_out = [*some(test / "code.jsonl", 100_000), *news()]
    write(output / "mixed/test.jsonl", sorted(held_out, key=lambda text: hashlib.sha256(text.encode()).digest()))


if __name__ == "__main__":
    main()
