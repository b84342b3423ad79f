"""How far a student's next-token distributions are from its teacher's on held-out text. One vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokenkit.config import UserError
from tokenkit.eval.bits_per_byte import EvalConfig, scored_batches
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Agreement:
    """Means over the scored tokens."""

    kl: float
    """KL(teacher || student) in nats."""
    top1: float
    """Share of positions where both hold the same token for the likeliest."""
    num_tokens: int


@torch.no_grad()
def agreement(
    student: ModelView, teacher: ModelView, tokenizer: Tokenizer, documents: Sequence[str], config: EvalConfig
) -> Agreement:
    """Over the positions that bits per byte are counted over, in float64 sums; only ids that both heads have."""
    rows = min(student.vocab_rows, teacher.vocab_rows)
    if rows < tokenizer.vocab_size:
        raise UserError(
            f"agreement: a head of {rows:,} rows for {tokenizer.vocab_size:,} ids; take models of one tokenizer"
        )
    kl, same, count = 0.0, 0, 0
    for inputs, labels in scored_batches(student, tokenizer, documents, config):
        sides = (view.limited(rows).log_probabilities(inputs, labels >= 0) for view in (student, teacher))
        for q, p in zip(*sides):
            kl += torch.where(p > -torch.inf, p.exp() * (p - q), 0).double().sum().item()
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            count += len(p)
    return Agreement(kl / max(1, count), same / max(1, count), count)
