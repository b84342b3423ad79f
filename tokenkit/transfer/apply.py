"""A model moved to another tokenizer: new embedding rows, new output rows, new ids in its configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.models.expand import expansion_of
from tokenkit.models.load import head_matrix, input_matrix, output_head, quiet, write_token_ids
from tokenkit.tokenizers.autoencoder.learned import LearnedTokenizer
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer.evidence import Evidence
from tokenkit.transfer.initialize import Choice, all_rows, origins
from tokenkit.transfer.mixture import pieces_mixture
from tokenkit.transfer.plan import Override, Side, TransferPlan, plan_transfer
from tokenkit.transfer.rows import Rows, TensorRows

FVT = Choice()


@dataclass(frozen=True)
class TransferReport:
    """What a transfer did: counts per kind of row, rows before and after, and whether input and head are one matrix."""

    initializer: str
    head_initializer: str | None
    source: str
    target: str
    source_rows: int
    rows: int
    tied: bool
    plan: dict[str, int | float]
    origins: dict[str, dict[str, int]]
    """Per side, how many rows were made in which way; see `Origin`."""


def transfer_model(
    model: PreTrainedModel,
    source: Tokenizer,
    target: Tokenizer,
    choice: Choice = FVT,
    *,
    evidence: Evidence | None = None,
    override: Override = MappingProxyType({}),
    kept: Mapping[int, int] | None = None,
    pad_to_multiple_of: int = 1,
    untie: bool = False,
) -> TransferReport:
    """Gives the model, in place, one row per id of the target tokenizer, rounded up to the multiple.

    A tied model stays tied and takes the input side of the plan; `untie` gives it an output matrix of its own.
    `override` and `kept` are those of `plan_transfer`.
    """
    if expansion_of(model) is not None:
        raise UserError("transfer: the model's inputs are expanded with an older tokenizer's tokens; take its base/")
    check_target(target, pad_to_multiple_of)
    embedding, head = input_matrix(model), head_matrix(model)
    source_rows, bias, tied = len(embedding), output_head(model).bias, head is embedding
    check_sides(choice, tied=tied and not untie)
    plan = plan_transfer(source, target, source_rows=min(source_rows, len(head)), override=override, kept=kept)
    size = padded_size(target.vocab_size, pad_to_multiple_of)
    matrices: dict[Side, Rows] = {"input": TensorRows(embedding.detach())}
    if not tied:
        matrices["head"] = TensorRows(head.detach())
    known = replace(evidence or Evidence(source, target, model=model), matrices=matrices)
    report: dict[str, dict[str, int]] = {}

    def rows(old: Tensor, side: Side) -> Float[Tensor, "W D"]:
        matrix = TensorRows(old.detach())
        maker = choice.maker(side, matrix, plan, known)
        report[side] = origins(maker)
        return all_rows(maker, matrix, plan, size)

    new_input = rows(embedding, "input")
    new_head = None if tied and not untie else rows(head, "head")
    new_bias = None if bias is None else _biases(TensorRows(bias.detach()[:, None]), plan, choice.seed, size)
    set_rows(model, new_input, new_head, new_bias)
    write_token_ids(model, target)
    names = choice.initializer, None if new_head is None else choice.of("head")
    pair, tied = (source.name, target.name), new_head is None
    return TransferReport(*names, *pair, source_rows, size, tied, plan.describe(), report)


def set_rows(
    model: PreTrainedModel,
    new_input: Float[Tensor, "R D"],
    new_head: Float[Tensor, "R D"] | None,
    new_bias: Float[Tensor, "R"] | None = None,
) -> None:
    """Gives a model these matrices; one that gets an output matrix has one from then on, tied before or not."""
    if new_head is not None and model.config.to_dict().get("tie_word_embeddings"):
        _untie(model)  # also where the files held two matrices all the same: resizing would make them one
    with torch.random.fork_rng([]), quiet(), torch.no_grad():
        model.resize_token_embeddings(len(new_input), mean_resizing=False)
        input_matrix(model).copy_(new_input)
        if new_head is not None:
            head_matrix(model).copy_(new_head)
        if new_bias is not None:
            output_head(model).bias.copy_(new_bias)


def check_sides(choice: Choice, *, tied: bool) -> None:
    """UserError where output rows are chosen for a model that has none of its own."""
    if tied and choice.head_initializer is not None:
        raise UserError(
            "transfer.head_initializer: the model has one matrix for input and output; write transfer.untie=true too"
        )


def check_target(target: Tokenizer, pad_to_multiple_of: int) -> None:
    """UserError where there can be no row per id."""
    if isinstance(target, LearnedTokenizer) and target.codec.layout.num_codes:
        raise UserError(f"transfer: the codes of {target.name} have no rows; take the compact form of the tokenizer")
    if pad_to_multiple_of < 1:
        raise UserError(f"pad_to_multiple_of: {pad_to_multiple_of}, where a whole number from 1 is needed")


def padded_size(vocab_size: int, multiple: int) -> int:
    """Rows of a vocabulary that is rounded up."""
    return -(-vocab_size // multiple) * multiple


def _biases(source: Rows, plan: TransferPlan, seed: int, size: int) -> Float[Tensor, "R"]:
    maker = pieces_mixture(source, plan, "head", seed=seed)
    return all_rows(maker, source, plan, size)[:, 0]


def _untie(model: PreTrainedModel) -> None:
    head = output_head(model)
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
