"""Measures several models as one: the guide's name of `tokenkit eval-lockstep`, whose keys it takes as well.

python scripts/eval_lockstep.py runs/eval-lockstep/one_tokenizer.yaml combine_strategy=mean_logits
"""

import sys

from tokenkit.cli_shared import run_script


def main() -> None:
    from tokenkit.cli import eval_lockstep
    from tokenkit.verbs.guide import LOCKSTEP, renamed

    eval_lockstep(renamed(sys.argv[1:], LOCKSTEP))


if __name__ == "__main__":
    run_script("eval_lockstep", main)
