"""Every tensor a loss may ask for, by name. Positions are shifted once, at the source: index t predicts label t.

Leaves come from the data (`inputs labels label_mask chunk chunk_end`) and from a model (`hidden`, `logits`,
`label_logp`, `boundary_logp`); the rest is derived here. Every name is used with its side: `student_chunk_logp`.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SIDES = ("student", "teacher")
DATA_LEAVES = frozenset({"inputs", "labels", "label_mask", "chunk", "chunk_end"})
MODEL_LEAVES = frozenset({"hidden", "logits", "label_logp", "boundary_logp"})
TILE = {"cpu": (256, 4096), "cuda": (4096, 32768)}  # rows x vocabulary that exist at one time: a cache, or 512 MiB
FAINT = -60.0  # nats below which a mass is added up on its own


def chunk_logp(
    label_logp: Float[Tensor, "B T"], chunk: Int[Tensor, "B T"], chunk_end: Int[Tensor, "B C"]
) -> Float[Tensor, "B C"]:
    """Log-probability of each chunk: the sum over its scored tokens, in nats; 0 where it has none."""
    return _sum_by_chunk(label_logp, chunk, chunk_end.shape[1])


def chunk_tokens(chunk: Int[Tensor, "B T"], chunk_end: Int[Tensor, "B C"]) -> Int[Tensor, "B C"]:
    """Number of scored tokens of each chunk."""
    return _sum_by_chunk(torch.ones_like(chunk), chunk, chunk_end.shape[1])


def chunk_boundary_logp(boundary_logp: Float[Tensor, "B T"], chunk_end: Int[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """Log-mass of the tokens that begin after a boundary, right after each chunk; of position 0 where it has none."""
    return boundary_logp.gather(1, chunk_end.clamp_min(0))


def _sum_by_chunk(values: Tensor, chunk: Int[Tensor, "B T"], num_chunks: int) -> Tensor:
    sums = values.new_zeros(values.shape[0], num_chunks + 1)  # the last column takes what is in no chunk
    index = torch.where(chunk < 0, num_chunks, chunk).long()
    return sums.scatter_add(1, index, values)[:, :num_chunks]


DERIVED: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (chunk_logp, chunk_tokens, chunk_boundary_logp)}


def chunk_mask(student_chunk_tokens: Tensor, teacher_chunk_tokens: Tensor) -> Tensor:
    """Chunks that both sides score."""
    return (student_chunk_tokens > 0) & (teacher_chunk_tokens > 0)


BOTH_SIDES: dict[str, Callable[..., Tensor]] = {"chunk_mask": chunk_mask}


def inputs_of(name: str) -> list[str]:
    """The names a quantity is computed from; none for a leaf."""
    if name in BOTH_SIDES:
        return list(inspect.signature(BOTH_SIDES[name]).parameters)
    side, _, base = name.partition("_")
    if side not in SIDES or base not in DATA_LEAVES | MODEL_LEAVES | DERIVED.keys():
        raise KeyError(f"no quantity is called {name!r}")
    return [f"{side}_{p}" for p in inspect.signature(DERIVED[base]).parameters] if base in DERIVED else []


def leaves_of(names: Iterable[str]) -> set[str]:
    """The leaves that a set of quantities is computed from."""
    names = set(names)
    derived = {name for name in names if inputs_of(name)}
    return (names - derived) | (leaves_of(i for name in derived for i in inputs_of(name)) if derived else set())


class Quantities(Mapping[str, Tensor]):
    """Named tensors: the leaves as given, the others computed when first asked for."""

    def __init__(self, *leaves: Mapping[str, Tensor]):
        self._known = {name: tensor for part in leaves for name, tensor in part.items()}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            parents = inputs_of(name)
            if not parents:
                raise KeyError(f"the task did not yield {name!r}; it yields {sorted(self._known)}")
            fn = BOTH_SIDES[name] if name in BOTH_SIDES else DERIVED[name.partition("_")[2]]
            self._known[name] = fn(*(self[parent] for parent in parents))
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


def token_scores(
    hidden: Float[Tensor, "*N D"],
    head: Float[Tensor, "V D"],
    labels: Int[Tensor, "*N"],
    boundary: Bool[Tensor, "V"] | None = None,
) -> tuple[Float[Tensor, "*N"], Float[Tensor, "*N"]]:
    """Log-probability of each label and log-mass of the boundary tokens (0 without `boundary`), in nats.

    Logits exist for one tile of rows x vocabulary at a time and are computed again in the backward pass: tokens x
    vocabulary is never held. A label below 0 is scored 0.
    """
    shape = labels.shape
    scores = _TokenScores.apply(hidden.reshape(-1, hidden.shape[-1]), head, labels.reshape(-1), boundary)
    return scores[0].view(shape), scores[1].view(shape)


def token_scores_dense(
    logits: Float[Tensor, "*N V"], labels: Int[Tensor, "*N"], boundary: Bool[Tensor, "V"] | None = None
) -> tuple[Float[Tensor, "*N"], Float[Tensor, "*N"]]:
    """`token_scores` the plain way, from logits that already exist."""
    logp = logits.float().log_softmax(-1) if logits.dtype != torch.float64 else logits.log_softmax(-1)
    label = logp.gather(-1, labels.clamp_min(0).long().unsqueeze(-1)).squeeze(-1).masked_fill(labels < 0, 0.0)
    if boundary is None:
        return label, torch.zeros_like(label)
    return label, logp.masked_fill(~boundary, -torch.inf).logsumexp(-1)


class _TokenScores(torch.autograd.Function):
    """Log-softmax of a linear head at the labels and the log-mass of a token set, tile by tile of rows x vocabulary."""

    @staticmethod
    def forward(ctx, hidden, head, labels, boundary):
        row_parts, column_parts = _tiles(hidden, head)
        accumulator = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        peak = hidden.new_full((len(labels),), -torch.inf, dtype=accumulator)
        total, mass, label = (torch.zeros_like(peak) for _ in range(3))
        weight = None if boundary is None else boundary.to(accumulator)
        for columns in column_parts:
            for rows in row_parts:
                logits = _logits(hidden[rows], head[columns])
                _take_labels(label[rows], logits, labels[rows], columns)
                new_peak = torch.maximum(peak[rows], logits.amax(1))
                shrink = (peak[rows] - new_peak).exp_()
                exp = logits.sub_(new_peak.unsqueeze(1)).exp_()
                total[rows] = total[rows] * shrink + exp.sum(1)
                if weight is not None:
                    mass[rows] = mass[rows] * shrink + exp @ weight[columns]
                peak[rows] = new_peak
        log_mass = mass.log_() + peak if boundary is not None else None
        total = total.log_() + peak
        if log_mass is not None and boundary is not None:
            faint = torch.nonzero(log_mass - total < FAINT).squeeze(1)  # what float32 cannot add up beside the peak
            if len(faint):
                masked = _logits(hidden[faint], head).masked_fill_(~boundary, -torch.inf)
                log_mass[faint] = masked.logsumexp(-1)
        ctx.save_for_backward(hidden, head, labels, boundary, total, log_mass)
        return (label - total).masked_fill(labels < 0, 0.0), torch.zeros_like(total) if log_mass is None else (
            log_mass - total
        )

    @staticmethod
    def backward(ctx, *gradients):
        hidden, head, labels, boundary, total, mass = ctx.saved_tensors
        label_grad = gradients[0].masked_fill(labels < 0, 0.0)
        mass_grad = gradients[1] if boundary is not None else torch.zeros_like(label_grad)
        weight = None if boundary is None else boundary.to(total.dtype)
        hidden_grad = torch.zeros_like(hidden, dtype=total.dtype)
        head_grad = torch.zeros_like(head, dtype=total.dtype) if ctx.needs_input_grad[1] else None
        row_parts, column_parts = _tiles(hidden, head)
        for columns in column_parts:
            for rows in row_parts:
                logits = _logits(hidden[rows], head[columns])
                inside = None
                if weight is not None and mass is not None:
                    # the softmax over the set alone has its own exp: the ratio of both sums may overflow
                    inside = (logits - mass[rows].unsqueeze(1)).clamp_max_(0).exp_()
                    inside.mul_(torch.outer(mass_grad[rows], weight[columns]))
                grad = logits.sub_(total[rows].unsqueeze(1)).exp_()
                grad.mul_(-(label_grad[rows] + mass_grad[rows]).unsqueeze(1))
                if inside is not None:
                    grad.add_(inside)
                _add_at_labels(grad, label_grad[rows], labels[rows], columns)
                grad = grad.to(hidden.dtype)
                hidden_grad[rows] += grad @ head[columns].to(grad.dtype)
                if head_grad is not None:
                    head_grad[columns] += grad.T @ hidden[rows]
        return (
            hidden_grad.to(hidden.dtype) if ctx.needs_input_grad[0] else None,
            None if head_grad is None else head_grad.to(head.dtype),
            None,
            None,
        )


def _tiles(hidden: Tensor, head: Tensor) -> tuple[list[slice], list[slice]]:
    height, width = TILE[head.device.type]
    return _cut(len(hidden), height), _cut(len(head), width)


def _cut(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    logits = hidden @ head.to(hidden.dtype).T
    return logits if logits.dtype == torch.float64 else logits.float()


def _take_labels(label: Tensor, logits: Tensor, labels: Tensor, columns: slice) -> None:
    """Writes the logits of the labels that lie in this tile's columns."""
    here = torch.nonzero((labels >= columns.start) & (labels < columns.stop)).squeeze(1)
    label[here] = logits[here, labels[here] - columns.start]


def _add_at_labels(grad: Tensor, label_grad: Tensor, labels: Tensor, columns: slice) -> None:
    here = torch.nonzero((labels >= columns.start) & (labels < columns.stop)).squeeze(1)
    grad[here, labels[here] - columns.start] += label_grad[here]
