"""An exported folder, opened with the consumer's own loaders, must answer as the model in memory does."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tokenkit.models.load import quiet
from tokenkit.models.lora import adapters
from tokenkit.tokenizers.base import Tokenizer

# Largest logit difference that counts as equal, relative to the largest logit: what rounding alone can do. Even equal
# weights give slightly different sums on a CPU, where kernels depend on the alignment of a memory-mapped file.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}

ROUNDINGS = 4  # times what float32 costs the model itself


class ExportError(RuntimeError):
    """What was written does not answer as the model in memory does."""


def verify_huggingface(
    folder: Path, model: PreTrainedModel, tokenizer: Tokenizer, texts: list[str]
) -> dict[str, float | int | str]:
    """Figures of the comparison; ExportError where ids differ, or logits beyond rounding.

    Where nothing was rounded (the same number format, no adapters merged) every tensor must be equal bit for bit.
    """
    rows = compare_ids(folder, tokenizer, texts)
    with quiet():
        reloaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, attn_implementation=model.config._attn_implementation
        )
    reloaded = reloaded.to(model.device).eval()
    unrounded = reloaded.dtype == model.dtype and not adapters(model)
    equal = _equal_tensors(model, reloaded, folder.name) if unrounded else 0
    largest, difference = 0.0, 0.0
    for row in rows:
        expected, found = logits_of(model, row), logits_of(reloaded, row)
        largest = max(largest, float(expected.abs().max()))
        difference = max(difference, float((expected - found).abs().max()))
    tolerance = allowed(difference, TOLERANCES[reloaded.dtype] * largest, model, rows)
    if not difference <= tolerance:
        raise ExportError(f"{folder.name}: logits differ by {difference:.3g} after reloading, {tolerance:.3g} allowed")
    return {
        "texts": len(texts),
        "tokens": sum(map(len, rows)),
        "dtype": str(reloaded.dtype).removeprefix("torch."),
        "equal_tensors": equal,
        "logit_difference": difference,
        "tolerance": tolerance,
    }


def allowed(difference: float, tolerance: float, model: PreTrainedModel, rows: Sequence[list[int]]) -> float:
    """The logit difference that rounding may make: the tolerance, or for a difference beyond it what is measured.

    Some models magnify the last digits at some positions (a norm of a state near 0). Of one in float32 it is measured
    how far its logits on these rows are from those in float64, and `ROUNDINGS` times that is allowed.
    """
    if difference <= tolerance or model.dtype != torch.float32:
        return tolerance
    exact = copy.deepcopy(model).double()
    own = max(float((logits_of(model, row) - logits_of(exact, row)).abs().max()) for row in rows)
    return max(tolerance, ROUNDINGS * own)


def _equal_tensors(model: PreTrainedModel, reloaded: PreTrainedModel, name: str) -> int:
    before, after = model.state_dict(), reloaded.state_dict()
    for key in sorted(before.keys() | after.keys()):
        if key not in before or key not in after or not torch.equal(before[key], after[key]):
            raise ExportError(f"{name}: the tensor {key} is not the same after reloading")
    return len(after)


def compare_ids(folder: Path, tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids that a stock tokenizer call feeds the model: our start id, then our ids."""
    with quiet():
        stock: Any = AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in texts:
        expected = [tokenizer.start_id(), *tokenizer.encode(text).ids.tolist()]
        found = stock(text)["input_ids"]
        if found[: len(expected)] != expected or stock(text, add_special_tokens=False)["input_ids"] != expected[1:]:
            raise ExportError(f"{folder.name}: {text!r} becomes {found} after reloading, where {expected} is expected")
        rows.append(expected)
    return rows


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: list[int]) -> Float[Tensor, "1 T V"]:
    """What the model answers to one row of ids, in evaluation mode."""
    training = model.training
    batch: Int[Tensor, "1 T"] = torch.tensor([ids], device=model.device)
    try:
        return model.eval()(batch, use_cache=False).logits.float()
    finally:
        model.train(training)
