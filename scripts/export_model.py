"""Writes a model for others: the guide's name of `tokenkit export`, whose other keys it takes as well.

python scripts/export_model.py model_path=outputs/my_model output_path=exported/my_model format=huggingface
"""

from tokenkit.cli_guide import run_guide

if __name__ == "__main__":
    run_guide("export_model", __doc__)
