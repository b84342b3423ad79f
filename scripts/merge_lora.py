"""Merges an adapter into its base: the guide's name of `tokenkit merge-lora`.

python scripts/merge_lora.py base_model=FOLDER lora_model=outputs/my_lora_model output_path=outputs/merged_model
"""

from tokenkit.cli_guide import run_guide

if __name__ == "__main__":
    run_guide("merge_lora", __doc__)
