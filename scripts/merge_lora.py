"""Merges an adapter into its base: the guide's name of `tokenkit merge-lora`.

python scripts/merge_lora.py base_model=FOLDER lora_model=outputs/my_lora_model output_path=outputs/merged_model
"""

import sys

from tokenkit.cli_shared import run_script


def main() -> None:
    from tokenkit.cli import merge_lora
    from tokenkit.verbs.guide import MODEL, renamed

    merge_lora(renamed(sys.argv[1:], MODEL))


if __name__ == "__main__":
    run_script("merge_lora", main)
