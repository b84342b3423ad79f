"""Gives a model another tokenizer without training: the guide's name of `tokenkit transfer`, whose keys it takes too.

python scripts/zett.py source_model.pretrained_model_name_or_path=FOLDER target_tokenizer_name=FOLDER output=FOLDER
"""

from tokenkit.cli_guide import run_guide

if __name__ == "__main__":
    run_guide("zett", __doc__)
