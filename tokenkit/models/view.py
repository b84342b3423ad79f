"""A causal language model seen as named tensors: hidden states under a linear head, teacher and student on one body."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.models.load import head_matrix, input_matrix
from tokenkit.models.lora import lora_disabled
from tokenkit.quantities import token_scores


class ModelView:
    """A model's body and head, optionally with other embedding tables and with its adapters off.

    A self-distilling teacher is such a view: the same weights, the tables from before the transfer, no adapters.
    """

    def __init__(self, model: PreTrainedModel, *, tables: Mapping[str, Tensor] | None = None, adapters: bool = True):
        self.model = model
        self.tables = dict(tables or {})
        self.adapters = adapters

    @property
    def vocab_rows(self) -> int:
        """Ids the model has logits for; may be more than its tokenizer's."""
        return self.head().shape[0]

    def head(self) -> Float[Tensor, "V D"]:
        """The output matrix: one row per id."""
        return self.tables.get("head", head_matrix(self.model))

    def hidden(self, inputs: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Last hidden states, as the head reads them. Right padding needs no mask under causal attention."""
        body = self.model.base_model
        arguments = {"input_ids": inputs, "use_cache": False}
        with self._adapters():
            if "input" not in self.tables:
                hidden = body(**arguments).last_hidden_state
            else:
                table = input_matrix(self.model)
                weight = next(name for name, parameter in body.named_parameters() if parameter is table)
                hidden = functional_call(body, {weight: self.tables["input"]}, kwargs=arguments).last_hidden_state
        device = inputs.device.type
        # the residual stream is float32 even under autocast; the head shall read what the rest of the body computes in
        return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden

    def leaves(
        self,
        needs: set[str],
        inputs: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"],
        boundary: Bool[Tensor, "V"] | None,
    ) -> dict[str, Tensor]:
        """The model leaves that are asked for; labels below 0 are not scored."""
        hidden = self.hidden(inputs)
        found: dict[str, Tensor] = {}
        if "hidden" in needs:
            found["hidden"] = hidden
        if "logits" in needs:
            found["logits"] = (hidden @ self.head().to(hidden.dtype).T).float()
        if {"label_logp", "boundary_logp"} & needs:
            wanted = boundary if "boundary_logp" in needs else None
            found["label_logp"], found["boundary_logp"] = token_scores(hidden, self.head(), labels, wanted)
        return found

    @contextmanager
    def _adapters(self) -> Iterator[None]:
        if self.adapters:
            yield
        else:
            with lora_disabled(self.model):
                yield


@torch.no_grad()
def check_linear_head(model: PreTrainedModel) -> None:
    """UserError where logits are not head x hidden (a soft cap, a scale, a bias): every score here would be wrong."""
    ids = torch.arange(8, device=model.device).unsqueeze(0) % len(input_matrix(model))
    view = ModelView(model)
    ours = view.hidden(ids) @ view.head().T
    theirs = model(input_ids=ids, use_cache=False).logits
    if (ours - theirs).abs().max() > 1e-2 * theirs.abs().max():
        raise UserError(
            f"{model.config.model_type}: its logits are not a plain linear map of the last hidden states (soft cap, "
            "scale or bias); choose a model whose head is"
        )
