"""Writes a model for ONNX Runtime: the guide's name of `tokenkit export format=onnx`.

python scripts/export_to_onnx.py model_path=outputs/my_model output_path=outputs/my_model.onnx dynamic_axes=true
"""

from tokenkit.cli_guide import run_guide

if __name__ == "__main__":
    run_guide("export_to_onnx", __doc__)
