"""Bits per byte: the negative log-likelihood of whole documents in bits, over their UTF-8 bytes.

It counts the same thing for every tokenizer, so it can be compared across them (perplexity cannot). A document begins
with the start token, which is given and not scored; no other special token is scored; each byte counts once.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from tokenkit.config import Config, UserError
from tokenkit.data.source import SourceConfig
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.base import Tokenizer


class EvalConfig(Config):
    """Held-out text and the sliding context it is read with."""

    source: SourceConfig
    context_tokens: int = Field(512, ge=2)
    """Tokens the model sees at most; never more than it has positions."""
    stride_tokens: int | None = None
    """Tokens by which the context moves on; half of it by default. Every scored token has at least the rest."""
    batch_tokens: int = Field(16384, ge=1)
    """Tokens that are scored together."""

    def windows(self) -> dict[str, Any]:
        """The context, as `bits_per_byte` takes it."""
        return self.model_dump(include={"context_tokens", "stride_tokens", "batch_tokens"})


@dataclass(frozen=True)
class BitsPerByte:
    """Bits per byte, and what it was counted over."""

    value: float
    nats: float
    num_bytes: int
    num_tokens: int

    @property
    def bytes_per_token(self) -> float:
        """How much text a token spells, on average."""
        return self.num_bytes / max(1, self.num_tokens)


def context_windows(length: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, end, first scored) token ranges: together they score tokens 1 .. length-1 once each."""
    windows, scored, start = [], 1, 0
    while scored < length:
        end = min(start + context, length)
        windows.append((start, end, scored))
        scored, start = end, start + stride
    return windows


@torch.no_grad()
def bits_per_byte(
    view: ModelView,
    tokenizer: Tokenizer,
    documents: list[str],
    *,
    context_tokens: int = 512,
    stride_tokens: int | None = None,
    batch_tokens: int = 16384,
) -> BitsPerByte:
    """Bits per byte of documents under a model in its sliding context."""
    rows, num_tokens = _rows(tokenizer, documents, context_tokens, stride_tokens)
    nats = sum(_score(view, batch) for batch in _batches(rows, batch_tokens))
    num_bytes = sum(len(document.encode()) for document in documents)
    return BitsPerByte(nats / (math.log(2) * num_bytes), nats, num_bytes, num_tokens)


def scored_batches(
    view: ModelView, tokenizer: Tokenizer, documents: Sequence[str], config: EvalConfig
) -> Iterator[tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]]:
    """Inputs and labels on the model's device, every byte scored once; a label below 0 is not scored."""
    rows, _ = _rows(tokenizer, [*documents], config.context_tokens, config.stride_tokens)
    return (_tensors(view, batch) for batch in _batches(rows, config.batch_tokens))


def _rows(
    tokenizer: Tokenizer, documents: list[str], context_tokens: int, stride_tokens: int | None
) -> tuple[list[tuple[list[int], int]], int]:
    """Token windows with the first place that is scored in each, shortest first, and how many tokens are scored."""
    stride = stride_tokens or max(1, context_tokens // 2)
    if stride >= context_tokens:
        raise UserError(f"eval.stride_tokens: {stride} leaves no context of {context_tokens} tokens; write less")
    rows: list[tuple[list[int], int]] = []
    num_tokens = 0
    for encoding in tokenizer.encode_batch(documents):
        ids = [tokenizer.start_id(), *encoding.ids.tolist()]
        num_tokens += len(ids) - 1
        # every window begins with the start token, as every training row does: some models lean on it
        windows = context_windows(len(ids), context_tokens, stride)
        rows += [([tokenizer.start_id(), *ids[s + 1 : e]], first - s) for s, e, first in windows]
    return sorted(rows, key=lambda row: len(row[0])), num_tokens


def _batches(rows: list[tuple[list[int], int]], batch_tokens: int) -> Iterator[list[tuple[list[int], int]]]:
    batch: list[tuple[list[int], int]] = []
    for row in rows:  # shortest first: the row at hand is the longest of its batch
        if batch and len(row[0]) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _score(view: ModelView, rows: list[tuple[list[int], int]]) -> float:
    inputs, labels = _tensors(view, rows)
    return -view.leaves({"label_logp"}, inputs, labels)["label_logp"].double().sum().item()


def _tensors(view: ModelView, rows: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    length = max(len(ids) for ids, _ in rows)
    inputs: Int[Tensor, "B T"] = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full_like(inputs, -1)
    for number, (ids, first) in enumerate(rows):
        inputs[number, : len(ids)] = torch.tensor(ids)
        labels[number, first - 1 : len(ids) - 1] = torch.tensor(ids[first:])
    return inputs.to(view.model.device), labels.to(view.model.device)
