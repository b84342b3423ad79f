r"""Counts two tokenizers' tokens and measures their bias: the guide's name of `tokenkit tokenizer-info`.

    python scripts/compute_tokenizer_info.py teacher_tokenizer_name=FOLDER target_tokenizer_name=FOLDER \
        data.path=FILE.jsonl output=outputs/tokenizer_data/pair
"""

from tokenkit.cli_guide import run_guide

if __name__ == "__main__":
    run_guide("compute_tokenizer_info", __doc__)
