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
SLICE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}  # rows x vocabulary that exist at one time: a cache, or 1 GiB
FEWEST_ROWS = 64  # a slice thinner than this wastes the matrix units


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

    Logits exist for a slice of rows at a time and are computed again in the backward pass: tokens x vocabulary is never
    held. A label below 0 is scored 0.
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
    """Log-softmax of a linear head at the labels, and the log-mass of a token set, in slices of rows."""

    @staticmethod
    def forward(ctx, hidden, head, labels, boundary):
        scores = []
        for part in _slices(len(labels), head):
            logits = _logits(hidden[part], head)
            total = logits.logsumexp(-1)
            label = logits.gather(1, labels[part].clamp_min(0).long().unsqueeze(1)).squeeze(1)
            mass = total if boundary is None else logits.masked_fill_(~boundary, -torch.inf).logsumexp(-1)
            scores.append(torch.stack([label, total, mass]))
        label, total, mass = torch.cat(scores, 1) if scores else hidden.new_zeros(3, 0)
        ctx.save_for_backward(hidden, head, labels, boundary, total, mass)
        return (label - total).masked_fill(labels < 0, 0.0), mass - total

    @staticmethod
    def backward(ctx, *gradients):
        label_grad, mass_grad = gradients
        hidden, head, labels, boundary, total, mass = ctx.saved_tensors
        label_grad = label_grad.masked_fill(labels < 0, 0.0)
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        head_grad = torch.zeros_like(head, dtype=total.dtype) if ctx.needs_input_grad[1] else None
        for part in _slices(len(labels), head):
            logits = _logits(hidden[part], head)
            g, m = label_grad[part].unsqueeze(1), mass_grad[part].unsqueeze(1)
            if boundary is None:
                grad = (logits - total[part].unsqueeze(1)).exp_().mul_(-g)
            else:
                # d mass / d z is softmax over the set alone: its own exp, for the ratio of both may overflow
                inside = (logits - mass[part].unsqueeze(1)).masked_fill_(~boundary, -torch.inf).exp_().mul_(m)
                grad = logits.sub_(total[part].unsqueeze(1)).exp_().mul_(-(g + m)).add_(inside)
            grad.scatter_add_(1, labels[part].clamp_min(0).long().unsqueeze(1), g)
            grad = grad.to(hidden.dtype)
            if hidden_grad is not None:
                hidden_grad[part] = grad @ head.to(grad.dtype)
            if head_grad is not None:
                head_grad += grad.T @ hidden[part]
        return hidden_grad, None if head_grad is None else head_grad.to(head.dtype), None, None


def _slices(length: int, head: Tensor) -> list[slice]:
    rows = max(FEWEST_ROWS, SLICE_ELEMENTS[head.device.type] // head.shape[0])
    return [slice(start, min(start + rows, length)) for start in range(0, length, rows)]


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    logits = hidden @ head.to(hidden.dtype).T
    return logits if logits.dtype == torch.float64 else logits.float()
