"""Which code computes a model's attention: said once, checked, and put back where a measurement needs another one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.models.load import quiet

Attention = Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]
ON_GPU = ("flash_attention_2", "flash_attention_3", "flex_attention")
HALF = ("flash_attention_2", "flash_attention_3")  # kernels that read 16-bit numbers alone
KEY = "train.attention"


def attention_of(model: PreTrainedModel) -> str:
    """The name of what computes a model's attention."""
    return model.config._attn_implementation or "eager"


def check_attention(name: Attention, device: str, precision: str) -> None:
    """UserError where a device or a precision rules a way out, before a model is loaded."""
    if name in ON_GPU and device != "cuda":
        raise UserError(f"{KEY}: {name} needs a CUDA GPU, and this run computes on {device}; write {KEY}=sdpa")
    if name in HALF and precision == "float32":
        raise UserError(f"{KEY}: {name} reads 16-bit numbers alone; write train.precision=bfloat16, or {KEY}=sdpa")


def set_attention(model: PreTrainedModel, name: Attention) -> None:
    """Lets a model compute its attention in this way from now on; UserError where it cannot be had.

    auto leaves what transformers chose as it loaded the model.
    """
    if name == "auto" or attention_of(model) == name:
        return
    kind = model.config.model_type
    try:
        with quiet():
            model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        why = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise UserError(f"{KEY}: {name} cannot be had for {kind} here ({why}); write {KEY}=sdpa, or auto") from None
    if attention_of(model) != name:
        raise UserError(
            f"{KEY}: {name} is not to be had for {kind}, which computes its attention itself ({attention_of(model)}); "
            f"write {KEY}=auto"
        )


@contextmanager
def whole_precision(*models: PreTrainedModel) -> Iterator[None]:
    """Inside the block models whose attention reads 16-bit numbers alone compute it with sdpa: float32 is measured."""
    changed = [(model, attention_of(model)) for model in models if attention_of(model) in HALF]
    for model, _ in changed:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        for model, before in changed:
            model.set_attn_implementation(before)
