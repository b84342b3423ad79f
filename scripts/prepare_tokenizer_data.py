"""Text → a folder to train a learned tokenizer on: documents split in two, counted chunks, statistics.

    python scripts/prepare_tokenizer_data.py --input data/wiki --output data/prepared

`paths.training_data` of the JSON configuration may name that folder.
"""

import argparse
import json
import sys
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", "--wiki-dir", required=True, metavar="PATH", help="a file, folder or glob of text")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--config", type=Path, metavar="FILE", help="takes chunker and validation_split from it")
    parser.add_argument("--chunker", help="word, space, superword or fixed:N")
    parser.add_argument("--validation-split", type=float, help="share of the documents that is held out")
    parser.add_argument("--separator", help="regular expression between the documents of a text file")
    parser.add_argument("--min-freq", type=int, default=1, help="chunks that occur less often are not trained on")
    parser.add_argument("--max-files", type=int)
    parser.add_argument("--sample-mb", type=float, help="stop after so many million bytes of text")
    parser.add_argument("--seed", type=int, default=0, help="decides which documents are held out")
    return parser.parse_args()


def main(given: argparse.Namespace) -> None:
    from tokenkit.config import build
    from tokenkit.tokenizers.autoencoder.config import TokenizerConfig, load_config
    from tokenkit.verbs.tokenizer.prepare import TokenizerPrepareRun, prepare

    config = load_config(given.config) if given.config else TokenizerConfig()
    max_bytes = round(given.sample_mb * 1e6) if given.sample_mb else None
    values = {
        "output": given.output,
        "source": {"path": given.input, "separator": given.separator, "max_bytes": max_bytes},
        "chunker": given.chunker or config.chunker,
        "validation_split": given.validation_split or config.training.validation_split,
        "split_seed": given.seed,
        "min_count": given.min_freq,
        "max_files": given.max_files,
    }
    statistics = prepare(build(TokenizerPrepareRun, values), lambda line: print(line, file=sys.stderr))
    print(json.dumps(statistics, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    given = arguments()
    from tokenkit.cli_shared import run_script

    run_script("prepare_tokenizer_data", lambda: main(given))
