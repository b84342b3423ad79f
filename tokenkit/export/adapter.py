"""What was trained beside a base model, as PEFT writes it: base and folder answer together as the model in memory."""

from pathlib import Path

from transformers import PreTrainedModel

from tokenkit.export.huggingface import TEXTS, drafted, write_tokenizer
from tokenkit.export.verify import TOLERANCES, ExportError, allowed, logits_of
from tokenkit.models.adapter import merge_adapter, read_adapter
from tokenkit.models.load import load_model
from tokenkit.models.lora_files import save_lora
from tokenkit.tokenizers.base import Tokenizer


def export_adapter(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    base: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tables: bool = False,
) -> dict[str, float | int]:
    """Writes the folder, with the tokenizer in it, and compares; the figures. ExportError leaves nothing behind.

    `base` is where the model comes from that the adapters belong to; with `tables` its embedding and output matrix are
    others by now, trained or not.
    """
    with drafted(folder) as draft:
        save_lora(model, draft, base=base, revision=revision, tables=tables)
        write_tokenizer(tokenizer, draft)
        adapter = read_adapter(draft)
        reloaded = load_model(
            base, device=str(model.device), revision=revision, trust_remote_code=trust_remote_code, dtype=model.dtype
        )
        merge_adapter(reloaded, adapter)
        rows = [[tokenizer.start_id(), *tokenizer.encode(text).ids.tolist()] for text in TEXTS]
        largest, difference = 0.0, 0.0
        for row in rows:
            expected, found = logits_of(model, row), logits_of(reloaded, row)
            largest = max(largest, float(expected.abs().max()))
            difference = max(difference, float((expected - found).abs().max()))
        tolerance = allowed(difference, TOLERANCES[model.dtype] * largest, model, rows)
        if not difference <= tolerance:
            raise ExportError(
                f"{folder.name}: logits differ by {difference:.3g} beside {base}, where {tolerance:.3g} is allowed"
            )
    return {"layers": len(adapter.updates), "whole_tensors": len(adapter.whole), "logit_difference": difference}
