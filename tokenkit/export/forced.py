"""A model made ternary without any training, because somebody insists: what is left of it is measured, and said."""

import copy
from typing import Any

from transformers import PreTrainedModel

from tokenkit.export.quality import answers_kept
from tokenkit.models.ternary import TernaryConfig, attach_ternary
from tokenkit.tokenizers.base import Tokenizer


def forced_ternary(
    model: PreTrainedModel, tokenizer: Tokenizer, documents: list[str]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A ternary copy, its weights rounded as they are, and the damage on documents: figures of `answers_kept`."""
    rounded = copy.deepcopy(model)
    attach_ternary(rounded, TernaryConfig(sub_norm="none", calibrate=False))
    rounded.eval()
    return rounded, answers_kept(model, rounded, tokenizer, documents)
