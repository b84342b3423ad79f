"""A saved ternary model, loaded by stock transformers, gets our layers back, so that it can be trained on."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.models.bitlinear import TernaryLinear

QUANTIZATION = "quantization_config"  # the key of config.json


def is_latent(config: Mapping[str, Any]) -> bool:
    """Whether a folder with this config.json holds ternary layers as they are trained; UserError for packed ones."""
    settings = config.get(QUANTIZATION) or {}
    if settings.get("quant_method") != "bitnet":
        return False
    if settings.get("quantization_mode") != "online" or settings.get("linear_class") != "autobitlinear":
        raise UserError(
            "a packed ternary model has nothing left to train; take the folder of `tokenkit export format=latent`, or "
            "unpack this one with `tokenkit export format=unpacked`"
        )
    return True


def reattach_ternary(model: PreTrainedModel, config: Mapping[str, Any]) -> list[str]:
    """Replaces the ternary layers that stock transformers made of a latent folder by ours; their names.

    `config` is the folder's config.json, parsed. Weights are taken over, not copied. None where it says nothing of
    ternary layers. The model's configuration then no longer speaks of quantisation, as that of any model in training.
    """
    if not is_latent(config):
        return []
    from transformers.integrations.bitnet import AutoBitLinear  # imports a compiler

    found = {name: module for name, module in model.named_modules() if isinstance(module, AutoBitLinear)}
    for name, module in found.items():
        assert isinstance(module.weight, nn.Parameter)
        norm = None
        if module.rms_norm is not None:
            norm = nn.RMSNorm(module.in_features, eps=module.rms_norm.variance_epsilon)
            norm.weight = module.rms_norm.weight
        model.set_submodule(name, TernaryLinear(module.weight, module.bias, norm=norm))
    forget_quantization(model)
    return list(found)


def forget_quantization(model: PreTrainedModel) -> None:
    """Takes out of a loaded model what marks it as quantised: it is saved as any other from then on."""
    if QUANTIZATION in model.config.to_dict():
        delattr(model.config, QUANTIZATION)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
