"""Every tensor that a loss may ask for, by name, so that a model computes only what some loss asks for.

Positions are shifted once, in the data: at index `t` stand the input `t` and the label that its logits predict.
Leaves come from the data, from a model, from the pair of tokenizers or from what the task learns; the rest is derived
here. Every name but those of the pair is used with its side: `student_chunk_logp`.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SIDES = ("student", "teacher")
DATA_LEAVES = frozenset({"inputs", "labels", "label_mask", "token_mask", "chunk", "chunk_end"})
SCORES = frozenset({"label_logp", "boundary_logp", "eos_logp", "top_logp", "top_ids", "tail_logp"})
AUTOENCODER_LEAVES = frozenset(  # of byte strings, not of running text
    {"byte_labels", "byte_logits", "latents", "cells", "level_shares"}
)
TAPPED = frozenset({"qkv", "queries", "keys", "values", "attention_output", "mlp_output"})  # inside of every layer
MODEL_LEAVES = SCORES | TAPPED | {"hidden", "embeds", "layers", "logits", "attentions", "entropy"}
SHARED_LEAVES = frozenset({"space_after"})  # of the data, without a side
PAIR_LEAVES = frozenset(
    {"exact_pairs", "mined_pairs", "unbiased_pairs", "mined_ids", "projection_ids", "projection_weights"}
)
STEP_MEAN = "step_mean"  # ends the name of a mean over the whole step, which a loss takes beforehand
_DUAL = tuple(f"{side}_{name}" for side in SIDES for name in ("hidden", "embeds", "token_mask", "chunk_end"))
BY_TASK: dict[str, tuple[str, ...]] = {  # what the task computes from what both sides say, or with parts learnt along
    "student_top_logp": ("teacher_top_ids",),
    "student_tail_logp": ("teacher_top_ids",),
    "student_projected_hidden": ("student_hidden",),
    "student_divergence": ("student_hidden", "teacher_hidden", "student_label_mask"),
    "dual_student_logits": _DUAL,
    "dual_teacher_logits": _DUAL,
}
_STATES = {
    "states": "layers",
    "last_states": "hidden",
    "attention_states": "attention_output",
    "mlp_states": "mlp_output",
}
PAIRED: dict[str, tuple[str, ...]] = {  # of pairs of layers, made by the task from the options of the loss that asks
    **{f"{side}_{name}": (f"{side}_{leaf}",) for side in SIDES for name, leaf in _STATES.items()},
    **{f"{side}_maps": (f"{side}_attentions",) for side in SIDES},
    **{f"{side}_{name}": (f"{side}_{name}",) for side in SIDES for name in ("queries", "keys", "values")},
    "pair_weights": (),
}


def row_mask(label_mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B 1"]:
    """Rows with at least two scored positions, for what compares the positions of a row with each other."""
    return label_mask.sum(1, keepdim=True) > 1


def chunk_logp(
    label_logp: Float[Tensor, "B T"], chunk: Int[Tensor, "B T"], chunk_end: Int[Tensor, "B C"]
) -> Float[Tensor, "B C"]:
    """Log-probability of each chunk: the sum over its scored tokens, in nats; 0 where it has none."""
    return sum_by_chunk(label_logp, chunk, chunk_end.shape[1])


def chunk_tokens(chunk: Int[Tensor, "B T"], chunk_end: Int[Tensor, "B C"]) -> Int[Tensor, "B C"]:
    """Number of scored tokens of each chunk."""
    return sum_by_chunk(torch.ones_like(chunk), chunk, chunk_end.shape[1])


def chunk_boundary_logp(boundary_logp: Float[Tensor, "B T"], chunk_end: Int[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """Log-mass of the tokens that begin after a boundary, right after each chunk; of position 0 where it has none."""
    return boundary_logp.gather(1, chunk_end.clamp_min(0))


def chunk_eos_logp(eos_logp: Float[Tensor, "B T"], chunk_end: Int[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """Log-probability of the end-of-text token right after each chunk; of position 0 where it has none."""
    return eos_logp.gather(1, chunk_end.clamp_min(0))


def chunk_hidden(hidden: Float[Tensor, "B T D"], chunk_end: Int[Tensor, "B C"]) -> Float[Tensor, "B C D"]:
    """Last hidden state at the last token of each chunk; of position 0 where it has none."""
    return at_chunk_ends(hidden, chunk_end)


def chunk_projected_hidden(
    projected_hidden: Float[Tensor, "B T D"], chunk_end: Int[Tensor, "B C"]
) -> Float[Tensor, "B C D"]:
    """`chunk_hidden` of the student, mapped to the teacher's width."""
    return at_chunk_ends(projected_hidden, chunk_end)


def chunk_layers(layers: Float[Tensor, "B T L D"], chunk_end: Int[Tensor, "B C"]) -> Float[Tensor, "B C L D"]:
    """Hidden states of all layers at the last token of each chunk, the input embeddings first."""
    return at_chunk_ends(layers, chunk_end)


def chunk_qkv(qkv: Float[Tensor, "B T L D"], chunk_end: Int[Tensor, "B C"]) -> Float[Tensor, "B C L D"]:
    """Queries, keys and values of every layer at the last token of each chunk, side by side."""
    return at_chunk_ends(qkv, chunk_end)


def chunk_logits(logits: Float[Tensor, "B T V"], chunk_end: Int[Tensor, "B C"]) -> Float[Tensor, "B C V"]:
    """Logits of what follows right after each chunk; of position 0 where it has none."""
    return at_chunk_ends(logits, chunk_end)


def at_chunk_ends(values: Tensor, chunk_end: Int[Tensor, "B C"]) -> Tensor:
    """Rows of [B, T, ...] at the last token of each chunk, [B, C, ...]; of position 0 where it has none."""
    rows = torch.arange(len(values), device=values.device).unsqueeze(1)
    return values[rows, chunk_end.clamp_min(0)]


def sum_by_chunk(values: Tensor, chunk: Int[Tensor, "B T"], num_chunks: int) -> Tensor:
    """Sums of [B, T, ...] over the positions that predict each chunk's tokens, [B, C, ...]."""
    sums = values.new_zeros(values.shape[0], num_chunks + 1, *values.shape[2:])  # the last takes what is in no chunk
    index = torch.where(chunk < 0, num_chunks, chunk).long()
    index = index.view(*index.shape, *[1] * (values.ndim - 2)).expand_as(values)
    return sums.scatter_add(1, index, values)[:, :num_chunks]


def next_inputs(embeds: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    """At each position the input after it; at the last, which no mask lets through, zero."""
    return torch.cat([embeds[:, 1:], torch.zeros_like(embeds[:, :1])], 1)


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision becomes float32, so that sums over a vocabulary or a step mean something; others stay."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


DERIVED: dict[str, Callable[..., Tensor]] = {
    f.__name__: f
    for f in (
        row_mask,
        chunk_logp,
        chunk_tokens,
        chunk_boundary_logp,
        chunk_eos_logp,
        chunk_hidden,
        chunk_projected_hidden,
        chunk_layers,
        chunk_qkv,
        chunk_logits,
    )
}


def chunk_mask(student_chunk_tokens: Tensor, teacher_chunk_tokens: Tensor) -> Tensor:
    """Chunks that both sides score."""
    return (student_chunk_tokens > 0) & (teacher_chunk_tokens > 0)


BOTH_SIDES: dict[str, Callable[..., Tensor]] = {"chunk_mask": chunk_mask}


def inputs_of(name: str) -> list[str]:
    """The names a quantity is computed from; none for a leaf."""
    if name in BOTH_SIDES:
        return list(inspect.signature(BOTH_SIDES[name]).parameters)
    if name in BY_TASK:
        return list(BY_TASK[name])
    if name in SHARED_LEAVES | PAIR_LEAVES or name.endswith(STEP_MEAN):
        return []
    if is_paired(name) or name in PAIRED.keys() - _leaf_names():
        return list(PAIRED[name.rpartition(".")[2]])
    side, _, base = name.partition("_")
    if side not in SIDES or base not in DATA_LEAVES | MODEL_LEAVES | AUTOENCODER_LEAVES | DERIVED.keys():
        raise KeyError(f"no quantity is called {name!r}")
    return [f"{side}_{p}" for p in inspect.signature(DERIVED[base]).parameters] if base in DERIVED else []


def is_paired(name: str) -> bool:
    """Whether a tensor is made of pairs of layers for one loss, as in `cka.student_states`."""
    owner, _, paired = name.rpartition(".")
    return bool(owner) and paired in PAIRED


def _leaf_names() -> set[str]:
    return {f"{side}_{name}" for side in SIDES for name in MODEL_LEAVES}


def leaves_of(names: Iterable[str]) -> set[str]:
    """The leaves that a set of quantities is computed from."""
    return {name for name in with_inputs(names) if not inputs_of(name)}


def with_inputs(names: Iterable[str]) -> set[str]:
    """A set of quantities and everything on the way to their leaves."""
    names = set(names)
    further = {i for name in names for i in inputs_of(name)} - names
    return names | with_inputs(further) if further else names


class Quantities(Mapping[str, Tensor]):
    """Named tensors: the leaves as given, the others computed when first asked for."""

    def __init__(self, *leaves: Mapping[str, Tensor]):
        self._known = {name: tensor for part in leaves for name, tensor in part.items()}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            parents = [] if name in BY_TASK or is_paired(name) else inputs_of(name)
            if not parents:
                raise KeyError(f"the task did not yield {name!r}; it yields {sorted(self._known)}")
            fn = BOTH_SIDES[name] if name in BOTH_SIDES else DERIVED[name.partition("_")[2]]
            self._known[name] = fn(*(self[parent] for parent in parents))
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)
