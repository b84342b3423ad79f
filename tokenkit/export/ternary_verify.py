"""A ternary folder, opened by stock transformers, must answer as the training forward does, with its fake quantisation.

Both round activations to 256 levels. Where an activation lies within the last digits of two levels' middle, the two
may round it differently, which moves the logits of that position and of later ones by far more than the last digits.
Such places are rare, so most positions must agree closely, and the others must not be far off: a scale mistaken for its
reciprocal moves all of them by about their own size.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tokenkit.export.ternary_layout import Layout
from tokenkit.export.trits import unpack_trits
from tokenkit.export.verify import ExportError, compare_ids, logits_of
from tokenkit.models.load import quiet
from tokenkit.tokenizers.base import Tokenizer

CLOSE, CLOSE_SHARE = 1e-4, 0.75  # of the largest logit; of the positions
FAR = 0.05  # of the largest logit, at any position
ROUNDED = (0.1, 0.3)  # both, where the loader rounds scales


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder's safetensors files, one at a time."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                yield name, file.get_tensor(name)


def verify_packed(folder: Path, layout: Layout, linear_class: str) -> dict[str, Any]:
    """What the files hold is the trits and scales of the layers, bit for bit; sizes in bytes."""
    stored = dict(stored_tensors(folder))
    payload = 0
    for name, layer in layout.layers.items():
        (trits, gamma), packed = layer.trits(), stored.pop(f"{name}.weight")
        scale = stored.pop(f"{name}.weight_scale")
        wanted = gamma.reciprocal() if linear_class == "bitlinear" else gamma
        if not torch.equal(unpack_trits(packed), trits.cpu()) or scale.item() != wanted.item():
            raise ExportError(f"{folder.name}: the trits of {name} are not the same after reloading")
        payload += packed.nbytes + scale.nbytes
    if stored.keys() != layout.tensors.keys():
        raise ExportError(f"{folder.name}: holds other tensors than were written")
    return {
        "model_type": layout.config.model_type,
        "linear_class": linear_class,
        "ternary_layers": len(layout.layers),
        "ternary_bytes": payload,
        "other_bytes": sum(tensor.nbytes for tensor in stored.values()),
    }


def load_stock(folder: Path, model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The folder's model by stock transformers, loaded in one number format and then brought into float32.

    Its ternary layers are compiled at their first call, which takes half a minute on a CPU and changes nothing: here
    they run as they are written (for a process of your own set TORCHDYNAMO_DISABLE=1).
    """
    with quiet():
        found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, attn_implementation=model.config._attn_implementation
        )
    return found.to(model.device).to(torch.float32).eval()


def verify_stock(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    texts: list[str],
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Figures of the comparison of logits in float32; ExportError where ids or logits differ.

    In a `dtype` below float32 the loader rounds the scales of the layers, and the comparison is as coarse.
    """
    tolerance, most = (CLOSE, FAR) if dtype == torch.float32 else ROUNDED
    rows = compare_ids(folder, tokenizer, texts)
    differences, largest = [], 0.0
    with torch.compiler.set_stance("force_eager"):
        stock = load_stock(folder, model, dtype)
        for row in rows:
            expected, found = logits_of(model, row), logits_of(stock, row)
            largest = max(largest, float(expected.abs().max()))
            differences.append((expected - found).abs().amax(-1).flatten().cpu())
    relative = torch.cat(differences) / max(largest, 1.0)
    close = float((relative <= tolerance).float().mean())
    if not (close >= CLOSE_SHARE and relative.max() <= most):
        raise ExportError(
            f"{folder.name}: logits differ by up to {relative.max():.3g} of the largest after reloading, and only "
            f"{close:.0%} of the positions agree to {tolerance:g}"
        )
    return {
        "tokens": len(relative),
        "logit_difference": float(relative.max()),
        "typical_difference": float(relative.median()),
        "close_positions": close,
    }


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a folder."""
    return json.loads((folder / "config.json").read_text("utf-8"))
