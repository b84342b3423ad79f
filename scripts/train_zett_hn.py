r"""Trains a network that makes the rows of any tokenizer: the guide's name of `tokenkit train-hypernet`.

    python scripts/train_zett_hn.py model.pretrained_model_name_or_path=FOLDER data.path=FILE.jsonl steps=3000 \
        ppl_eval_data=FILE.txt eval.tokenizers='[FOLDER]' output=outputs/hypernet
"""

from tokenkit.cli_guide import run_guide

if __name__ == "__main__":
    run_guide("train_zett_hn", __doc__)
