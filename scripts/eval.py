"""Measures a model folder: the guide's name of `tokenkit eval`, whose run files and keys it takes as well.

python scripts/eval.py model_path=outputs/my_model eval.tasks='[arc_easy, piqa]' eval.limit=100
"""

import sys

from tokenkit.cli_shared import run_script


def main() -> None:
    from tokenkit.cli import evaluate
    from tokenkit.verbs.guide import HARNESS, MODEL, renamed

    evaluate(renamed(sys.argv[1:], MODEL, HARNESS))


if __name__ == "__main__":
    run_script("eval", main)
