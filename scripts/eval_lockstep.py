"""Measures several models as one: the guide's name of `tokenkit eval-lockstep`, whose keys it takes as well.

python scripts/eval_lockstep.py runs/eval-lockstep/one_tokenizer.yaml combine_strategy=mean_logits
"""

from tokenkit.cli_guide import run_guide

if __name__ == "__main__":
    run_guide("eval_lockstep", __doc__)
