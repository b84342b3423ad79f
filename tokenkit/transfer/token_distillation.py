"""Rows that make a model think what it thought of the pieces. Token Distillation: Dobler+ 2025, ICLR 2026, 2505.20133.

The model is frozen. It reads a text as its own tokenizer cuts it, and as the new one does; the new input rows are
learnt such that its hidden states agree wherever both have just read the same bytes. The paper adds a few tokens to a
vocabulary and puts one of them at a time into a text. Here a vocabulary is replaced, so all tokens of a text are new.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from numpy import ndarray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.models.load import head_matrix, input_matrix, logit_settings, output_head
from tokenkit.models.view import ModelView
from tokenkit.scores import LogitForm
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer import initializer
from tokenkit.transfer.evidence import Texts
from tokenkit.transfer.mixture import Mixture, Origin, pieces_mixture
from tokenkit.transfer.options import check_positive
from tokenkit.transfer.plan import Side, TransferPlan
from tokenkit.transfer.rows import Known, Rows, TensorRows
from tokenkit.transfer.snippets import Snippet, chosen_snippets

NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class LearntRows:
    """Rows that were learnt, and the chain's for every other id."""

    chain: Mixture
    ids: Int64[ndarray, "L"]
    """Ascending target ids."""
    rows: Float[Tensor, "L D"]

    @property
    def origin(self) -> UInt8[ndarray, "W"]:
        """The `Origin` of each row."""
        found = self.chain.origin.copy()
        found[self.ids] = Origin.INITIALIZER
        return found

    def __len__(self) -> int:
        return len(self.chain)

    def __call__(self, wanted: Int64[ndarray, "N"]) -> Float[Tensor, "N D"]:
        """The rows of these target ids, in at least float32."""
        rows = self.chain(wanted)
        place = np.searchsorted(self.ids, wanted)
        learnt = np.flatnonzero(np.append(self.ids, -1)[place] == wanted)
        rows[torch.from_numpy(learnt).to(rows.device)] = self.rows[torch.from_numpy(place[learnt])].to(rows)
        return rows


@dataclass(frozen=True)
class Training:
    """How rows are learnt."""

    passes: int
    max_steps: int
    batch_size: int
    learning_rate: float
    layer: int
    seed: int

    @property
    def counts(self) -> dict[str, int | float]:
        """The options that must be positive."""
        names = ("passes", "max_steps", "batch_size", "learning_rate")
        return {name: self.__dict__[name] for name in names}

    def batches(self, snippets: Sequence[Snippet]) -> Iterator[tuple[float, list[Snippet]]]:
        """Snippets of each step, and the share of the learning rate, which falls to 0 along a line."""
        per_pass = -(-len(snippets) // self.batch_size)
        steps = min(self.max_steps, self.passes * per_pass)
        generator = np.random.default_rng(self.seed)
        orders = [generator.permutation(len(snippets)) for _ in range(self.passes)]
        for step in range(steps):
            order, begin = orders[step // per_pass], step % per_pass * self.batch_size
            yield 1 - step / steps, [snippets[i] for i in order[begin : begin + self.batch_size]]


@initializer(copies=True)
def token_distillation(
    source: Rows,
    plan: TransferPlan,
    model: PreTrainedModel,
    texts: Texts,
    source_tokenizer: Tokenizer,
    target_tokenizer: Tokenizer,
    *,
    side: Side,
    seed: int = 0,
    head: Literal["cross_entropy", "fvt"] = "cross_entropy",
    layer: int = -1,
    snippet_characters: int = 256,
    snippets_per_token: int = 50,
    passes: int = 2,
    max_steps: int = 2000,
    batch_size: int = 16,
    learning_rate: float = 0.1,
) -> Mixture | LearntRows:
    """`fvt`, and then rows of tokens in the texts are learnt: the model's hidden states are to be those of its pieces.

    `layer` counts from 1, or from -1, the last one's output as the head reads it. `learning_rate` is in units of the
    spread of the source rows. Output rows predict the next token after the model's own states, or stay those of `fvt`;
    where input and head are one matrix, `head: cross_entropy` learns its rows for both uses.
    """
    how = Training(passes, max_steps, batch_size, learning_rate, layer, seed)
    check_positive(
        "token_distillation", snippet_characters=snippet_characters, snippets_per_token=snippets_per_token, **how.counts
    )
    _check_layer(model, layer)
    chain = pieces_mixture(source, plan, side, seed=seed)
    if side == "head" and head == "fvt":
        return chain
    mined = {"snippet_characters": snippet_characters, "per_token": snippets_per_token, "seed": seed}

    def mine() -> list[Snippet]:
        return chosen_snippets(texts, source_tokenizer, target_tokenizer, plan.free, **mined)

    def learn() -> Mixture | LearntRows:
        snippets = texts.once(("snippets", plan, *mined.values()), mine)
        tied = head_matrix(model) is input_matrix(model)
        with frozen(model), torch.enable_grad():
            outputs = side == "head" or (tied and head == "cross_entropy")
            return learn_rows(model, chain, plan, snippets, how, inputs=side == "input", outputs=outputs)

    return texts.once(("token_distillation", plan, side, head, *mined.values(), how), learn)


def learn_rows(
    model: PreTrainedModel,
    chain: Mixture,
    plan: TransferPlan,
    snippets: Sequence[Snippet],
    how: Training,
    *,
    inputs: bool,
    outputs: bool,
) -> Mixture | LearntRows:
    """Rows of the free ids in the snippets, which start as the chain's, for their use as inputs, outputs or both."""
    seen = [one.target_ids if inputs else _following(one)[1] for one in snippets]
    ids = np.intersect1d(np.concatenate([NONE, *seen]), plan.free)
    if len(ids) == 0:
        return chain
    device = input_matrix(model).device
    learnt = nn.Parameter(chain(ids).to(device, torch.float32))
    optimizer, unit = torch.optim.Adagrad([learnt]), how.learning_rate * _spread(chain)
    losses: list[StatesAgree | NextToken] = [StatesAgree(model, chain, ids, how.layer)] if inputs else []
    if outputs:
        losses.append(NextToken(model, chain, ids))
    for share, batch in how.batches(snippets):
        optimizer.param_groups[0]["lr"] = unit * share
        optimizer.zero_grad()
        torch.stack([loss(batch, learnt) for loss in losses]).sum().backward()
        optimizer.step()
    return LearntRows(chain, ids, learnt.detach())


class StatesAgree:
    """How far the hidden states after the new tokens are from those after the model's own, as a share of these."""

    def __init__(self, model: PreTrainedModel, chain: Mixture, ids: Int64[ndarray, "L"], layer: int) -> None:
        self.model, self.chain, self.ids, self.layer = model, chain, ids, layer

    def __call__(self, batch: Sequence[Snippet], learnt: Float[Tensor, "L D"]) -> Float[Tensor, ""]:
        """The mean square of the differences over that of the states, at common ends from the first learnt token on."""
        first = [np.searchsorted(one.target_ends, np.argmax(np.isin(one.target_ids, self.ids))) for one in batch]
        with torch.no_grad():
            ends = [one.source_ends[k:] for one, k in zip(batch, first, strict=True)]
            wanted = _states(ModelView(self.model), [one.source_ids for one in batch], ends, self.layer).float()
        table, inputs = self._table(batch, learnt)
        ends = [one.target_ends[k:] for one, k in zip(batch, first, strict=True)]
        found = _states(ModelView(self.model, tables={"input": table}), inputs, ends, self.layer).float()
        return (found - wanted).square().mean() / wanted.square().mean()

    def _table(self, batch: Sequence[Snippet], learnt: Tensor) -> tuple[Tensor, list[ndarray]]:
        """The rows of the ids of a batch, and the batch with ids that count them."""
        distinct, places = np.unique(np.concatenate([one.target_ids for one in batch]), return_inverse=True)
        new = np.isin(distinct, self.ids)
        rows = self.chain(distinct).to(learnt.device, torch.float32)
        where = torch.from_numpy(np.flatnonzero(new)).to(learnt.device)
        which = torch.from_numpy(np.searchsorted(self.ids, distinct[new])).to(learnt.device)
        table = rows.index_copy(0, where, learnt[which]).to(input_matrix(self.model).dtype)
        return table, np.split(places, np.cumsum([len(one.target_ids) for one in batch])[:-1])


class NextToken:
    """The cross entropy of the target token that begins where the model has read its own tokens to."""

    def __init__(self, model: PreTrainedModel, chain: Mixture, ids: Int64[ndarray, "L"]) -> None:
        every, device = np.arange(len(chain)), head_matrix(model).device
        bias = output_head(model).bias
        if bias is not None:
            bias = chain.over(Known(TensorRows(bias.detach()[:, None]), chain.known.size))(every)[:, 0]
        self.form = LogitForm(bias, **logit_settings(model))
        self.model, self.fixed = model, chain(every).to(device, torch.float32)
        self.places = torch.from_numpy(ids).to(device)

    def __call__(self, batch: Sequence[Snippet], learnt: Float[Tensor, "L D"]) -> Float[Tensor, ""]:
        """Nats per token that begins at a common end; 0 where none does."""
        ends, labels = zip(*(_following(one) for one in batch), strict=True)
        with torch.no_grad():
            states = _states(ModelView(self.model), [one.source_ids for one in batch], ends, -1).float()
            logits = states @ self.fixed.T
        logits = self.form(logits.index_copy(1, self.places, states @ learnt.T))
        wanted = torch.from_numpy(np.concatenate(labels)).to(logits.device)
        return cross_entropy(logits, wanted, reduction="sum") / max(1, len(wanted))


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode and without gradients of its own; afterwards as it was.

    Meanwhile no row is that of padding: rows are numbered anew, and the one of that number would not learn.
    """
    training = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    padding = embedding.padding_idx
    try:
        model.eval().requires_grad_(False)
        embedding.padding_idx = None
        yield
    finally:
        embedding.padding_idx = padding
        for module, flag in training:
            module.training = flag
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _states(
    view: ModelView, ids: Sequence[Int64[ndarray, "_"]], ends: Sequence[Int64[ndarray, "_"]], layer: int
) -> Float[Tensor, "N D"]:
    """A layer's hidden states at places of rows of ids, one row after the other."""
    device = view.model.device
    inputs = pad_sequence([torch.from_numpy(one) for one in ids], batch_first=True).to(device)
    states = view.hidden(inputs) if layer == -1 else view.leaves({"layers"}, inputs, inputs)["layers"][:, :, layer]
    rows = np.repeat(np.arange(len(ends)), [len(one) for one in ends])
    return states[torch.from_numpy(rows).to(device), torch.from_numpy(np.concatenate(ends)).to(device)]


def _following(one: Snippet) -> tuple[Int64[ndarray, "L"], Int64[ndarray, "L"]]:
    """The common ends of the source after which there is more text, and the target token that begins there."""
    more = one.target_ends + 1 < len(one.target_ids)
    return one.source_ends[more], one.target_ids[one.target_ends[more] + 1]


def _spread(chain: Mixture) -> float:
    """The root mean square of the dimensions' deviations over the source rows."""
    return float(chain.known.deviation.square().mean().sqrt())


def _check_layer(model: PreTrainedModel, layer: int) -> None:
    layers = model.config.get_text_config().num_hidden_layers
    if not 1 <= abs(layer) <= layers:
        raise UserError(
            f"transfer.token_distillation.layer: {layer}, where the model has {layers}; "
            f"write one from 1 to {layers}, or from -{layers} to -1"
        )
