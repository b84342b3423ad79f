"""A ternary folder, opened by stock transformers, must answer as the training forward does, with its fake quantisation.

Both round activations to 256 levels. Where an activation lies within the last digits of two levels' middle, the two
may round it differently, which moves the logits of that position and of later ones by far more than the last digits; in
a deep model that happens somewhere in most positions. So every layer is compared by itself, given what it read in the
training forward, to the last digits; and the logits of the whole model to what such roundings can do. A scale mistaken
for its reciprocal moves both by about their own size.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tokenkit.export.ternary_layout import Layout
from tokenkit.export.trits import unpack_trits
from tokenkit.export.verify import ExportError, compare_ids, logits_of
from tokenkit.models.load import quiet
from tokenkit.tokenizers.base import Tokenizer

CLOSE, CLOSE_SHARE = 1e-4, 0.75  # of a layer's largest output; of the positions
TYPICAL, FAR = 0.02, 0.2  # of the largest logit: at most positions, and at any
ROUNDED = 5  # times as much where the loader rounds scales


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
    for name, tensor in stored.items():
        if not torch.equal(tensor, layout.tensors[name].detach().cpu().to(tensor.dtype)):
            raise ExportError(f"{folder.name}: the tensor {name} is not the same after reloading")
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
    layout: Layout,
    tokenizer: Tokenizer,
    texts: list[str],
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Figures of the comparison in float32; ExportError where ids, layers or logits differ.

    Loaded in a `dtype` below float32, scales are rounded, and the comparison is as coarse.
    """
    rows = compare_ids(folder, tokenizer, texts)
    differences, largest = [], 0.0
    with torch.compiler.set_stance("force_eager"):
        stock = load_stock(folder, model, dtype)
        layers = _compare_layers(folder, model, stock, layout, rows[0], CLOSE if dtype == torch.float32 else TYPICAL)
        for row in rows:
            expected, found = logits_of(model, row), logits_of(stock, row)
            largest = max(largest, float(expected.abs().max()))
            differences.append((expected - found).abs().amax(-1).flatten().cpu())
    relative, times = torch.cat(differences) / max(largest, 1.0), 1 if dtype == torch.float32 else ROUNDED
    if not (relative.median() <= TYPICAL * times and relative.max() <= FAR * times):
        raise ExportError(
            f"{folder.name}: logits differ by up to {relative.max():.3g} of the largest after reloading, typically by "
            f"{relative.median():.3g}"
        )
    return {
        "tokens": len(relative),
        "layer_difference": layers,
        "logit_difference": float(relative.max()),
        "typical_difference": float(relative.median()),
        "close_positions": float((relative <= CLOSE).float().mean()),
    }


@torch.no_grad()
def _compare_layers(
    folder: Path, model: PreTrainedModel, stock: PreTrainedModel, layout: Layout, row: list[int], tolerance: float
) -> float:
    """The largest of the typical differences of a layer's outputs, relative to its largest output."""
    modules, worst = dict(stock.named_modules()), 0.0
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = inputs[0], output

        return hook

    handles = [layer.register_forward_hook(look(name)) for name, layer in layout.layers.items()]
    try:
        logits_of(model, row)
    finally:
        for handle in handles:
            handle.remove()
    for name, (read, expected) in seen.items():
        before = layout.norms.get(name)
        found = modules[name](read.float() if before is None else modules[before](read.float()))
        relative = (expected - found).abs().amax(-1) / expected.abs().max().clamp_min(1e-6)
        if not (relative <= tolerance).float().mean() >= CLOSE_SHARE:
            raise ExportError(
                f"{folder.name}: {name} gives other outputs after reloading, typically by {relative.median():.3g} of "
                "the largest"
            )
        worst = max(worst, float(relative.median()))
    return worst


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a folder."""
    return json.loads((folder / "config.json").read_text("utf-8"))
