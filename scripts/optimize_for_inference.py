"""Writes a model in fewer bits, verified: the guide's name of `tokenkit export format=int8` and its like.

    python scripts/optimize_for_inference.py model_path=outputs/my_model output_path=outputs/optimized_model \
        quantization=int8 device=cuda

`quantization` is int8, int4, ternary, bfloat16, float16 or none.
"""

import sys

from tokenkit.cli_shared import run_script


def main() -> None:
    from tokenkit.cli import export
    from tokenkit.verbs.guide import MODEL, renamed

    words = sys.argv[1:]
    chosen = any(word.startswith(("quantization=", "format=")) for word in words)
    export(renamed(words if chosen else ["quantization=int8", *words], MODEL))


if __name__ == "__main__":
    run_script("optimize_for_inference", main)
