"""A model moved from an old vocabulary to a learned tokenizer: rows of ids that mean the same are copied."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from tokenkit.models.latents import LatentReport, Method, resize_and_init
from tokenkit.models.load import head_matrix, input_matrix, output_head
from tokenkit.tokenizers.autoencoder.learned import LearnedTokenizer


@dataclass(frozen=True)
class MigrationReport:
    """How many rows were copied, and how the others were made."""

    copied: int
    made: LatentReport


@torch.no_grad()
def migrate_model(
    model: PreTrainedModel,
    tokenizer: LearnedTokenizer,
    old_ids: Mapping[int, int],
    *,
    method: Method = "decoder",
    seed: int = 0,
) -> MigrationReport:
    """Gives the model, in place, a row per id of a compact tokenizer; `old_ids` are new id → old id.

    What has no old id begins with latents, in the scale of the old rows. Input and head are treated alike.
    """
    before = [matrix.detach().clone() for matrix in (input_matrix(model), head_matrix(model))]
    bias = output_head(model).bias
    old_bias = None if bias is None else bias.detach().clone()
    made = resize_and_init(model, tokenizer, method=method, seed=seed)
    device = before[0].device
    new, old = (torch.tensor(list(ids), device=device, dtype=torch.long) for ids in (old_ids, old_ids.values()))
    for matrix, rows in zip((input_matrix(model), head_matrix(model)), before):
        matrix[new] = rows[old]
    if old_bias is not None:
        output_head(model).bias[new] = old_bias[old]
    return MigrationReport(len(old_ids), made)
