"""Writes a model for ONNX Runtime: the guide's name of `tokenkit export format=onnx`.

python scripts/export_to_onnx.py model_path=outputs/my_model output_path=outputs/my_model.onnx dynamic_axes=true
"""

import sys

from tokenkit.cli_shared import run_script


def main() -> None:
    from tokenkit.cli import export
    from tokenkit.verbs.guide import MODEL, renamed

    export(renamed(["format=onnx", *sys.argv[1:]], MODEL))


if __name__ == "__main__":
    run_script("export_to_onnx", main)
