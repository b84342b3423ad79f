"""Writes a model for others: the guide's name of `tokenkit export`, whose other keys it takes as well.

python scripts/export_model.py model_path=outputs/my_model output_path=exported/my_model format=huggingface
"""

import sys

from tokenkit.cli_shared import run_script


def main() -> None:
    from tokenkit.cli import export
    from tokenkit.verbs.guide import MODEL, renamed

    export(renamed(["format=huggingface", *sys.argv[1:]], MODEL))


if __name__ == "__main__":
    run_script("export_model", main)
