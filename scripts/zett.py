"""Gives a model another tokenizer without training: the guide's name of `tokenkit transfer`, whose keys it takes too.

python scripts/zett.py source_model.pretrained_model_name_or_path=FOLDER target_tokenizer_name=FOLDER output=FOLDER
"""

import sys

from tokenkit.cli_shared import run_script

KEYS = {
    "source_model.pretrained_model_name_or_path": "model.source",
    "source_model.tokenizer_name": "model.tokenizer",
    "source_model.revision": "model.revision",
    "target_tokenizer_name": "target_tokenizer",
    "init": "transfer.initializer",
}


def main() -> None:
    from tokenkit.cli_transfer import transfer
    from tokenkit.verbs.guide import MODEL, renamed

    transfer(renamed(sys.argv[1:], KEYS, MODEL))


if __name__ == "__main__":
    run_script("zett", main)
