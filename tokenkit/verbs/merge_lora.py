"""`tokenkit merge-lora`: a base model and a folder of PEFT adapters in, an ordinary model folder out."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tokenkit.config import Config, UserError
from tokenkit.export.huggingface import SHARD_BYTES
from tokenkit.export.merged import export_merged
from tokenkit.export.verify import ExportError
from tokenkit.models.adapter import read_adapter
from tokenkit.tokenizers.spec import TokenizerSpec
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.model import DTYPES, ExportType, ModelChoice, load_pair, stored_format, tokenizer_beside


class MergeLoraRun(Config):
    """A run file of `tokenkit merge-lora`."""

    base_model: str
    """The folder or hub id of the model that the adapters were trained on."""
    lora_model: Path
    """The folder that PEFT's `save_pretrained` wrote."""
    output: Path
    """A new folder."""
    tokenizer: TokenizerSpec | None = None
    """By default the one beside the adapters, else the one beside the base."""
    revision: str | None = None
    """Of the base."""
    dtype: ExportType | None = None
    """Number format of the merged model; by default that of the base. The sum is taken in float32."""
    max_shard_bytes: int = Field(SHARD_BYTES, ge=1)
    """Weights are cut into files of at most this size, or one tensor."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def merge_lora(run: MergeLoraRun) -> dict[str, Any]:
    """Merges, verifies, writes; the figures of the comparison."""
    adapter = read_adapter(run.lora_model)
    tokenizer = run.tokenizer or tokenizer_beside(run.lora_model)
    choice = ModelChoice(source=run.base_model, tokenizer=tokenizer, revision=run.revision)
    base, loaded = load_pair(choice, pick_device(run.device))
    dtype = run.dtype or stored_format(choice)
    try:
        figures = export_merged(
            base, adapter, loaded, run.output, dtype=DTYPES[dtype], max_shard_bytes=run.max_shard_bytes
        )
    except ExportError as error:
        raise UserError(f"merge-lora: nothing was written: {error}") from None
    return {"output": str(run.output), "dtype": dtype, **figures}
