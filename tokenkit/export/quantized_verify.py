"""A quantised folder, loaded by stock transformers, must answer as the rounded model and nearly as the original."""

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from tokenkit.export.huggingface import TEXTS
from tokenkit.export.quality import answers_kept
from tokenkit.export.verify import TOLERANCES, ExportError, compare_ids, logits_of
from tokenkit.models.load import quiet
from tokenkit.tokenizers.base import Tokenizer


def verify_quantized(
    folder: Path,
    model: PreTrainedModel,
    rounded: PreTrainedModel,
    tokenizer: Tokenizer,
    documents: list[str],
) -> dict[str, Any]:
    """Figures of the comparison of the reloaded folder with `rounded` (logits) and with `model` (what was lost).

    ExportError where ids differ, or logits beyond rounding.
    """
    rows = compare_ids(folder, tokenizer, TEXTS)
    reloaded = load_stock(folder, str(model.device))
    largest, difference = 0.0, 0.0
    for row in rows:
        expected, found = logits_of(rounded, row), logits_of(reloaded, row)
        largest = max(largest, float(expected.abs().max()))
        difference = max(difference, float((expected - found).abs().max()))
    tolerance = TOLERANCES[rounded.dtype] * largest
    if not difference <= tolerance:
        raise ExportError(f"{folder.name}: logits differ by {difference:.3g} after reloading, {tolerance:.3g} allowed")
    kept = answers_kept(model, reloaded, tokenizer, documents)
    return {"logit_difference": difference, "tolerance": tolerance, **kept}


def load_stock(folder: Path, device: str) -> PreTrainedModel:
    """The folder as transformers loads it for anybody; ExportError where tensors are missing or left over."""
    with quiet(), redirect_stderr(StringIO()):  # compressed-tensors draws bars that nothing turns off
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, output_loading_info=True
        )
        model = model.to(device).eval()
        logits_of(model, [0])  # here, as it unpacks at the first call
    wrong = sorted(loading["missing_keys"]) + sorted(loading["unexpected_keys"])
    if wrong:
        raise ExportError(f"{folder.name}: the reloaded model lacks tensors, or has others: {wrong[0]}")
    return model
