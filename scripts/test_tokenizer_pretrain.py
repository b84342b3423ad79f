"""Tests a learned tokenizer before and after training and at the end, and compares two tests.

    python scripts/test_tokenizer_pretrain.py --phase before --output baseline_results.json
    python scripts/test_tokenizer_pretrain.py --phase after --model checkpoints/checkpoint_best.bin \
        --output trained_results.json
    python scripts/test_tokenizer_pretrain.py --compare baseline_results.json trained_results.json \
        --report reports/training_comparison.html
    python scripts/test_tokenizer_pretrain.py --phase final --model models/tokenizer_final --comprehensive

The last one also decides the gates; where one fails, the exit code is 2.
"""

import argparse
import sys
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--phase", choices=("before", "after", "final"))
    what.add_argument("--compare", nargs=2, type=Path, metavar=("A.json", "B.json"))
    parser.add_argument("--model", type=Path, metavar="CKPT", help="a checkpoint, or the folder of a tokenizer")
    parser.add_argument("--config", type=Path, metavar="FILE", help="of the untrained tokenizer, instead of --model")
    parser.add_argument("--kind", choices=("compact", "open"), help="by default what the model is")
    parser.add_argument("--output", type=Path, metavar="JSON")
    parser.add_argument("--comprehensive", action="store_true", help="try every string that tokenizers stumble over")
    parser.add_argument("--corpus", metavar="PATH", help="held-out text: a file, folder or glob")
    parser.add_argument("--random-strings", type=int, metavar="N", help="how many random byte strings are tried")
    parser.add_argument("--language-model", type=Path, metavar="DIR", help="one on this tokenizer, for gate G3")
    parser.add_argument("--report", type=Path, metavar="OUT.html", help="the page of --compare")
    return parser.parse_args()


def main(given: argparse.Namespace) -> int:
    from tokenkit.config import UserError, build
    from tokenkit.verbs.tokenizer.compare import TokenizerCompareRun, compare_tests
    from tokenkit.verbs.tokenizer.test import TokenizerTestRun, failures, result_lines, run_tokenizer_test

    if given.compare:
        before, after = given.compare
        found = compare_tests(TokenizerCompareRun(before=before, after=after, report=given.report))
        print("\n".join(found.lines()))
        return 0
    if given.report:
        raise UserError("--report: belongs to --compare A.json B.json; write --output FILE for the figures of a phase")
    values = {key: vars(given)[key] for key in ("phase", "model", "config", "kind", "output", "comprehensive")}
    values["corpus"] = {"path": given.corpus} if given.corpus else None
    values["edges"] = {"random_strings": given.random_strings}
    values["gates"] = {"language_model": given.language_model}
    results = run_tokenizer_test(build(TokenizerTestRun, values), lambda line: print(line, file=sys.stderr))
    print("\n".join(result_lines(results)))
    failed = failures(results)
    for line in failed:
        print(f"test_tokenizer_pretrain: {line}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    given = arguments()
    from tokenkit.cli_shared import run_script

    run_script("test_tokenizer_pretrain", lambda: main(given))
