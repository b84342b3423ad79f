"""Next-token logits of a causal language model, read a piece at a time with its key-value cache."""

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tokenkit.config import UserError
from tokenkit.models.expand import BREAK, expansion_of
from tokenkit.models.factorised_view import factorised_of
from tokenkit.models.load import logit_settings, output_head
from tokenkit.quantities import at_least_float32
from tokenkit.scores import LogitForm

ROOM = 32  # positions, at least, that a larger cache has beyond what is written


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer as the front of larger tensors: what is new is written there, the old not copied."""

    room: list[Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones at the end."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self.room is None or self.room[0].shape[-2] < end:
            pairs = ((self.keys, key_states), (self.values, value_states))
            self.room = [_larger(old, new, start, end) for old, new in pairs]
        self.room[0][:, :, start:end], self.room[1][:, :, start:end] = key_states, value_states
        self.keys, self.values = self.room[0][:, :, :end], self.room[1][:, :, :end]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Goes on with these rows."""
        super().reorder_cache(beam_idx)
        self.room = None


def _larger(old: Tensor, new: Tensor, start: int, end: int) -> Tensor:
    room = new.new_empty(*new.shape[:2], end + max(ROOM, end // 4), new.shape[3])
    if start:
        room[:, :, :start] = old
    return room


class Reader:
    """A causal model and what it has read so far: call it with ids, and it goes on where it stopped.

    The model stays in the mode it is in (who wants its answers calls `model.eval()` first). Sliding-window layers keep
    all their keys, so that reading can be taken back; the window is in the attention mask. A model without a key-value
    cache, and one whose cache cannot be cut (a recurrent state), reads everything again where it must.
    """

    length: int
    """Positions read so far, padding included."""

    def __init__(self, model: PreTrainedModel) -> None:
        if factorised_of(model) is not None:
            raise UserError("the model reads open codes, whose scores are no row of logits; take a compact tokenizer")
        self.body, self.head, self.expansion = model.base_model, output_head(model), expansion_of(model)
        self.form = LogitForm(None, **logit_settings(model))  # without the bias, which the head itself adds
        self.config = model.config.get_text_config()
        self.options = set(inspect.signature(self.body.forward).parameters)
        self.length = 0
        self.seen: Tensor | None = None
        self.mask: Tensor | None = None  # None: nothing is padding
        self.cache: Any = None

    @property
    def pads(self) -> bool:
        """Whether rows of different lengths can be read together: the model is told positions and a mask."""
        return {"position_ids", "attention_mask"} <= self.options

    def __call__(self, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None = None) -> Float[Tensor, "B V"]:
        """Logits, at least float32, that follow the last id of each row; `mask` is False at left padding.

        Padding is for the first call only. The logits are what the model calls so: bias, scale, soft cap applied.
        """
        return self._logits(self._hidden(ids, mask)[:, -1:])[:, 0]

    def all(self, ids: Int[Tensor, "B T"], *, last: int | None = None) -> Float[Tensor, "B N V"]:
        """The same after every id of this call, or after the `last` ones; no id is padding."""
        hidden = self._hidden(ids, None)
        return self._logits(hidden if last is None else hidden[:, max(0, hidden.shape[1] - last) :])

    @torch.no_grad()
    def select(self, rows: Int64[Tensor, "N"]) -> None:
        """Goes on with these rows, in this order; a row may stand there twice."""
        if self.seen is not None:
            rows = rows.to(self.seen.device)
            self.seen = self.seen[rows]
            self.mask = None if self.mask is None else self.mask[rows]
        if self.cache is not None:
            self.cache.reorder_cache(rows)

    @torch.no_grad()
    def crop(self, length: int) -> None:
        """Forgets what was read after the first `length` positions."""
        if self.seen is None or length >= self.length:
            return
        if self.cache is not None and all(type(layer) is GrowingLayer for layer in self.cache.layers) and length > 0:
            self.cache.crop(length - self.length)
        else:
            self.cache = None
        self.length = length
        self.seen = self.seen[:, :length] if length else None
        self.mask = self.mask[:, :length] if self.mask is not None and length else None

    @torch.no_grad()
    def _logits(self, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        return self.form(at_least_float32(self.head(hidden)))

    @torch.no_grad()
    def _hidden(self, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None) -> Float[Tensor, "B T D"]:
        ids = self._masked(ids, mask)
        before, self.seen = self.seen, ids if self.seen is None else torch.cat([self.seen, ids], 1)
        self.length = self.seen.shape[1]
        again = self.cache is None
        read = self.seen if again else ids
        with self._expanded(None if again else before):
            output = self.body(input_ids=read, **self._arguments(read))
        self.cache = output.get("past_key_values")
        return output.last_hidden_state[:, -ids.shape[1] :]

    def _masked(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """The ids, with padding that no old token of an expansion goes across; and the mask of all that was read."""
        if mask is not None and bool(mask.all()):
            mask = None
        if mask is not None:
            assert self.seen is None, "padding stands before everything else"
            assert self.pads, f"{self.config.model_type}: rows of different lengths cannot be read together"
            self.mask = mask.to(ids.device)
            return ids.masked_fill(~self.mask, BREAK) if self.expansion is not None else ids
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(ids.shape)], 1)
        return ids

    def _arguments(self, read: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {"use_cache": True}
        if "past_key_values" in self.options:
            found["past_key_values"] = self._empty_cache() if self.cache is None else self.cache
        if self.mask is not None:
            found["attention_mask"] = self.mask.long()
            found["position_ids"] = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -read.shape[1] :]
        return found

    def _empty_cache(self) -> DynamicCache | None:
        """Of layers that forget nothing, for a model of attention only; None lets the model make its own."""
        own = DynamicCache(config=self.config)
        if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in own.layers):
            return None
        cache = DynamicCache()
        cache.layer_class_to_replicate = GrowingLayer
        return cache

    def _expanded(self, before: Tensor | None) -> Any:
        return nullcontext() if self.expansion is None else self.expansion.after(before)
