"""A model made ternary without any training, because somebody insists: what is left of it is measured, and said."""

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from tokenkit.eval.bits_per_byte import bits_per_byte
from tokenkit.export.verify import logits_of
from tokenkit.models.ternary import TernaryConfig, attach_ternary
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.base import Tokenizer


def forced_ternary(
    model: PreTrainedModel, tokenizer: Tokenizer, documents: list[str]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A ternary copy, its weights rounded as they are, and the damage on documents.

    KL(model || copy) in nats per token, the share of tokens with the same first choice, and bits per byte of both.
    """
    rounded = copy.deepcopy(model)
    attach_ternary(rounded, TernaryConfig(sub_norm="none", calibrate=False))
    rounded.eval()
    divergence, agreed, tokens = 0.0, 0, 0
    limit = model.config.get_text_config().max_position_embeddings
    for document in documents:
        ids = [tokenizer.start_id(), *tokenizer.encode(document).ids.tolist()][:limit]
        before, after = (logits_of(one, ids).double().log_softmax(-1)[0] for one in (model, rounded))
        divergence += float((before.exp() * (before - after)).sum())
        agreed += int((before.argmax(-1) == after.argmax(-1)).sum())
        tokens += len(ids)
    with torch.no_grad():
        bits = [bits_per_byte(ModelView(one), tokenizer, documents).value for one in (model, rounded)]
    damage = {
        "tokens": tokens,
        "kl_nats_per_token": divergence / tokens,
        "same_first_choice": agreed / tokens,
        "bits_per_byte_before": bits[0],
        "bits_per_byte_after": bits[1],
    }
    return rounded, damage
