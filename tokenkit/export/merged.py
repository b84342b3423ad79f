"""Adapters of PEFT put into their base: an ordinary folder, which answers as base and adapters did side by side."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tokenkit.export.huggingface import SHARD_BYTES, TEXTS, export_huggingface, refuse_existing
from tokenkit.export.verify import ExportError, allowed, logits_of
from tokenkit.models.adapter import Adapter, adapted_copy, merge_adapter
from tokenkit.tokenizers.base import Tokenizer

TOLERANCE = 1e-5  # of the largest logit, or of 1


def export_merged(
    base: PreTrainedModel,
    adapter: Adapter,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Writes the folder, reloaded and compared; the figures. `base`, in float32, stays as it is."""
    refuse_existing(folder)
    merged = copy.deepcopy(base)
    merge_adapter(merged, adapter)
    largest, difference = 1.0, 0.0
    reference = adapted_copy(base, adapter)
    rows = [[tokenizer.start_id(), *tokenizer.encode(text).ids.tolist()] for text in TEXTS]
    for ids in rows:
        expected, found = logits_of(reference, ids), logits_of(merged, ids)
        largest = max(largest, float(expected.abs().max()))
        difference = max(difference, float((expected - found).abs().max()))
    tolerance = allowed(difference, TOLERANCE * largest, merged, rows)
    if not difference <= tolerance:
        raise ExportError(f"{folder.name}: merged logits differ by {difference:.3g} from those of base and adapter")
    export_huggingface(merged, tokenizer, folder, dtype=dtype, max_shard_bytes=max_shard_bytes)
    return {
        "merged_layers": len(adapter.updates),
        "whole_tensors": len(adapter.whole),
        "rows": merged.config.get_text_config().vocab_size,
        "logit_difference": difference,
        "tolerance": tolerance,
    }
