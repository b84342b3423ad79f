"""What a change of a model's weights did to its answers: divergence, first choices, bits per byte."""

from typing import Any

import torch
from transformers import PreTrainedModel

from tokenkit.eval.bits_per_byte import bits_per_byte
from tokenkit.export.verify import logits_of
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.base import Tokenizer

LINES = [  # what is measured on where nobody names a text: a story, an explanation, a letter, code
    "Once upon a time there was a little dog who lived with an old man near the sea. Every morning they walked along "
    "the beach. One day the dog found a red ball. He was so happy that he ran all the way home to show his friend.",
    "Water boils when its vapour pressure is as high as the pressure of the air around it. On a mountain the air is "
    "thinner, so water boils at a lower temperature and an egg takes longer to cook.",
    "Dear Anna, thank you for your letter. We have been back since Tuesday, and the garden needs a lot of work after "
    "the rain. Please tell your mother that we would be glad to see you both in spring.",
    'def mean(values):\n    """Return the arithmetic mean of a list of numbers."""\n    if not values:\n'
    "        raise ValueError('no values')\n    return sum(values) / len(values)\n",
]


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
