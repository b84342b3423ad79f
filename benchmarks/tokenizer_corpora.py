"""Text for the learned tokenizer, from the shared data and the standard library, as JSON lines of whole documents.

Writes OUTPUT/train/{english,code,languages}.jsonl and OUTPUT/test/{english,wikitext2,stories,code,languages}.jsonl.
No test document is of a training file's documents; the 60 languages of the test are in none of the training text.
Usage: python benchmarks/tokenizer_corpora.py OUTPUT
"""

import argparse
import gzip
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from tokenkit.data.source import SourceConfig, read_documents

SHARED = Path(os.environ.get("TOKENKIT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
CORPORA = SHARED / "data/corpora"
PIECE = 5_000  # characters of a document where a file has none
NUM_LANGUAGES = 60
SAME = {"arb": "arl", "zho": "cmn", "fas": "pes", "swa": "swh", "est": "ekk"}  # one language under two codes


def rows(path: Path) -> list[dict[str, str]]:
    """The objects of a gzipped JSON-lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def pieces(path: Path) -> list[str]:
    """A text file in stretches of equal length."""
    text = path.read_text("utf-8")
    return [text[start : start + PIECE] for start in range(0, len(text), PIECE)]


def english() -> tuple[list[str], list[str]]:
    """Web pages, speeches, stories, plays and encyclopedia articles: training documents, and one of 20 held out."""
    found = [row["text"] for row in rows(CORPORA / "c4_en_mini/train.jsonl.gz")]
    with gzip.open(CORPORA / "us_speeches.txt.gz", "rt", encoding="utf-8") as file:
        found += re.split(r"\n\n\n+", file.read())
    found += (CORPORA / "tinystories/train.txt").read_text("utf-8").split("<|endoftext|>")
    found += pieces(CORPORA / "tinyshakespeare/train.txt") + pieces(CORPORA / "wikitext2/valid.txt")
    held = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % 20 == 0 for text in found]
    return [t for t, h in zip(found, held) if not h], [t for t, h in zip(found, held) if h]


def languages() -> tuple[list[str], list[str]]:
    """News in 43 languages, and the declaration of human rights in 60 others."""
    news = rows(CORPORA / "ntrex/train.jsonl.gz")
    names = [name for name in news[0] if name != "id"]
    training = ["\n".join(row[n] for row in news[i : i + 50]) for n in names for i in range(0, len(news), 50)]
    known = {name.partition("-")[0] for name in names}
    known |= {SAME[name] for name in known if name in SAME}
    declarations = [row for row in rows(CORPORA / "udhr.jsonl.gz") if row["lang"].partition("_")[0] not in known]
    step = len(declarations) / NUM_LANGUAGES
    return training, [declarations[int(number * step)]["text"] for number in range(NUM_LANGUAGES)]


def write(path: Path, documents: Iterable[str]) -> None:
    """Writes one JSON object per document and tells how much it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [text for text in documents if text.strip()]
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in kept), "utf-8")
    print(f"{path}: {len(kept):,} documents, {sum(len(text.encode()) for text in kept):,} bytes")


def main() -> None:
    """Writes everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    training, held_out = english()
    news, declarations = languages()
    write(output / "train/english.jsonl", training)
    write(output / "train/code.jsonl", read_documents(SourceConfig(stdlib="train")))
    write(output / "train/languages.jsonl", news)
    write(output / "test/english.jsonl", held_out)
    write(output / "test/wikitext2.jsonl", pieces(CORPORA / "wikitext2/test.txt"))
    write(output / "test/stories.jsonl", (CORPORA / "tinystories/test.txt").read_text("utf-8").split("<|endoftext|>"))
    write(output / "test/code.jsonl", read_documents(SourceConfig(stdlib="held_out")))
    write(output / "test/languages.jsonl", declarations)


if __name__ == "__main__":
    main()
