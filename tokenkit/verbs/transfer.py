"""`tokenkit transfer`: a model and another tokenizer in, a working model folder out, without training."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tokenkit.config import Config
from tokenkit.export.huggingface import export_huggingface
from tokenkit.tokenizers.base import require_lossless
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.spec import TokenizerSpec
from tokenkit.transfer.apply import transfer_model
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.model import DTYPES, ExportType, ModelChoice, load_pair


class TransferOptions(Config):
    """How the rows of a new vocabulary are made."""

    initializer: str = "fvt"
    seed: int = 0
    pad_to_multiple_of: int = Field(1, ge=1)
    """Round the number of rows up; the added rows stand for no token."""
    untie: bool = False
    """Give the output head a matrix of its own where it shares the input embedding's."""


class TransferRun(Config):
    """A run file of `tokenkit transfer`."""

    output: Path
    model: ModelChoice
    target_tokenizer: TokenizerSpec
    """`NAME` or `NAME:target=KIND:conversion=...`, or these keys."""
    transfer: TransferOptions = TransferOptions()
    export_dtype: ExportType = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"


def transfer(run: TransferRun) -> dict[str, Any]:
    """Writes the transferred model to `output`; what was copied, averaged and guessed."""
    target = load_tokenizer(run.target_tokenizer)
    require_lossless(target, "the target of a transfer")
    model, source = load_pair(run.model, pick_device(run.device))
    require_lossless(source, "the source of a transfer")
    report = transfer_model(model, source, target, **run.transfer.model_dump())
    export_huggingface(model, target, run.output, dtype=DTYPES[run.export_dtype])
    return asdict(report)
