"""Measures a model folder: the guide's name of `tokenkit eval`, whose run files and keys it takes as well.

python scripts/eval.py model_path=outputs/my_model eval.tasks='[arc_easy, piqa]' eval.limit=100
"""

import sys

from tokenkit.cli_shared import print_rich, print_values, run_script


def main() -> None:
    from tokenkit.config import load
    from tokenkit.verbs.evaluate import EvalRun, evaluate
    from tokenkit.verbs.guide import HARNESS, MODEL, renamed

    figures = evaluate(load(EvalRun, renamed(sys.argv[1:], MODEL, HARNESS)))
    print_values({key: value for key, value in figures.items() if key != "benchmarks"})
    if "benchmarks" in figures:
        from tokenkit.verbs.benchmarks import benchmark_table

        print_rich(benchmark_table(figures["benchmarks"]))


if __name__ == "__main__":
    run_script("eval", main)
