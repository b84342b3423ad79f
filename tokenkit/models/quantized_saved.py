"""A folder of int8 or int4 matrices, loaded here, is an ordinary model again: matrices are codes times scales."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.models.ternary_saved import QUANTIZATION, forget_quantization

PACKAGES = {"torchao": "torchao", "compressed-tensors": "compressed_tensors"}  # quant_method: what loads it


def loading_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `from_pretrained` has to be told of a folder with this config.json; UserError without the package for it."""
    method = (config.get(QUANTIZATION) or {}).get("quant_method")
    if method not in PACKAGES:
        return {}
    try:
        __import__(PACKAGES[method])
    except ImportError:
        raise UserError(f"the model's matrices are quantised by {method}; pip install {method} to read it") from None
    if method == "torchao":
        return {}
    from transformers import CompressedTensorsConfig

    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}


@torch.no_grad()
def dequantise(model: PreTrainedModel) -> None:
    """Replaces what torchao or compressed-tensors made of matrices by plain ones, in place; others stay untouched."""
    settings = model.config.to_dict().get(QUANTIZATION) or {}
    if settings.get("quant_method") not in PACKAGES:
        return
    if settings["quant_method"] == "torchao":
        from torchao.utils import TorchAOBaseTensor

        for module in model.modules():
            if isinstance(module, nn.Linear) and isinstance(module.weight, TorchAOBaseTensor):
                module.weight = nn.Parameter(module.weight.dequantize())
    forget_quantization(model)
    vars(model).pop("_weight_conversions", None)  # else saving would undo what loading did
