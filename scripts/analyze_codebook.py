"""How a learned tokenizer uses its ids and its codes on text: analysis.json, codebook.csv, vocab.json, report.html.

    python scripts/analyze_codebook.py --model models/tokenizer_final --corpus data/corpus.txt --output outputs/codebook
    python scripts/analyze_codebook.py --model ... --corpus ... --output ... --top-k 32768

`--top-k` also writes OUTPUT/pruned: the tokenizer with at most so many pins, those that save the most ids on the text,
and with pruning.json, which says what became of every old id. A checkpoint gets its first pins so.
"""

import argparse
import json
from pathlib import Path
from typing import Any


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, required=True, metavar="PATH", help="a tokenizer's folder or a checkpoint"
    )
    parser.add_argument("--corpus", required=True, metavar="PATH", help="a file, folder or glob of text")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--top-k", type=int, metavar="N", help="also prune to so many pins")
    parser.add_argument("--by", choices=("saving", "frequency"), default="saving", help="what a pin is worth")
    parser.add_argument("--min-count", type=int, default=1, help="uses that a pin must have to be kept")
    return parser.parse_args()


def main(given: argparse.Namespace) -> dict[str, Any]:
    from tokenkit.config import build
    from tokenkit.verbs.tokenizer.analyze import TokenizerAnalyzeRun, analyze_tokenizer
    from tokenkit.verbs.tokenizer.prune import TokenizerPruneRun, prune_tokenizer

    source = {"path": given.corpus}
    run = build(TokenizerAnalyzeRun, {"model": given.model, "corpora": source, "output": given.output})
    found: dict[str, Any] = {"analysis": analyze_tokenizer(run)}
    if given.top_k is not None:
        values = {"model": given.model, "corpus": source, "output": given.output / "pruned"}
        values |= {"top_k": given.top_k, "by": given.by, "min_count": given.min_count}
        found["pruned"] = prune_tokenizer(build(TokenizerPruneRun, values))
    return found


if __name__ == "__main__":
    given = arguments()
    from tokenkit.cli_shared import run_script

    run_script("analyze_codebook", lambda: print(json.dumps(main(given), indent=1)))
