"""The go or no-go decisions about a learned tokenizer: PASS, FAIL or NOT RUN for each of four gates.

    python scripts/tokenizer_gates.py --model models/tokenizer_final --corpus held_out.txt --language-model models/lm

The exit code is 2 where a gate fails.
"""

import argparse
import sys
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a tokenizer, or a checkpoint")
    parser.add_argument("--kind", choices=("compact", "open"), help="by default what the model is")
    parser.add_argument("--corpus", metavar="PATH", help="held-out text: a file, folder or glob")
    parser.add_argument("--language-model", type=Path, metavar="DIR", help="one on this tokenizer, for gate G3")
    parser.add_argument("--random-strings", type=int, default=1000, metavar="N")
    parser.add_argument("--output", type=Path, metavar="JSON", help="everything that was found")
    return parser.parse_args()


def main(given: argparse.Namespace) -> int:
    from tokenkit.config import build
    from tokenkit.verbs.tokenizer.gates import TokenizerGatesRun, failed_gates, gate_lines, tokenizer_gates

    values = {
        "model": given.model,
        "kind": given.kind,
        "corpus": {"path": given.corpus} if given.corpus else None,
        "edges": {"random_strings": given.random_strings, "text_bytes": 1 << 20},
        "gates": {"language_model": given.language_model},
        "output": given.output,
    }
    gates = tokenizer_gates(build(TokenizerGatesRun, values), lambda line: print(line, file=sys.stderr))
    print("\n".join(gate_lines(gates)))
    failed = failed_gates(gates)
    for line in failed:
        print(f"tokenizer_gates: {line}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    given = arguments()
    from tokenkit.cli_shared import run_script

    run_script("tokenizer_gates", lambda: main(given))
