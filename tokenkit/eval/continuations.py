"""Log-probabilities of continuations, many at a time: rows of like length together, equal rows read once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenkit.models.factorised_view import FactorisedView
from tokenkit.models.reader import Reader
from tokenkit.models.view import ModelView
from tokenkit.quantities import at_least_float32

ENTRIES = 1 << 25  # logits that exist at one time
SHORTEST, TIMES = 16, 3  # a context is shared from so many tokens on, and so many times its longest continuation:
# padding on both sides and a mask cost more than reading a short one again
GATHERED = 2  # a shared context counts once for every continuation, and most of those tokens are not read
Answer = tuple[float, bool]


@dataclass(frozen=True)
class Row:
    """Ids that are read, and the questions about them: each is a request's number and the labels at the row's end."""

    ids: tuple[int, ...]
    asked: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def scored(self) -> int:
        """Positions at the end whose distributions are looked at."""
        return max(len(labels) for _, labels in self.asked)

    @property
    def context(self) -> tuple[int, ...]:
        """What stands before the first label."""
        return self.ids[: len(self.ids) - self.scored + 1]


def rows_of(requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Row]:
    """(what is read, labels at its end) of every request; requests that read the same ids share a row."""
    found: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for number, (ids, labels) in enumerate(requests):
        if labels:
            found.setdefault(tuple(ids), []).append((number, tuple(labels)))
    return [Row(ids, tuple(asked)) for ids, asked in found.items()]


@torch.no_grad()
def scores(
    view: ModelView,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_tokens: int = 4096,
    share: bool = True,
) -> list[Answer]:
    """Of each request (what is read, labels at its end) the log-probability of the labels in nats, and whether every
    label is the likeliest id there.

    `batch_tokens` are read together, padding included. `share`: a context with several continuations is read once.
    """
    found: dict[int, Answer] = dict.fromkeys(range(len(requests)), (0.0, True))
    rows = rows_of(requests)
    alone, groups = shared_contexts(rows) if share and can_share(view) else (rows, [])
    for batch in batches(alone, batch_tokens):
        found |= _scores(view, batch)
    for several in group_batches(groups, GATHERED * batch_tokens, ENTRIES // view.vocab_rows):
        found |= _shared_scores(view, several)
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


def can_share(view: ModelView) -> bool:
    """Whether a read context can be kept: by a plain model that is told which positions are padding."""
    plain = not isinstance(view, FactorisedView) and view.adapters and not view.tables and view.rows is None
    return plain and Reader(view.model).pads


def shared_contexts(rows: Sequence[Row]) -> tuple[list[Row], list[list[Row]]]:
    """Rows that are read alone, and rows that have a context of some length in common."""
    by_context: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        by_context.setdefault(row.context, []).append(row)
    alone: list[Row] = []
    several: list[list[Row]] = []
    for context, group in by_context.items():
        longest = max(row.scored for row in group)
        if len(group) > 1 and len(context) >= max(SHORTEST, TIMES * longest):
            several.append(group)
        else:
            alone += group
    return alone, several


def group_batches(groups: Sequence[list[Row]], batch_tokens: int, positions: int) -> Iterator[list[list[Row]]]:
    """Groups of like lengths, together as long as their rows would be so many tokens; scored at no more than so many
    positions."""
    batch: list[list[Row]] = []
    rows = longest = scored = 0
    for group in sorted(groups, key=_size_of):
        count = rows + len(group)
        length, steps = max(longest, *(len(row.ids) for row in group)), max(scored, *(row.scored for row in group))
        if batch and (length * count > batch_tokens or steps * count > positions):
            yield batch
            batch, count = [], len(group)
            length, steps = max(len(row.ids) for row in group), max(row.scored for row in group)
        batch.append(group)
        rows, longest, scored = count, length, steps
    if batch:
        yield batch


def _size_of(group: list[Row]) -> tuple[int, int, tuple[int, ...]]:
    """Long continuations first, and among those of like length long contexts."""
    return -max(row.scored for row in group).bit_length(), -len(group[0].context), group[0].ids


def _scores(view: ModelView, batch: list[Row]) -> dict[int, Answer]:
    width = len(batch[0].ids)
    hidden = view.hidden(_padded([row.ids for row in batch], width).to(view.model.device))
    ends = [number * width + len(row.ids) for number, row in enumerate(batch)]
    questions = _Questions.of(batch, ends, hidden.device)
    return questions.answers(*label_scores(view, hidden.flatten(0, 1), questions.places, questions.labels))


def _shared_scores(view: ModelView, groups: list[list[Row]]) -> dict[int, Answer]:
    """Contexts first, padded on the left; then every continuation behind its own, padded on the right."""
    device, contexts = view.model.device, [group[0].context for group in groups]
    width = max(map(len, contexts))
    ids = torch.tensor([[0] * (width - len(context)) + [*context] for context in contexts], device=device)
    lengths = torch.tensor([len(context) for context in contexts], device=device)
    reader = Reader(view.model)
    first = reader(ids, torch.arange(width, device=device) >= (width - lengths).unsqueeze(1))
    rows, owners = zip(*((row, number) for number, group in enumerate(groups) for row in group), strict=True)
    steps = max(row.scored for row in rows) - 1
    reader.select(torch.tensor(owners, device=device))
    after = reader.all(_padded([row.ids[len(row.context) :] for row in rows], steps).to(device))
    logits = torch.cat([first[torch.tensor(owners, device=device)].unsqueeze(1), after], 1).flatten(0, 1)
    ends = [number * (steps + 1) + row.scored for number, row in enumerate(rows)]
    questions = _Questions.of(rows, ends, device)
    return questions.answers(*_chosen(logits[questions.places], questions.labels))


def _padded(rows: Sequence[Sequence[int]], width: int) -> Int[Tensor, "B T"]:
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


@dataclass(frozen=True)
class _Questions:
    """Labels of several requests with their flat places, and whose they are."""

    places: Int[Tensor, "N"]
    labels: Int[Tensor, "N"]
    owners: Int[Tensor, "N"]
    numbers: list[int]

    @classmethod
    def of(cls, rows: Sequence[Row], ends: Sequence[int], device: torch.device) -> "_Questions":
        """The last label of every request of a row is asked at the place before `ends`."""
        places: list[int] = []
        labels: list[int] = []
        owners: list[int] = []
        numbers: list[int] = []
        for row, end in zip(rows, ends, strict=True):
            for number, asked in row.asked:
                places += range(end - len(asked), end)
                labels += asked
                owners += [len(numbers)] * len(asked)
                numbers.append(number)
        at, asked_for, whose = (torch.tensor(values, device=device) for values in (places, labels, owners))
        return cls(at, asked_for, whose, numbers)

    def answers(self, logp: Float[Tensor, "N"], best: Bool[Tensor, "N"]) -> dict[int, Answer]:
        """Sum and conjunction over the labels of each request."""
        sums = torch.zeros(len(self.numbers), dtype=torch.float64, device=logp.device)
        sums.index_add_(0, self.owners, logp.double())
        misses = torch.zeros(len(self.numbers), dtype=torch.long, device=logp.device)
        misses.index_add_(0, self.owners, (~best).long())
        triples = zip(self.numbers, sums.tolist(), misses.tolist(), strict=True)
        return {number: (total, missed == 0) for number, total, missed in triples}


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
    logp, best = [], []
    for some in range(0, len(places), max(1, ENTRIES // len(head))):
        part = slice(some, some + max(1, ENTRIES // len(head)))
        looked_at, back = places[part].unique(return_inverse=True)  # several labels may be asked for at one place
        hidden = states[looked_at]
        logits = view.form()(at_least_float32(hidden @ head.to(hidden.dtype).T))
        found = _chosen(logits, labels[part], back)
        logp.append(found[0])
        best.append(found[1])
    return torch.cat(logp), torch.cat(best)


def _chosen(
    logits: Float[Tensor, "P V"], labels: Int[Tensor, "N"], rows: Int[Tensor, "N"] | None = None
) -> tuple[Float[Tensor, "N"], Bool[Tensor, "N"]]:
    """Log-probability of each label in its row of logits, and whether it is the largest there."""
    rows = torch.arange(len(labels), device=labels.device) if rows is None else rows
    logp = logits[rows, labels] - logits.logsumexp(-1)[rows]
    return logp, logits.argmax(-1)[rows] == labels
