"""A causal language model seen as named tensors: hidden states under a linear head, teacher and student on one body."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.models.load import head_matrix, input_matrix, logit_settings, output_head
from tokenkit.models.lora import lora_disabled
from tokenkit.scores import LogitForm, token_scores


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

    def form(self) -> LogitForm:
        """What the model does to head @ hidden before it calls the result logits."""
        bias = self.tables.get("bias", output_head(self.model).bias)
        return LogitForm(bias, **logit_settings(self.model))

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
        eos: Bool[Tensor, "V"] | None = None,
    ) -> dict[str, Tensor]:
        """The model leaves that are asked for, the masses of these token sets; labels below 0 are not scored."""
        hidden = self.hidden(inputs)
        found: dict[str, Tensor] = {}
        if "hidden" in needs:
            found["hidden"] = hidden
        if "logits" in needs:
            found["logits"] = self.form()((hidden @ self.head().to(hidden.dtype).T).float())
        sets = {name: ids for name, ids in (("boundary_logp", boundary), ("eos_logp", eos)) if name in needs}
        if "label_logp" in needs and not sets:
            found["label_logp"], _ = token_scores(hidden, self.head(), labels, None, self.form())
        for name, ids in sets.items():
            found["label_logp"], found[name] = token_scores(hidden, self.head(), labels, ids, self.form())
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
