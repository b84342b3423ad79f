"""How far a student's next-token distributions are from its teacher's on held-out text. One vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from tokenkit.config import UserError
from tokenkit.eval.bits_per_byte import EvalConfig, scored_batches
from tokenkit.models.view import ModelView
from tokenkit.quantities import at_least_float32
from tokenkit.tokenizers.base import Tokenizer

POSITIONS = 512  # whose logits of both models exist at the same time


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
    """Over the positions that bits per byte are counted over, in float64 sums; ids that only one head has are left out."""
    rows = min(student.vocab_rows, teacher.vocab_rows)
    if rows < tokenizer.vocab_size:
        raise UserError(
            f"agreement: a head of {rows:,} rows for {tokenizer.vocab_size:,} ids; take models of one tokenizer"
        )
    kl, same, count = 0.0, 0, 0
    for inputs, labels in scored_batches(student, tokenizer, documents, config):
        counted = (labels >= 0).flatten()
        sides = [view.limited(rows) for view in (student, teacher)]
        hidden = [view.hidden(inputs).flatten(0, 1)[counted] for view in sides]
        for parts in zip(*(h.split(POSITIONS) for h in hidden)):
            q, p = (_logp(view, part) for view, part in zip(sides, parts))
            kl += torch.where(p > -torch.inf, p.exp() * (p - q), 0).double().sum().item()
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            count += len(p)
    return Agreement(kl / max(1, count), same / max(1, count), count)


def _logp(view: ModelView, hidden: Tensor) -> Tensor:
    return view.form()(at_least_float32(hidden @ view.head().to(hidden.dtype).T)).log_softmax(-1)


def first_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Int[Tensor, "1 T"]]:
    """Texts as the rows that a model is calibrated with: the start token, then theirs."""
    start = tokenizer.start_id()
    return [torch.tensor([[start, *encoding.ids.tolist()]]) for encoding in tokenizer.encode_batch([*texts])]
