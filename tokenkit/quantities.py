"""Every tensor a loss may ask for, by name. Positions are shifted once, at the source: index t predicts label t.

Leaves come from the data (`inputs labels label_mask chunk chunk_end`) and from a model (`hidden`, `logits`,
`label_logp`, `boundary_logp`, `eos_logp`); the rest is derived here. Every name is used with its side:
`student_chunk_logp`.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

SIDES = ("student", "teacher")
DATA_LEAVES = frozenset({"inputs", "labels", "label_mask", "chunk", "chunk_end"})
MODEL_LEAVES = frozenset({"hidden", "logits", "label_logp", "boundary_logp", "eos_logp"})


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


def chunk_eos_logp(eos_logp: Float[Tensor, "B T"], chunk_end: Int[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """Log-probability of the end-of-text token right after each chunk; of position 0 where it has none."""
    return eos_logp.gather(1, chunk_end.clamp_min(0))


def _sum_by_chunk(values: Tensor, chunk: Int[Tensor, "B T"], num_chunks: int) -> Tensor:
    sums = values.new_zeros(values.shape[0], num_chunks + 1)  # the last column takes what is in no chunk
    index = torch.where(chunk < 0, num_chunks, chunk).long()
    return sums.scatter_add(1, index, values)[:, :num_chunks]


DERIVED: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (chunk_logp, chunk_tokens, chunk_boundary_logp, chunk_eos_logp)
}


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
