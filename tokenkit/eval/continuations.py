"""Log-probabilities of continuations, many at a time: rows of like length together, equal rows read once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenkit.models.factorised_view import FactorisedView
from tokenkit.models.view import ModelView
from tokenkit.quantities import at_least_float32

ENTRIES = 1 << 25  # logits that exist at one time


@dataclass(frozen=True)
class Row:
    """Ids that are read, and the questions about them: each is a request's number and the labels at the row's end."""

    ids: tuple[int, ...]
    asked: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def scored(self) -> int:
        """Positions at the end whose distributions are looked at."""
        return max(len(labels) for _, labels in self.asked)


def rows_of(requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Row]:
    """(what is read, labels at its end) of every request; requests that read the same ids share a row."""
    found: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for number, (ids, labels) in enumerate(requests):
        found.setdefault(tuple(ids), []).append((number, tuple(labels)))
    return [Row(ids, tuple(asked)) for ids, asked in found.items()]


@torch.no_grad()
def scores(
    view: ModelView, requests: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_tokens: int = 4096
) -> list[tuple[float, bool]]:
    """Of each request the log-probability of its labels in nats, and whether every label is the likeliest id there.

    `batch_tokens` are read together, padding included.
    """
    nothing = [number for number, (_, labels) in enumerate(requests) if not labels]
    found: dict[int, tuple[float, bool]] = dict.fromkeys(nothing, (0.0, True))
    for batch in batches(rows_of(requests), batch_tokens):
        found |= _scores(view, batch)
    return [found[number] for number in range(len(requests))]


def batches(rows: Sequence[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """The longest first: what does not fit into memory is known at once."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: (-len(row.ids), row.ids)):
        if batch and len(batch[0].ids) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _scores(view: ModelView, batch: list[Row]) -> dict[int, tuple[float, bool]]:
    width = len(batch[0].ids)
    inputs = torch.zeros(len(batch), width, dtype=torch.long)
    for number, row in enumerate(batch):
        inputs[number, : len(row.ids)] = torch.tensor(row.ids)
    hidden = view.hidden(inputs.to(view.model.device))
    places, labels, owners = _questions(batch, width)
    flat = hidden.flatten(0, 1)
    logp, best = label_scores(view, flat, places.to(flat.device), labels.to(flat.device))
    owners = owners.to(flat.device)
    count = int(owners[-1]) + 1 if len(owners) else 0
    sums = torch.zeros(count, dtype=torch.float64, device=flat.device).index_add_(0, owners, logp.double())
    misses = torch.zeros(count, dtype=torch.long, device=flat.device).index_add_(0, owners, (~best).long())
    numbers = [number for row in batch for number, asked in row.asked if asked]
    return {n: (total, missed == 0) for n, total, missed in zip(numbers, sums.tolist(), misses.tolist(), strict=True)}


def _questions(batch: list[Row], width: int) -> tuple[Int[Tensor, "N"], Int[Tensor, "N"], Int[Tensor, "N"]]:
    """Flat positions, the labels asked there, and a running number per request."""
    places, labels, owners, owner = [], [], [], 0
    for number, row in enumerate(batch):
        end = number * width + len(row.ids)
        for _, asked in row.asked:
            places += range(end - len(asked), end)
            labels += asked
            owners += [owner] * len(asked)
            owner += bool(asked)
    return torch.tensor(places), torch.tensor(labels), torch.tensor(owners)


def label_scores(
    view: ModelView, states: Float[Tensor, "P D"], places: Int[Tensor, "N"], labels: Int[Tensor, "N"]
) -> tuple[Float[Tensor, "N"], Bool[Tensor, "N"]]:
    """Log-probability of each label after the state at its place, and whether it is the likeliest one there.

    Of a model with tables of codes the likeliest id is the likeliest of special tokens, bytes, pins and the codes of
    likeliest digits, as it is in greedy generation.
    """
    if isinstance(view, FactorisedView):
        at, own = states[places], (view.head(), view.form())
        logp = view.factorised.label_logp(at, own[0], labels, own[1])
        return logp, view.factorised.sample(at, *own, temperature=0.0) == labels
    head = view.head()
    looked_at, back = places.unique(return_inverse=True)  # several labels may be asked for at one place
    size = max(1, ENTRIES // len(head))
    logp, best = [], []
    for first in range(0, len(places), size):
        part = back[first : first + size]
        low, high = int(part.min()), int(part.max()) + 1
        hidden = states[looked_at[low:high]]
        logits = view.form()(at_least_float32(hidden @ head.to(hidden.dtype).T))
        asked = labels[first : first + size].unsqueeze(1)
        total = logits.logsumexp(-1)
        logp.append(logits[part - low].gather(1, asked).squeeze(1) - total[part - low])
        best.append(logits.argmax(-1)[part - low] == asked.squeeze(1))
    return torch.cat(logp), torch.cat(best)
