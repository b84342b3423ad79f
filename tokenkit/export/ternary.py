"""A ternary model as a folder that stock transformers loads: four trits a byte, or the latent matrices to train on.

The packed layout is that of transformers' "bitnet" quantizer: `weight` holds the trits, `weight_scale` the reciprocal
of their scale for `bitlinear` layers (the loader divides by it) and the scale itself for `autobitlinear` ones. The
latent folder has the matrices as they are trained, which transformers' `autobitlinear` layers round at every call.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.export.huggingface import SHARD_BYTES, TEXTS, drafted, write_settings, write_tokenizer
from tokenkit.export.ternary_layout import Layout, quantization_config, stock_layout
from tokenkit.export.ternary_verify import verify_packed, verify_stock
from tokenkit.export.trits import pack_trits
from tokenkit.models.bitlinear import ternary_layers
from tokenkit.models.load import input_matrix
from tokenkit.tokenizers.base import Tokenizer

LinearClass = Literal["bitlinear", "autobitlinear"]


def export_ternary(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    linear_class: LinearClass = "bitlinear",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Writes the packed folder, loads it with stock transformers, compares; the figures. `model` stays as it is.

    `dtype` is that of embeddings, head, norms and biases, bfloat16 where it is not given; scales are kept in float32. A
    model with SubLN before o_proj and down_proj becomes one of transformers' "bitnet" class. Of `autobitlinear` folders
    transformers loads embeddings and norms in the format they are stored in, whatever is asked for, and rounds scales
    to it: for these the default is float32.
    """
    dtype = dtype or (torch.bfloat16 if linear_class == "bitlinear" else torch.float32)
    layout = _checked_layout(model, tokenizer)
    packed: dict[str, Tensor] = {}
    for name, layer in layout.layers.items():
        if layer.bias is not None and linear_class == "autobitlinear":
            raise UserError(
                f"{name}: has a bias, which transformers' offline autobitlinear layer would multiply by the scale as "
                "well; write linear_class=bitlinear"
            )
        trits, gamma = layer.trits()
        packed[f"{name}.weight"] = pack_trits(trits, name)
        packed[f"{name}.weight_scale"] = (gamma.reciprocal() if linear_class == "bitlinear" else gamma).reshape(1)
    with drafted(folder) as draft, _rounded(layout, dtype) as tensors:
        layout.config.quantization_config = quantization_config(layout, linear_class, "offline")
        _write(model, layout, tokenizer, draft, packed | tensors, dtype, max_shard_bytes)
        figures = verify_packed(draft, layout, linear_class)
        loaded_in = torch.float32 if linear_class == "bitlinear" else dtype
        figures |= verify_stock(draft, model, layout, tokenizer, TEXTS, loaded_in)
    return figures


def export_latent(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Writes the matrices as they are trained, with a configuration under which transformers goes on training them so.

    In any other number format than that of the model some trits flip, so float32 is the format to keep.
    """
    layout = _checked_layout(model, tokenizer)
    for name, layer in layout.layers.items():
        if layer.scale != "mean":
            raise UserError(
                f"{name}: its scale is the {layer.scale} of its weights; transformers' online layers take the mean; "
                "export format=ternary, or train with ternary.scale=mean"
            )
    latent = {f"{name}.weight": layer.weight.detach().to(dtype) for name, layer in layout.layers.items()}
    with drafted(folder) as draft, _rounded(layout, dtype) as tensors:
        layout.config.quantization_config = quantization_config(layout, "autobitlinear", "online")
        _write(model, layout, tokenizer, draft, latent | tensors, dtype, max_shard_bytes)
        figures = {"ternary_layers": len(latent), "linear_class": "autobitlinear", "mode": "online"}
        if dtype == model.dtype:
            figures |= verify_stock(draft, model, layout, tokenizer, TEXTS)
    return figures


def _checked_layout(model: PreTrainedModel, tokenizer: Tokenizer) -> Layout:
    if not ternary_layers(model):
        raise UserError(
            "export: no layer of this model was trained ternary, and rounding its weights now leaves little of it; "
            "distil with a `ternary:` section first, or write force_ptq=true"
        )
    for name, layer in ternary_layers(model).items():
        if layer.activation_bits != 8:
            raise UserError(
                f"{name}: trained without 8-bit activations, which transformers' layer always has; train with "
                "ternary.activation_bits=8, or export format=gguf type=f16"
            )
    rows = len(input_matrix(model))
    if rows < tokenizer.vocab_size:
        raise UserError(f"export: {rows} embedding rows for {tokenizer.vocab_size} token ids; transfer the model first")
    return stock_layout(model)


@contextmanager
def _rounded(layout: Layout, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """The tensors in the format they are written in; inside the block the model itself computes with these values.

    So what is compared is the layout, to the last digits, and not the rounding of embeddings.
    """
    written = {name: tensor.to(dtype, copy=True).contiguous() for name, tensor in layout.tensors.items()}
    kept = {name: tensor.clone() for name, tensor in layout.tensors.items() if tensor.dtype != dtype}
    with torch.no_grad():
        for name in kept:
            layout.tensors[name].copy_(written[name])
        try:
            yield written
        finally:
            for name, tensor in kept.items():
                layout.tensors[name].copy_(tensor)


def _write(
    model: PreTrainedModel,
    layout: Layout,
    tokenizer: Tokenizer,
    draft: Path,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    layout.config.dtype = dtype
    layout.config.architectures = [layout.stock.__name__]
    write_settings(model, layout.config, tokenizer, draft)
    write_tokenizer(tokenizer, draft)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_torch_state_dict(whole, draft, max_shard_size=max_shard_bytes, metadata={"format": "pt"})
