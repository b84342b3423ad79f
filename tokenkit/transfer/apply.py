"""A model moved to another tokenizer: new embedding rows, new output rows, new ids in its configuration."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.models.expand import expansion_of
from tokenkit.models.load import head_matrix, input_matrix, output_head, quiet, write_token_ids
from tokenkit.tokenizers.autoencoder.learned import LearnedTokenizer
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer import INITIALIZERS
from tokenkit.transfer.plan import Side, plan_transfer


@dataclass(frozen=True)
class TransferReport:
    """What a transfer did: counts per kind of row, rows before and after, and whether input and head are one matrix."""

    initializer: str
    source: str
    target: str
    source_rows: int
    rows: int
    tied: bool
    plan: dict[str, int | float]


def transfer_model(
    model: PreTrainedModel,
    source: Tokenizer,
    target: Tokenizer,
    *,
    initializer: str = "fvt",
    seed: int = 0,
    pad_to_multiple_of: int = 1,
    untie: bool = False,
) -> TransferReport:
    """Gives the model, in place, one row per id of the target tokenizer, rounded up to the multiple.

    A tied model stays tied and takes the input side of the plan; `untie` gives it an output matrix of its own.
    """
    if expansion_of(model) is not None:
        raise UserError("transfer: the model's inputs are expanded with an older tokenizer's tokens; take its base/")
    if isinstance(target, LearnedTokenizer) and target.codec.layout.num_codes:
        raise UserError(f"transfer: the codes of {target.name} have no rows; take the compact form of the tokenizer")
    if initializer not in INITIALIZERS:
        raise UserError(f"initializer: {initializer!r} is unknown; write one of {', '.join(INITIALIZERS)}")
    if pad_to_multiple_of < 1:
        raise UserError(f"pad_to_multiple_of: {pad_to_multiple_of}, where a whole number from 1 is needed")
    embedding, head = input_matrix(model), head_matrix(model)
    source_rows, bias, tied = len(embedding), output_head(model).bias, head is embedding
    plan = plan_transfer(source, target, source_rows=min(source_rows, len(head)))
    size = -(-target.vocab_size // pad_to_multiple_of) * pad_to_multiple_of

    def rows(old: Float[Tensor, "V D"], side: Side) -> Float[Tensor, "W D"]:
        return _padded(INITIALIZERS[initializer].fn(old, plan, side=side, seed=seed), old[: plan.source_vocab], size)

    new_input = rows(embedding.detach(), "input")
    new_head = None if tied and not untie else rows(head.detach(), "head")
    new_bias = None if bias is None else rows(bias.detach()[:, None], "head")[:, 0]
    if tied and untie:
        _untie(model)
    with torch.random.fork_rng([]), quiet(), torch.no_grad():
        model.resize_token_embeddings(size, mean_resizing=False)
        input_matrix(model).copy_(new_input)
        if new_head is not None:
            head_matrix(model).copy_(new_head)
        if new_bias is not None:
            output_head(model).bias.copy_(new_bias)
    write_token_ids(model, target)
    return TransferReport(initializer, source.name, target.name, source_rows, size, new_head is None, plan.describe())


def _padded(rows: Float[Tensor, "W D"], old: Float[Tensor, "V D"], size: int) -> Float[Tensor, "R D"]:
    """`rows` with mean source rows below them: a padding row then never has the largest logit of all."""
    mean = old.mean(0, dtype=torch.promote_types(old.dtype, torch.float32)).to(rows.dtype)
    return torch.cat([rows, mean.expand(size - len(rows), -1)])


def _untie(model: PreTrainedModel) -> None:
    head = output_head(model)
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
