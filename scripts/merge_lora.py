"""Merges an adapter into its base: the guide's name of `tokenkit merge-lora`.

python scripts/merge_lora.py base_model=FOLDER lora_model=outputs/my_lora_model output_path=outputs/merged_model
"""

import sys

from tokenkit.cli_shared import print_values, run_script


def main() -> None:
    from tokenkit.config import load
    from tokenkit.verbs.guide import MODEL, renamed
    from tokenkit.verbs.merge_lora import MergeLoraRun, merge_lora

    print_values(merge_lora(load(MergeLoraRun, renamed(sys.argv[1:], MODEL))))


if __name__ == "__main__":
    run_script("merge_lora", main)
