"""Measures a model folder: the guide's name of `tokenkit eval`, whose run files and keys it takes as well.

python scripts/eval.py model_path=outputs/my_model eval.tasks='[arc_easy, piqa]' eval.limit=100
"""

from tokenkit.cli_guide import run_guide

if __name__ == "__main__":
    run_guide("eval", __doc__)
