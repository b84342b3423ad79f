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
    head: Literal["fvt", "cross_entropy"] = "fvt",
    layer: int = -1,
    snippet_bytes: int = 256,
    snippets_per_token: int = 50,
    passes: int = 2,
    max_steps: int = 2000,
    batch_size: int = 16,
    learning_rate: float = 0.3,
) -> Mixture | LearntRows:
    """`fvt`, and then rows of tokens in the texts are learnt: the model's hidden states are to be those of its pieces.

    `layer` counts from 1, or from -1, the last one's output as the head reads it. `learning_rate` is in units of the
    spread of the source rows. Output rows stay those of `fvt`, or predict the next token after the model's own states.
    """
    how = Training(passes, max_steps, batch_size, learning_rate, layer, seed)
    _check(how, snippet_bytes, snippets_per_token, model)
    chain = pieces_mixture(source, plan, side, seed=seed)
    if side == "head" and head == "fvt":
        return chain
    mined = {"snippet_bytes": snippet_bytes, "per_token": snippets_per_token, "seed": seed}

    def mine() -> list[Snippet]:
        return chosen_snippets(texts, source_tokenizer, target_tokenizer, plan.free, **mined)

    def learn() -> Mixture | LearntRows:
        snippets = texts.once(("snippets", plan, *mined.values()), mine)
        if not snippets:
            return chain
        with frozen(model):
            return (learn_inputs if side == "input" else learn_outputs)(model, chain, plan, snippets, how)

    return texts.once(("token_distillation", plan, side, *mined.values(), how), learn)


def learn_inputs(
    model: PreTrainedModel, chain: Mixture, plan: TransferPlan, snippets: Sequence[Snippet], how: Training
) -> LearntRows:
    """Input rows of the free ids in the snippets, by the squared distance of hidden states at common ends."""
    ids, count = _free_first(np.concatenate([NONE, *(one.target_ids for one in snippets)]), plan)
    number = np.zeros(len(chain), np.int64)
    number[ids] = np.arange(len(ids))
    matrix = input_matrix(model)
    fixed = chain(ids).to(matrix.device, torch.float32)
    learnt = nn.Parameter(fixed[:count].clone())
    optimizer, unit = torch.optim.Adagrad([learnt]), how.learning_rate * _spread(chain)
    for share, batch in how.batches(snippets) if count else ():
        first = [np.searchsorted(one.target_ends, np.argmax(number[one.target_ids] < count)) for one in batch]
        distinct, local = np.unique(np.concatenate([number[one.target_ids] for one in batch]), return_inverse=True)
        here = torch.from_numpy(distinct).to(matrix.device)
        table = torch.cat([learnt[here[here < count]], fixed[here[here >= count]]]).to(matrix.dtype)
        cut_at = np.cumsum([len(one.target_ids) for one in batch])[:-1]
        with torch.no_grad():
            ends = [one.source_ends[k:] for one, k in zip(batch, first, strict=True)]
            wanted = _states(ModelView(model), [one.source_ids for one in batch], ends, how.layer).float()
        ends = [one.target_ends[k:] for one, k in zip(batch, first, strict=True)]
        found = _states(ModelView(model, tables={"input": table}), np.split(local, cut_at), ends, how.layer).float()
        _step(optimizer, (found - wanted).square().mean() / wanted.square().mean(), share * unit)
    return LearntRows(chain, ids[:count], learnt.detach())


def learn_outputs(
    model: PreTrainedModel, chain: Mixture, plan: TransferPlan, snippets: Sequence[Snippet], how: Training
) -> LearntRows:
    """Output rows of the free ids that begin at common ends, by cross entropy after the last states of the model."""
    ids, count = _free_first(np.concatenate([NONE, *(_following(one)[1] for one in snippets)]), plan)
    every, device = np.arange(len(chain)), head_matrix(model).device
    fixed = chain(every).to(device, torch.float32)
    bias = output_head(model).bias
    if bias is not None:
        biases = Known(TensorRows(bias.detach()[:, None]), chain.known.size)
        bias = chain.over(biases)(every)[:, 0]
    form = LogitForm(bias, **logit_settings(model))
    places = torch.from_numpy(ids[:count]).to(device)
    learnt = nn.Parameter(fixed[places].clone())
    optimizer, unit = torch.optim.Adagrad([learnt]), how.learning_rate * _spread(chain)
    for share, batch in how.batches(snippets) if count else ():
        ends, labels = zip(*(_following(one) for one in batch), strict=True)
        with torch.no_grad():
            states = _states(ModelView(model), [one.source_ids for one in batch], ends, -1).float()
            logits = states @ fixed.T
        logits = form(logits.index_copy(1, places, states @ learnt.T))
        wanted = torch.from_numpy(np.concatenate(labels)).to(device)
        if len(wanted):
            _step(optimizer, cross_entropy(logits, wanted), share * unit)
    return LearntRows(chain, ids[:count], learnt.detach())


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


def _free_first(ids: Int64[ndarray, "T"], plan: TransferPlan) -> tuple[Int64[ndarray, "L"], int]:
    """The distinct ids, those first whose rows an initialiser makes, and how many these are."""
    distinct = np.unique(ids)
    free = np.isin(distinct, plan.free)
    return np.concatenate([distinct[free], distinct[~free]]), int(free.sum())


def _spread(chain: Mixture) -> float:
    """The root mean square of the dimensions' deviations over the source rows."""
    return float(chain.known.deviation.square().mean().sqrt())


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, learning_rate: float) -> None:
    optimizer.param_groups[0]["lr"] = learning_rate
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _check(how: Training, snippet_bytes: int, snippets_per_token: int, model: PreTrainedModel) -> None:
    """UserError for options out of their range."""
    least = {
        "passes": how.passes,
        "max_steps": how.max_steps,
        "batch_size": how.batch_size,
        "snippet_bytes": snippet_bytes,
        "snippets_per_token": snippets_per_token,
    }
    for name, value in least.items():
        if value < 1:
            raise UserError(f"transfer.token_distillation.{name}: {value}, where a whole number from 1 is needed")
    if how.learning_rate <= 0:
        raise UserError(
            f"transfer.token_distillation.learning_rate: {how.learning_rate}, where a number above 0 is needed"
        )
    layers = model.config.get_text_config().num_hidden_layers
    if not -layers <= how.layer <= layers or how.layer == 0:
        raise UserError(
            f"transfer.token_distillation.layer: {how.layer}, where the model has {layers}; "
            f"write one from 1 to {layers}, or from -{layers} to -1"
        )
