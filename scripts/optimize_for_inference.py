r"""Writes a model in fewer bits, verified: the guide's name of `tokenkit export format=int8` and its like.

    python scripts/optimize_for_inference.py model_path=outputs/my_model output_path=outputs/optimized_model \
        quantization=int8 device=cuda

`quantization` is int8, int4, ternary, bfloat16, float16 or none.
"""

from tokenkit.cli_guide import run_guide

if __name__ == "__main__":
    run_guide("optimize_for_inference", __doc__)
