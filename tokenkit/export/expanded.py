"""A byte-level model with input-id expansion: a stock folder without it, and beside it what is added to its inputs."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from tokenkit.export.factorised import export_factorised
from tokenkit.export.huggingface import TEXTS, drafted, export_huggingface
from tokenkit.export.verify import TOLERANCES, ExportError
from tokenkit.models.expand import expansion_of, load_expansion, save_expansion
from tokenkit.models.factorised_view import factorised_of
from tokenkit.models.load import BASE, EXPANSION, load_model
from tokenkit.tokenizers.base import Tokenizer


def export_model(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, *, dtype: torch.dtype | None) -> Path:
    """The new folder, verified: a stock one, or one with `base/` and what stands beside it, that only we load.

    Stock transformers finds no config.json in the latter and says so; it would leave the expansion out without a word.
    """
    if factorised_of(model) is not None:
        return export_factorised(model, tokenizer, folder, dtype=dtype)
    expansion = expansion_of(model)
    if expansion is None:
        return export_huggingface(model, tokenizer, folder, dtype=dtype)
    with drafted(folder) as draft:
        with expansion.off():
            export_huggingface(model, tokenizer, draft / BASE, dtype=dtype)
        save_expansion(expansion, draft / EXPANSION)
        _verify(draft, model, tokenizer, dtype or model.dtype)
    return folder


@torch.no_grad()
def _verify(folder: Path, model: PreTrainedModel, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    reloaded = load_model(str(folder / BASE), dtype=dtype, device=str(model.device))
    load_expansion(reloaded, folder / EXPANSION)
    training = model.training
    model.eval()
    for text in TEXTS:
        ids = torch.tensor([tokenizer.encode(text).ids.tolist()], device=model.device)
        expected, found = model(input_ids=ids).logits.float(), reloaded(input_ids=ids).logits.float()
        if (expected - found).abs().max() > TOLERANCES[dtype] * expected.abs().max():
            raise ExportError(f"{folder.name}: logits differ after reloading")
    model.train(training)
