"""What a change of a model's weights did to its answers: divergence, first choices, bits per byte."""

from typing import Any

import torch
from transformers import PreTrainedModel

from tokenkit.eval.bits_per_byte import bits_per_byte
from tokenkit.export.verify import logits_of
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.base import Tokenizer


def answers_kept(
    before: PreTrainedModel, after: PreTrainedModel, tokenizer: Tokenizer, documents: list[str]
) -> dict[str, Any]:
    """KL(before || after) in nats per token, the share of tokens with the same first choice, bits per byte of both."""
    divergence, agreed, tokens = 0.0, 0, 0
    limit = before.config.get_text_config().max_position_embeddings
    for document in documents:
        ids = [tokenizer.start_id(), *tokenizer.encode(document).ids.tolist()][:limit]
        first, second = (logits_of(one, ids).double().log_softmax(-1)[0] for one in (before, after))
        divergence += float((first.exp() * (first - second)).sum())
        agreed += int((first.argmax(-1) == second.argmax(-1)).sum())
        tokens += len(ids)
    with torch.no_grad():
        bits = [bits_per_byte(ModelView(one), tokenizer, documents).value for one in (before, after)]
    return {
        "tokens": tokens,
        "kl_nats_per_token": divergence / tokens,
        "same_first_choice": agreed / tokens,
        "bits_per_byte_before": bits[0],
        "bits_per_byte_after": bits[1],
    }
