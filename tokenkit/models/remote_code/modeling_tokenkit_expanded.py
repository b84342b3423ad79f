"""A byte-level model whose input at every byte is the byte's own row and that of the longest old token that ends there.

For `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`; what was added is in expansion.safetensors,
the body in base/, an ordinary folder that answers differently. Minixhofer, Vulić & Ponti 2025, 2503.20083.
"""

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig

from .longest_suffix import BREAK, MAX_BYTES, LongestSuffix


class TokenkitExpandedConfig(PretrainedConfig):
    """The body's configuration as `text_config`, and how many old tokens of how many bytes there are."""

    model_type = "tokenkit_expanded"
    sub_configs = {"text_config": AutoConfig}  # pyrefly: ignore [bad-override] (a class variable there as well)

    def __init__(self, text_config: Any = None, old_tokens: int = 0, old_bytes: int = 0, **kwargs: Any):
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config if text_config is not None else AutoConfig.for_model("llama")
        self.old_tokens, self.old_bytes = old_tokens, old_bytes
        kwargs["tie_word_embeddings"] = self.text_config.tie_word_embeddings
        super().__init__(**kwargs)


class TokenkitExpandedForCausalLM(PreTrainedModel, GenerationMixin):
    """The body's own modules under their own names, and the old tokens: `rows`, and their spellings end to end."""

    rows: Tensor
    bytes: Tensor
    lengths: Tensor
    config_class = TokenkitExpandedConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: TokenkitExpandedConfig):
        super().__init__(config)
        body: Any = AutoModelForCausalLM.from_config(config.text_config)
        self.__dict__["whole"] = body  # not registered: its modules are, below, and stand in files without a prefix
        for name, module in body.named_children():
            self.add_module(name, module)
        self._tied_weights_keys = body._tied_weights_keys
        width = body.get_input_embeddings().weight.shape[1]
        self.register_buffer("rows", torch.zeros(config.old_tokens, width))
        self.register_buffer("bytes", torch.zeros(config.old_bytes, dtype=torch.uint8))
        self.register_buffer("lengths", torch.zeros(config.old_tokens, dtype=torch.uint8))
        self._match: LongestSuffix | None = None
        self._before: Tensor | None = None
        self._mask: Tensor | None = None
        body.get_input_embeddings().register_forward_hook(self._add)
        self.post_init()

    @property
    def body(self) -> Any:
        """The model that reads what the hook makes of ids."""
        return self.__dict__["whole"]

    def get_input_embeddings(self) -> nn.Module:
        """The body's rows of bytes."""
        return self.body.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """ValueError: the old rows are added by a hook on the module that is there."""
        raise ValueError("the vocabulary of this model is the bytes; to change it, take the model in base/")

    def get_output_embeddings(self) -> nn.Module:
        """The body's head."""
        return self.body.get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        ids_before: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """What the body answers. `ids_before` [B, W] are the last ids that `past_key_values` stands for.

        Without them the ids of the call that filled the cache are taken, if nothing was cut off since.
        """
        if input_ids is None:
            raise ValueError("this model looks for tokens in bytes: give input_ids, not inputs_embeds")
        cached = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if cached and ids_before is None:
            length, ids_before = vars(past_key_values).get("expansion_ids", (None, None))
            if length != cached or len(ids_before) != len(input_ids):
                raise ValueError(f"ids_before: give the last {MAX_BYTES - 1} ids that past_key_values stands for")
        ids_before = ids_before if cached else None
        with self._reading(ids_before, attention_mask):
            output = self.body(
                input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
            )
        cache = output.get("past_key_values") if isinstance(output, dict) else None
        if cache is not None:
            seen = input_ids if ids_before is None else torch.cat([ids_before.to(input_ids), input_ids], 1)
            vars(cache)["expansion_ids"] = (int(cache.get_seq_length()), seen[:, 1 - MAX_BYTES :])
        return output

    def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The body's inputs, and the ids before them, so that beams may be reordered and drafts taken back."""
        kwargs.pop("ids_before", None)
        above: Any = super()
        inputs = above.prepare_inputs_for_generation(input_ids, *args, **kwargs)
        before = input_ids[:, : input_ids.shape[1] - inputs["input_ids"].shape[1]]
        inputs["ids_before"] = before[:, 1 - MAX_BYTES :] if before.shape[1] else None
        return inputs

    @contextmanager
    def _reading(self, before: Tensor | None, mask: Tensor | None) -> Iterator[None]:
        self._before, self._mask = before, mask if mask is not None and mask.dim() == 2 else None
        try:
            yield
        finally:
            self._before = self._mask = None

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self._match is None:
            self._match = LongestSuffix(self._spellings())
        ids, before = inputs[0], self._before
        if self._mask is not None:  # no token goes across padding, whatever ids fill it
            padding = self._mask.to(ids.device) == 0
            if before is not None:
                held = padding[:, : padding.shape[1] - ids.shape[1]][:, -before.shape[1] :]
                before = before.to(ids).masked_fill(held, BREAK)
            ids = ids.masked_fill(padding[:, -ids.shape[1] :], BREAK)
        token = self._match(ids, before)
        rows = self.rows.to(output)[token.clamp_min(0)]
        return output + rows.masked_fill((token < 0).unsqueeze(-1), 0.0)

    def _spellings(self) -> "list[builtins.bytes]":
        text, ends = builtins.bytes(self.bytes.tolist()), self.lengths.long().cumsum(0).tolist()
        return [text[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
