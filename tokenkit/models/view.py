"""A causal language model seen as named tensors: hidden states under a linear head, teacher and student on one body."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.models.load import head_matrix, input_matrix, logit_settings, output_head
from tokenkit.models.lora import lora_disabled
from tokenkit.models.tap import tapped
from tokenkit.quantities import TAPPED, at_least_float32
from tokenkit.scores import LogitForm, scores_at, token_scores, token_scores_of_logits, top_k_scores

TOP = frozenset({"top_logp", "top_ids", "tail_logp"})
RETURNED = {"embeds": "output_hidden_states", "layers": "output_hidden_states", "attentions": "output_attentions"}
POSITIONS = 256  # whose logits exist at the same time where they are not kept


class ModelView:
    """A model's body and head, optionally with other embedding tables and with its adapters off.

    A self-distilling teacher is such a view: the same weights, the tables from before the transfer, no adapters.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tables: Mapping[str, Tensor] | None = None,
        adapters: bool = True,
        rows: int | None = None,
    ):
        """`rows`: only the first so many ids are scored, as if the head had no others."""
        self.model = model
        self.tables = dict(tables or {})
        self.adapters = adapters
        self.rows = rows
        self.alike = False
        """Whether every label's score counts for as much as any other's, which saves time (`scores.token_scores`)."""
        self.whole: Callable[[Callable[[], Any]], Any] = ModelView.at_once
        """Does some work that reads the model. Of one that is spread over processes, what no layer holds is in one
        piece. Whoever reads a model that is trained reads it in here."""

    @staticmethod
    def at_once(work: Callable[[], Any]) -> Any:
        """What some work returns, done without further ado."""
        return work()

    def limited(self, rows: int) -> "ModelView":
        """The same model, with a head of the first `rows` ids."""
        limited = ModelView(self.model, tables=self.tables, adapters=self.adapters, rows=rows)
        limited.whole = self.whole
        return limited

    @property
    def vocab_rows(self) -> int:
        """Ids the model has logits for; may be more than its tokenizer's."""
        return self.head().shape[0]

    def head(self) -> Float[Tensor, "V D"]:
        """The output matrix: one row per id."""
        return self.tables.get("head", head_matrix(self.model))[: self.rows]

    def form(self) -> LogitForm:
        """What the model does to head @ hidden before it calls the result logits."""
        bias = self.tables.get("bias", output_head(self.model).bias)
        return LogitForm(None if bias is None else bias[: self.rows], **logit_settings(self.model))

    def hidden(self, inputs: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Last hidden states, as the head reads them. Right padding needs no mask under causal attention."""
        return self._as_computed(self._body(inputs).last_hidden_state)

    def log_probabilities(
        self, inputs: Int[Tensor, "B T"], counted: Bool[Tensor, "B T"]
    ) -> Iterable[Float[Tensor, "N V"]]:
        """Of what follows the counted positions, `POSITIONS` of them at a time."""
        hidden = self.hidden(inputs).flatten(0, 1)[counted.flatten()]
        return (self._logp(some) for some in hidden.split(POSITIONS))

    def _logp(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        return self.form()(at_least_float32(hidden @ self.head().to(hidden.dtype).T)).log_softmax(-1)

    def _as_computed(self, states: Tensor) -> Tensor:
        # the residual stream is float32 even under autocast; the head shall read what the rest of the body computes in
        device = states.device.type
        return states.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else states

    def _body(self, inputs: Int[Tensor, "B T"], **options: bool | Tensor) -> Any:
        body = self.model.base_model
        arguments = {"input_ids": inputs, "use_cache": False, **options}
        with self._adapters():
            if "input" not in self.tables:
                return body(**arguments)
            table = input_matrix(self.model)
            weight = next(name for name, parameter in body.named_parameters() if parameter is table)
            with _without_padding_row(self.model.get_input_embeddings()):
                return functional_call(body, {weight: self.tables["input"]}, kwargs=arguments)

    def leaves(
        self,
        needs: AbstractSet[str],
        inputs: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"],
        sets: Mapping[str, Bool[Tensor, "V"]] = MappingProxyType({}),
        *,
        top_k: int | None = None,
        top_ids: Int[Tensor, "B T K"] | None = None,
        positions: Int[Tensor, "B T"] | None = None,
    ) -> dict[str, Tensor]:
        """The model leaves that are asked for; labels below 0 are not scored.

        `sets` are token sets by the leaf that is their mass. The `top_logp` are of this model's own `top_k` best ids,
        or of the `top_ids` of another one. Where `positions` begin at 0 again another document begins, which sees
        nothing of the one before it (`packed.check_packing` tries that).
        """
        found: dict[str, Tensor] = {}
        returned = {option: True for name, option in RETURNED.items() if name in needs}
        place = {} if positions is None else {"position_ids": positions}
        with tapped(self.model, needs & TAPPED) as tap:
            output = self._body(inputs, **returned, **place)
        if "output_hidden_states" in returned:
            states = output.hidden_states
            found["embeds"] = states[0]
            if "layers" in needs:
                found["layers"] = torch.stack([*states[:-1], output.last_hidden_state], 2)
        if "attentions" in needs:
            found["attentions"] = torch.stack(output.attentions, 1)
        found |= tap.leaves()
        hidden = self._as_computed(output.last_hidden_state)
        found["hidden"] = hidden
        if "logits" in needs:
            found["logits"] = self.form()(at_least_float32(hidden @ self.head().to(hidden.dtype).T))
        masses = [name for name in sets if name in needs]
        if "label_logp" in needs and not masses:
            found["label_logp"], _ = self._scores(found, labels, None)
        for name in masses:
            found["label_logp"], found[name] = self._scores(found, labels, sets[name])
        if "entropy" in needs:
            found["entropy"] = self._entropy(hidden)
        if needs & TOP:
            found |= self._top(hidden, top_k, top_ids)
        return {name: tensor for name, tensor in found.items() if name in needs}

    def _scores(self, found: Mapping[str, Tensor], labels: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Label log-probabilities and the log-mass of a token set, from the logits where some loss wants those."""
        if "logits" in found:
            return token_scores_of_logits(found["logits"], labels, tokens)
        return token_scores(found["hidden"], self.head(), labels, tokens, self.form(), alike=self.alike)

    @torch.no_grad()
    def _entropy(self, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T"]:
        """Of the next-token distribution of each position, in nats; without gradients."""
        found = []
        for some in hidden.flatten(0, 1).split(POSITIONS):
            logp = self._logp(some)
            found.append(-torch.where(logp > -torch.inf, logp.exp() * logp, 0).sum(-1))
        return torch.cat(found).view(hidden.shape[:2])

    def _top(self, hidden: Tensor, top_k: int | None, top_ids: Tensor | None) -> dict[str, Tensor]:
        if top_ids is not None:
            logp, tail = scores_at(hidden, self.head(), top_ids, self.form())
            return {"top_logp": logp, "top_ids": top_ids, "tail_logp": tail}
        assert top_k is not None, "a loss that reads the best ids has an option top_k"
        logp, ids, tail = top_k_scores(hidden, self.head(), min(top_k, self.vocab_rows), self.form())
        return {"top_logp": logp, "top_ids": ids, "tail_logp": tail}

    @contextmanager
    def _adapters(self) -> Iterator[None]:
        if self.adapters:
            yield
        else:
            with lora_disabled(self.model):
                yield


@contextmanager
def _without_padding_row(embedding: nn.Module) -> Iterator[None]:
    """Inside the block no id is taken for padding: of another table it may be any token's, or beyond the last one."""
    if not isinstance(embedding, nn.Embedding):
        yield
        return
    before, embedding.padding_idx = embedding.padding_idx, None
    try:
        yield
    finally:
        embedding.padding_idx = before


@torch.no_grad()
def state_shape(view: ModelView, name: str) -> tuple[int, int]:
    """How many layers the leaf `layers` or `qkv` of a model has, and how many channels each."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=view.model.device)
    layers, width = view.leaves({name}, ids, ids)[name].shape[-2:]
    return layers, width


@torch.no_grad()
def check_linear_head(model: PreTrainedModel) -> None:
    """UserError where logits are not what the config says of head x hidden: every score here would be wrong."""
    ids = torch.arange(8, device=model.device).unsqueeze(0) % len(input_matrix(model))
    view = ModelView(model)
    ours = view.form()(view.hidden(ids) @ view.head().T)
    theirs = model(input_ids=ids, use_cache=False).logits
    if (ours - theirs).abs().max() > 1e-2 * theirs.abs().max():
        raise UserError(
            f"{model.config.model_type}: its logits are neither a linear map of the last hidden states nor such a map "
            "with the bias, scale or soft cap of its config; choose a model whose logits are"
        )
