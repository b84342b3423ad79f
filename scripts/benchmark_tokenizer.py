"""Times a learned tokenizer beside a word tokenizer and others, and holds it to the checklist's limits.

python scripts/benchmark_tokenizer.py --model outputs/tokenizer_small/tokenizer --corpus texts.txt
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--corpus", required=True, metavar="FILE", help="text: a file, a folder or a glob")
    parser.add_argument("--tokenizer", nargs="*", default=[], metavar="DIR", help="others (tokenizer.json) beside it")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--output", type=Path, metavar="JSON")
    given = parser.parse_args()
    from tokenkit.config import build
    from tokenkit.verbs.tokenizer.benchmark import TokenizerBenchmarkRun, benchmark

    values = {"model": given.model, "source": {"path": given.corpus}, "beside": given.tokenizer}
    values |= {"repeats": given.repeats, "output": given.output}
    print(json.dumps(benchmark(build(TokenizerBenchmarkRun, values)), indent=1))


if __name__ == "__main__":
    from tokenkit.cli_shared import run_script

    run_script("benchmark_tokenizer", main)
