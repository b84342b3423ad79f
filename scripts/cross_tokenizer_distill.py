r"""Moves a model to another tokenizer under a teacher: the guide's name of `tokenkit distill`, whose keys it takes too.

    python scripts/cross_tokenizer_distill.py \
        student.pretrained_model_name_or_path=FOLDER target_tokenizer_name=FOLDER \
        losses=[sft,alm_unconstrained] data.path=FILE.jsonl steps=1000 output=outputs/moved
    python scripts/cross_tokenizer_distill.py CONFIG.yaml steps=10
    python scripts/cross_tokenizer_distill.py --config CONFIG.yaml --overrides steps=10 dtype=float32

What is left out is as in the original; without a student the embedded model is moved, without data it is trained on the
sources of Python's standard library.
"""

from tokenkit.cli_guide import run_guide

if __name__ == "__main__":
    run_guide("cross_tokenizer_distill", __doc__)
