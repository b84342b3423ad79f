"""The `model:` and `teacher:` sections of a run file."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import field_validator
from transformers import PreTrainedConfig, PreTrainedModel

from tokenkit.config import Config, UserError
from tokenkit.models.adapter import merge_adapter, read_adapter
from tokenkit.models.expand import load_expansion
from tokenkit.models.factorised import Factorised
from tokenkit.models.factorised_view import FACTORISED, TOKENIZER, attach_saved
from tokenkit.models.load import BASE, EXPANSION, load_model
from tokenkit.models.quantize import quantize_linears
from tokenkit.models.ternary_saved import QUANTIZATION, reattach_ternary
from tokenkit.models.view import check_linear_head
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.spec import TokenizerSpec
from tokenkit.transfer.delta import apply_delta, open_delta
from tokenkit.transfer.shards import local_folder, open_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelChoice(Config):
    """A causal language model and the tokenizer it was trained with."""

    source: str
    """A folder or a hub id. Of a run folder, what it wrote: its `model/`."""
    tokenizer: TokenizerSpec | None = None
    """Where it is not beside the model, or is changed: `NAME` or `NAME:source=KIND:...`, or these keys."""
    revision: str | None = None
    trust_remote_code: bool = False
    """Run the model's own Python code. Only for a source that you trust."""
    adapter: Path | None = None
    """A folder of PEFT's LoRA adapters, which are merged into the model as it is loaded."""
    quantize: Literal["int8", "int4"] | None = None
    """Of a teacher: its linear layers in 8 or 4 bits, as it is loaded."""
    delta: Path | None = None
    """A folder of `tokenkit transfer delta=true`: the rows and the tokenizer that the model gets as it is loaded."""

    @field_validator("source")
    @classmethod
    def _written(cls, source: str) -> str:
        folder = Path(source)
        run = (folder / "run.yaml").is_file() and (folder / "model").is_dir() and not (folder / "config.json").exists()
        return str(folder / "model") if run else source


def load_pair(
    choice: ModelChoice,
    device: str,
    *,
    codes: bool = False,
    teacher: bool = False,
    tokenizer: Tokenizer | None = None,
) -> tuple[PreTrainedModel, Tokenizer]:
    """The model, in float32, and its tokenizer; UserError for a model that cannot be scored here.

    `codes`: the caller only reads, so it can do with tables for the codes of an open tokenizer, and packed matrices.
    `teacher`: it is read as a teacher, which may have its linear layers in fewer bits. `tokenizer` is that of
    `tokenizer_of`, where the caller has it already.
    """
    if choice.quantize is not None and not (teacher or codes):
        refuse_quantized(choice)
    folder = Path(choice.source)
    expansion, factorised = folder / EXPANSION, folder / FACTORISED
    if factorised.is_file() and not codes:
        raise UserError(
            f"{choice.source}: its tokenizer has open codes, which eval and generate alone can read; take one of the "
            "compact form"
        )
    source = _base(choice)
    adapter = None if choice.adapter is None else read_adapter(choice.adapter)
    tokenizer = tokenizer or tokenizer_of(choice)
    model = load_model(source, device=device, revision=choice.revision, trust_remote_code=choice.trust_remote_code)
    if not codes or model.config.to_dict().get(QUANTIZATION, {}).get("quantization_mode") == "online":
        reattach_ternary(model, model.config.to_dict())  # a packed one can be read, and not trained
    if choice.delta is not None:
        base = open_checkpoint(local_folder(source, choice.revision))
        apply_delta(model, open_delta(choice.delta), base, tokenizer)
    if adapter is not None:
        merge_adapter(model, adapter)
    check_linear_head(model)
    if expansion.is_file():
        load_expansion(model, expansion)
    if factorised.is_file():
        attach_saved(model, Factorised.load(factorised))
    if choice.quantize is not None:
        quantize_linears(model, choice.quantize)
    return model, tokenizer


def tokenizer_of(choice: ModelChoice) -> Tokenizer:
    """The tokenizer that a model is read with; no weights are."""
    source, folder = _base(choice), Path(choice.source)
    beside = str(folder / TOKENIZER) if (folder / FACTORISED).is_file() else source
    trained_with = None if choice.adapter is None else tokenizer_beside(choice.adapter)
    of_delta = None if choice.delta is None else TokenizerSpec(name=str(choice.delta))
    spec = of_delta or choice.tokenizer or trained_with or TokenizerSpec(name=beside)
    revision = choice.revision if spec.name == source else None  # another repository has other revisions
    return load_tokenizer(spec, revision=revision)


def _base(choice: ModelChoice) -> str:
    """Where the weights are: of a model with tables beside it, a folder in its folder."""
    folder = Path(choice.source)
    beside = (folder / EXPANSION).is_file() or (folder / FACTORISED).is_file()
    return str(folder / BASE) if beside else choice.source


def whole_only(choice: ModelChoice) -> str | None:
    """Why a model has to be in memory to be given other rows; None where its weights can go from file to file."""
    folder = Path(choice.source)
    reasons = {
        "model.adapter": choice.adapter is not None,
        "model.delta": choice.delta is not None,
        "model.trust_remote_code": choice.trust_remote_code,
        "an expanded model": (folder / EXPANSION).is_file(),
        "a factorised model": (folder / FACTORISED).is_file(),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def refuse_quantized(choice: ModelChoice) -> None:
    """UserError where a model that is changed or trained is to be loaded in fewer bits."""
    if choice.quantize is not None:
        raise UserError(
            f"model.quantize: {choice.quantize}, but this model is not only read; leave it out, and write "
            f"teacher.quantize={choice.quantize} for a teacher"
        )


def stored_format(choice: ModelChoice) -> str:
    """The number format that a model's configuration names, as a key of `DTYPES`; float32 where it names no other."""
    config, _ = PreTrainedConfig.get_config_dict(choice.source, revision=choice.revision)
    named = str(config.get("dtype") or config.get("torch_dtype"))
    return named if named in DTYPES else "float32"


def tokenizer_beside(adapter: Path) -> TokenizerSpec | None:
    """The tokenizer that was saved with an adapter, if one was."""
    return TokenizerSpec(name=str(adapter)) if (adapter / "tokenizer.json").is_file() else None


ExportType = Literal["float32", "bfloat16", "float16"]
