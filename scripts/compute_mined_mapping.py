r"""Finds for every token of one tokenizer the nearest one of another: the guide's name of `tokenkit mined-mapping`.

    python scripts/compute_mined_mapping.py teacher_tokenizer_name=FOLDER target_tokenizer_name=FOLDER \
        output=outputs/tokenizer_data/pair num_workers=8
"""

from tokenkit.cli_guide import run_guide

if __name__ == "__main__":
    run_guide("compute_mined_mapping", __doc__)
