"""A model with tables of codes: a stock folder over its pins and bytes, and beside it the tables and the tokenizer.

Stock transformers finds no config.json in the outer folder and says so; it would leave the codes out without a word.
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from tokenkit.export.huggingface import TEXTS, drafted, export_huggingface
from tokenkit.export.verify import TOLERANCES, ExportError
from tokenkit.models.factorised import Factorised
from tokenkit.models.factorised_view import (
    FACTORISED,
    TOKENIZER,
    attach_saved,
    factorised_of,
    view_of,
    without_factorised,
)
from tokenkit.models.load import BASE, load_model
from tokenkit.tokenizers.autoencoder.learned import LearnedTokenizer
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.load import load_tokenizer


def export_factorised(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, *, dtype: torch.dtype | None) -> Path:
    """The new folder, reloaded and compared before it takes its name."""
    factorised = factorised_of(model)
    assert factorised is not None
    assert isinstance(tokenizer, LearnedTokenizer)
    with drafted(folder) as draft:
        with without_factorised(model):
            export_huggingface(model, tokenizer.fixed, draft / BASE, dtype=dtype)
        factorised.save(draft / FACTORISED, dtype)
        tokenizer.save(draft / TOKENIZER)
        _verify(draft, model, tokenizer, dtype or model.dtype)
    return folder


@torch.no_grad()
def _verify(folder: Path, model: PreTrainedModel, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    reloaded = load_model(str(folder / BASE), dtype=dtype, device=str(model.device))
    attach_saved(reloaded, Factorised.load(folder / FACTORISED))
    again = load_tokenizer(str(folder / TOKENIZER))
    training = model.training
    model.eval()
    for text in TEXTS:
        ids = [tokenizer.start_id(), *tokenizer.encode(text).ids.tolist()]
        if ids[1:] != again.encode(text).ids.tolist():
            raise ExportError(f"{folder.name}: the ids of {text!r} differ after reloading")
        inputs, labels = (torch.tensor([part], device=model.device) for part in (ids[:-1], ids[1:]))
        expected, found = (
            view_of(one).leaves({"label_logp"}, inputs, labels)["label_logp"].float() for one in (model, reloaded)
        )
        if (expected - found).abs().max() > TOLERANCES[dtype] * expected.abs().max():
            raise ExportError(f"{folder.name}: log-probabilities differ after reloading")
    model.train(training)
