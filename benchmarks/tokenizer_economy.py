"""Bytes per id of the learned tokenizer, both forms, beside BPE, Unigram and words of the same text and size.

Prints a Markdown table over the test texts of benchmarks/tokenizer_corpora.py. BPE and Unigram have as many ids as the
learned tokenizer's compact form. The word tokenizer is lossy: its share of unknown words stands beside.
Usage: python benchmarks/tokenizer_economy.py CORPORA PACKAGE [--train english.jsonl ...] [--per-test 300000]
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenkit.data.source import SourceConfig, read_documents
from tokenkit.tokenizers.autoencoder.package import Package
from tokenkit.tokenizers.train import train_tokenizer
from tokenkit.tokenizers.word import UNK, WordTokenizer

Encode = Callable[[str], Sequence[int]]


def first(texts: list[str], num_bytes: int) -> list[str]:
    """The first so many bytes of texts, whole ones."""
    taken, room = [], num_bytes
    for text in texts:
        if room <= 0:
            break
        taken.append(text)
        room -= len(text.encode())
    return taken


def main() -> None:
    """Trains what is missing, counts, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path)
    parser.add_argument("package", type=Path)
    parser.add_argument("--train", nargs="*", default=["english.jsonl", "code.jsonl", "languages.jsonl"])
    parser.add_argument("--per-test", type=int, default=300_000)
    args = parser.parse_args()
    texts = [t for name in args.train for t in read_documents(SourceConfig(path=str(args.corpora / "train" / name)))]
    package = Package.load(args.package, "open") if (args.package / "weights.safetensors").exists() else None
    compact = Package.load(args.package, "compact").codec("compact", 100_000)
    size = compact.layout.vocab_size
    word = WordTokenizer.train(texts)
    encoders: dict[str, Encode] = {"learned, compact": compact.encode}
    if package is not None:
        encoders["learned, open"] = package.codec("open", 100_000).encode
    for kind in ("bpe", "unigram"):
        tokenizer = train_tokenizer(texts, kind, size)
        encoders[f"{kind}, {size:,} ids"] = lambda text, tokenizer=tokenizer: tokenizer.encode(text).ids
    encoders["words (lossy)"] = lambda text: word.encode(text, False)
    files = sorted((args.corpora / "test").glob("*.jsonl"))
    tests = {file.stem: first(read_documents(SourceConfig(path=str(file))), args.per_test) for file in files}
    print(f"Trained on {', '.join(args.train)}: {sum(len(t.encode()) for t in texts):,} bytes\n")
    print(f"| bytes per id | {' | '.join(tests)} |\n|---|{'---|' * len(tests)}")
    for name, encode in encoders.items():
        cells = []
        for documents in tests.values():
            ids = [encode(text) for text in documents]
            rate = sum(len(text.encode()) for text in documents) / sum(map(len, ids))
            unknown = sum(list(row).count(UNK) for row in ids) / sum(map(len, ids))
            cells.append(f"{rate:.3f}" + (f" ({unknown:.1%} unknown)" if name.startswith("words") else ""))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
