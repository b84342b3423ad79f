"""The `model:` and `teacher:` sections of a run file."""

from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from tokenkit.config import Config
from tokenkit.models.expand import load_expansion
from tokenkit.models.load import BASE, EXPANSION, load_model
from tokenkit.models.view import check_linear_head
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.spec import TokenizerSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelChoice(Config):
    """A causal language model and the tokenizer it was trained with."""

    source: str
    """A folder or a hub id."""
    tokenizer: TokenizerSpec | None = None
    """Where it is not beside the model, or is changed: `NAME` or `NAME:source=KIND:...`, or these keys."""
    revision: str | None = None
    trust_remote_code: bool = False
    """Run the model's own Python code. Only for a source that you trust."""


def load_pair(choice: ModelChoice, device: str) -> tuple[PreTrainedModel, Tokenizer]:
    """The model, in float32, and its tokenizer; UserError for a model that cannot be scored here."""
    expansion = Path(choice.source) / EXPANSION
    source = str(Path(choice.source) / BASE) if expansion.is_file() else choice.source
    spec = choice.tokenizer or TokenizerSpec(name=source)
    revision = choice.revision if spec.name == source else None  # another repository has other revisions
    tokenizer = load_tokenizer(spec, revision=revision)
    model = load_model(source, device=device, revision=choice.revision, trust_remote_code=choice.trust_remote_code)
    check_linear_head(model)
    if expansion.is_file():
        load_expansion(model, expansion)
    return model, tokenizer


ExportType = Literal["float32", "bfloat16", "float16"]
