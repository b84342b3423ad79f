"""What every loss is held to, the package's and a user's: each check says what it saw, or raises Broken."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from tokenkit.losses import Loss
from tokenkit.plugins.load import axes_of, signature_problems
from tokenkit.quantities import BY_TASK, PAIRED, STEP_MEAN, Quantities, is_paired, leaves_of

SIZES = {"B": 3, "T": 9, "V": 11, "C": 5}
LAYER_PAIRS, HEADS, STATE_CHANNELS = 2, 2, 8
PADDING = {"T": 3, "C": 2}  # positions and chunks that padding adds
BOUNDARY_TOKENS, TOP, LATENTS, LEVELS = 4, 6, 7, 8


class Broken(Exception):
    """A loss that does not do what every loss does; one line."""


@dataclass(frozen=True)
class Check:
    """What became of one check."""

    name: str
    passed: bool
    text: str


def check_loss(entry: Loss) -> list[Check]:
    """Every check on a loss with its default options, on random float64 tensors of a few rows."""
    found = []
    for name, check in CHECKS.items():
        try:
            found.append(Check(name, True, check(entry)))
        except Broken as error:
            found.append(Check(name, False, str(error)))
        except Exception as error:  # the user's own code: what it raises is the answer
            text = " ".join(str(error).split())
            found.append(Check(name, False, f"raises {type(error).__name__}: {text[:200]}"))
    return found


def example(entry: Loss, seed: int, dtype: torch.dtype = torch.float64, scale: float = 2.0) -> dict[str, Tensor]:
    """Random leaves of one microbatch; chunks of two tokens, some of which one side does not score, and an absent one.

    Both sides have the same widths, so that a student can be equal to its teacher.
    """
    generator = torch.Generator().manual_seed(seed)
    leaves: dict[str, Tensor] = {}
    for side in ("student", "teacher"):
        leaves |= {f"{side}_{name}": value.clone() for name, value in _side(generator, scale).items()}
    leaves |= _pair(generator)
    leaves["pair_weights"] = torch.full((LAYER_PAIRS,), 1 / LAYER_PAIRS, dtype=torch.float64)
    leaves["space_after"] = torch.rand(SIZES["B"], SIZES["C"], generator=generator) < 0.7
    leaves |= {name: leaves[name.rpartition(".")[2]] for name in _axes(entry) if is_paired(name)}
    for name, axes in _axes(entry).items():
        if is_paired(name):
            continue
        for leaf in sorted({name} if name in BY_TASK else leaves_of([name]) - leaves.keys()):
            if leaf != name:
                raise Broken(f"no example of the tensor {leaf!r} is known here")
            if leaf not in leaves and not leaf.endswith(STEP_MEAN):
                leaves[leaf] = _drawn(axes, generator)
    leaves |= entry.step_mean_of([Quantities(leaves)], defaults(entry))
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in leaves.items()}


def _side(generator: torch.Generator, scale: float) -> dict[str, Tensor]:
    rows, length, vocabulary, chunks = (SIZES[axis] for axis in "BTVC")
    logits = torch.randn(rows, length, vocabulary, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(0, vocabulary, (rows, length), generator=generator)
    # the chunk of the token that a position predicts; the last position predicts nothing
    chunk = torch.arange(length).div(2, rounding_mode="floor").repeat(rows, 1)
    scored = (torch.rand(rows, chunks, generator=generator) < 0.8).gather(1, chunk)
    scored[:, -1] = scored[1, :2] = False  # what does not count stands behind, and before what does
    labels, chunk = labels.masked_fill(~scored, -1), chunk.masked_fill(~scored, -1)
    end = (2 * torch.arange(chunks) + 2).repeat(rows, 1)
    end[:, -1] = -1
    logp = logits.log_softmax(-1)
    label_logp = logp.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1).masked_fill(~scored, 0.0)
    top, ids = logp.sort(-1, descending=True)
    token_mask = torch.arange(length).expand(rows, -1) < length - 1
    states = torch.randn(rows, length, LAYER_PAIRS, STATE_CHANNELS, generator=generator, dtype=torch.float64)
    maps = torch.randn(rows, LAYER_PAIRS, HEADS, length, length, generator=generator, dtype=torch.float64)
    maps = maps.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    return {
        **dict.fromkeys((name.partition("_")[2] for name in PAIRED if name.endswith("states")), states),
        **dict.fromkeys(("queries", "keys", "values"), states),
        "maps": maps,
        "entropy": -(logp.exp() * logp).sum(-1),
        "logits": logits,
        "hidden": logits,
        "embeds": logits,
        "layers": torch.stack([logits, -logits], 2),
        "qkv": torch.stack([-logits, logits], 2),
        "label_logp": label_logp,
        "eos_logp": logp[..., 0],
        "boundary_logp": logp[..., :BOUNDARY_TOKENS].logsumexp(-1),
        "inputs": labels.clamp_min(0),
        "top_logp": top[..., :TOP],
        "top_ids": ids[..., :TOP],
        "tail_logp": top[..., TOP:].logsumexp(-1),
        "labels": labels,
        "label_mask": scored,
        "token_mask": token_mask,
        "chunk": chunk,
        "chunk_end": end,
        "byte_labels": labels,
        "byte_logits": logits,
        "latents": 4 * torch.randn(rows, LATENTS, generator=generator, dtype=torch.float64),
        "cells": 8 * torch.rand(rows, LATENTS, generator=generator, dtype=torch.float64) - 0.5,
        "level_shares": 2 * torch.rand(LATENTS, LEVELS, generator=generator, dtype=torch.float64),
    }


def _pair(generator: torch.Generator) -> dict[str, Tensor]:
    """Tables over two vocabularies of one size; not every id has a counterpart."""
    vocabulary = SIZES["V"]
    there = torch.randperm(vocabulary, generator=generator)
    pairs = torch.stack([torch.arange(vocabulary - 3), there[: vocabulary - 3]], 1)
    weights = torch.rand(vocabulary, 2, generator=generator, dtype=torch.float64)
    ids = torch.stack([there, there.roll(1)], 1)
    ids[0, 1] = -1
    weights[0, 1] = 0
    return {
        **dict.fromkeys(("exact_pairs", "mined_pairs", "unbiased_pairs"), pairs),
        "mined_ids": torch.where(torch.arange(vocabulary) < vocabulary - 1, there, -1),
        "projection_ids": ids,
        "projection_weights": weights / weights.sum(1, keepdim=True),
    }


def one_vocabulary() -> dict[str, Tensor]:
    """The tables of a tokenizer and itself."""
    ids = torch.arange(SIZES["V"])
    pairs = torch.stack([ids, ids], 1)
    weights = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(len(ids), 1)
    tables = {"mined_ids": ids, "projection_ids": pairs, "projection_weights": weights}
    return {**dict.fromkeys(("exact_pairs", "mined_pairs", "unbiased_pairs"), pairs), **tables}


def _drawn(axes: list[str], generator: torch.Generator) -> Tensor:
    sizes = {**SIZES, "S": SIZES["T"], "W": SIZES["V"]}
    shape = [sizes.get(axis, int(axis) if axis.isdigit() else 6) for axis in axes]
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _axes(entry: Loss) -> dict[str, list[str]]:
    """Tensor → its axes, of those that the loss and its units ask for themselves."""
    found: dict[str, list[str]] = {}
    for fn, parameters in ((entry.fn, entry.tensors), (entry.units, entry.unit_tensors)):
        if fn is None:
            found |= {name: ["B", {"token": "T", "chunk": "C", "row": "1"}[entry.per]] for name in parameters}
            continue
        signature_ = inspect.signature(fn).parameters
        for parameter, name in zip(parameters, entry.named(parameters, defaults(entry))):
            found[name] = axes_of(signature_[parameter].annotation) or []
    return found


def side_of(name: str) -> str:
    """The side of a tensor, of one that is made for one loss too."""
    return name.rpartition(".")[2].partition("_")[0]


def defaults(entry: Loss) -> dict[str, object]:
    """The options of a loss when a run file names none."""
    return {name: parameter.default for name, parameter in entry.options.items()}


def _direct(entry: Loss, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that the loss and its units ask for themselves, cut off from what they are computed from."""
    quantities = Quantities(leaves)
    return {name: quantities[name].detach().clone() for name in _axes(entry)}


def _masked(entry: Loss, tensors: Mapping[str, Tensor]) -> Tensor:
    """What each unit adds to the sum; 0 where it does not count."""
    weight = entry.units_of(tensors, defaults(entry)).weight
    return torch.where(weight > 0, entry.values(tensors, defaults(entry)), 0.0) * weight


def _student_floats(entry: Loss, tensors: Mapping[str, Tensor]) -> list[str]:
    names = entry.named(entry.tensors, defaults(entry))
    return [name for name in names if side_of(name) == "student" and tensors[name].is_floating_point()]


def _gradients(entry: Loss, tensors: dict[str, Tensor], names: list[str]) -> list[Tensor]:
    for name in names:
        tensors[name].requires_grad_()
    found = torch.autograd.grad(_masked(entry, tensors).sum(), [tensors[n] for n in names], allow_unused=True)
    return [g for g in found if g is not None]


def signature(entry: Loss) -> str:
    """Tensors exist and have shapes, options have types and defaults, a sentence says what comes out."""
    for problem in signature_problems(entry):
        raise Broken(problem)
    if not entry.fn.__doc__:
        raise Broken("no docstring; its first line says what comes out, in which unit")
    options = ", ".join(f"{name}={value!r}" for name, value in defaults(entry).items())
    return f"{', '.join(entry.tensors)}; {options or 'no options'}"


def one_value_per_unit(entry: Loss) -> str:
    """The shape of the mask, the type of the inputs, no NaN or infinity; the inputs stay as they were."""
    tensors = _direct(entry, example(entry, 0))
    for parameter, name in zip(entry.tensors, entry.named(entry.tensors, defaults(entry))):
        annotation = inspect.signature(entry.fn).parameters[parameter].annotation
        if not isinstance(tensors[name], annotation):
            shape = f"{str(tensors[name].dtype).removeprefix('torch.')} with {tensors[name].ndim} axes"
            raise Broken(f"{name} is {shape}, where the signature says {annotation.__name__}")
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    mask, values = entry.mask(tensors, defaults(entry)), entry.values(tensors, defaults(entry))
    if values.shape != mask.shape:
        what = "one number" if values.ndim == 0 else f"shape {list(values.shape)}"
        raise Broken(f"returns {what} for units of shape {list(mask.shape)}; return one value per {entry.per}, no mean")
    if values.dtype != torch.float64:
        raise Broken(f"returns {values.dtype} for float64 tensors; keep the type of the inputs")
    if not torch.isfinite(values).all():
        raise Broken("a value is NaN or infinite; mask the inputs of units that do not count")
    changed = [name for name, tensor in tensors.items() if not torch.equal(tensor, before[name])]
    if changed:
        raise Broken(f"changes {changed[0]} in place; work on a copy")
    return f"{list(values.shape)}, finite, {int(mask.sum())} of {mask.numel()} units count"


def gradient(entry: Loss) -> str:
    """The gradient of every student tensor against finite differences, in float64."""
    tensors = _direct(entry, example(entry, 1))
    names = _student_floats(entry, tensors)
    inputs = [tensors[name].requires_grad_() for name in names]

    def total(*values: Tensor) -> Tensor:
        return _masked(entry, {**tensors, **dict(zip(names, values))}).sum()

    if not names or not total(*inputs).requires_grad:
        raise Broken("no student tensor gets a gradient; nothing would be learnt")
    try:
        torch.autograd.gradcheck(total, inputs, fast_mode=True)
    except GradcheckError as error:
        wrong = " ".join(str(error).split())[:90]
        raise Broken(f"the gradient is not that of the value (a detach counts too): {wrong}") from None
    return f"equals finite differences for {', '.join(names)}"


def masked_units(entry: Loss) -> str:
    """Other tensors where nothing counts leave the sum as it is, and get no gradient there."""
    tensors, others = _direct(entry, example(entry, 2)), _direct(entry, example(entry, 3))
    quantities = Quantities(example(entry, 2))
    mask = entry.mask(quantities, defaults(entry))
    chunks = quantities["chunk_mask"]
    counted = {"T": quantities["student_label_mask"], "S": quantities["teacher_label_mask"]}
    counted["C"] = chunks | mask if mask.shape == chunks.shape else chunks
    counted["T"] = counted["T"] | mask if mask.shape == counted["T"].shape else counted["T"]
    if "student_token_mask" in entry.tensors:  # what is read and not learnt may be looked at
        counted["T"] = counted["T"] | quantities["student_token_mask"]
    expected = _masked(entry, tensors).sum()
    replaced, dead = dict(tensors), {}
    for name, axes in _axes(entry).items():
        tensor = tensors[name]
        if tensor.is_floating_point() and axes[:1] == ["B"] and axes[1:2] in (["T"], ["S"], ["C"]):
            dead[name] = ~counted[axes[1]].view(*tensor.shape[:2], *[1] * (tensor.ndim - 2)).expand(tensor.shape)
            replaced[name] = torch.where(dead[name], others[name] - 1, tensor)
    if not torch.allclose(_masked(entry, replaced).sum(), expected, rtol=1e-12, atol=1e-12):
        raise Broken("the sum depends on positions or chunks that do not count; mask the inputs, not only the result")
    names = [name for name in _student_floats(entry, tensors) if name in dead]
    for name in names:
        for found in _gradients(entry, dict(tensors), [name]):
            if not torch.isfinite(found).all() or found[dead[name]].abs().max() > 0:
                raise Broken(f"{name} gets a gradient where nothing counts")
    return f"{', '.join(names) or 'no tensor'}: other values where nothing counts, the same sum"


def nothing_counts(entry: Loss) -> str:
    """A row without a scored position gives 0 and a gradient of 0, never NaN."""
    leaves = example(entry, 4)
    for side in ("student", "teacher"):
        leaves[f"{side}_chunk"] = torch.full_like(leaves[f"{side}_chunk"], -1)
        leaves[f"{side}_chunk_end"] = torch.full_like(leaves[f"{side}_chunk_end"], -1)
        leaves[f"{side}_label_mask"] = torch.zeros_like(leaves[f"{side}_label_mask"])
        for labels in (f"{side}_labels", f"{side}_byte_labels"):
            leaves[labels] = torch.full_like(leaves[labels], -1)
        leaves[f"{side}_label_logp"] = torch.zeros_like(leaves[f"{side}_label_logp"])
    tensors = _direct(entry, leaves)
    if _masked(entry, tensors).sum() != 0:
        raise Broken("is not 0 where no position and no chunk counts")
    for found in _gradients(entry, tensors, _student_floats(entry, tensors)):
        if not torch.isfinite(found).all() or found.abs().max() > 0:
            raise Broken("has a gradient (or NaN) where no position and no chunk counts")
    return "0, with a gradient of 0"


def batch_order(entry: Loss) -> str:
    """A row does not see the batch: other order or alone, the same values."""
    leaves = example(entry, 5)
    values = _masked(entry, Quantities(leaves))
    for rows in (torch.tensor([2, 0, 1]), torch.tensor([1])):
        part = {name: t[rows] if t.shape[:1] == (SIZES["B"],) else t for name, t in leaves.items()}
        if not torch.allclose(_masked(entry, Quantities(part)), values[rows], rtol=1e-10, atol=1e-12):
            raise Broken("a row's values depend on the other rows; no mean, norm or sort over the batch")
    return "rows in another order, or alone: the same values"


def padding(entry: Loss) -> str:
    """More padding leaves every value as it is and adds no unit."""
    leaves = example(entry, 6)
    tensors = Quantities(leaves)
    longer = Quantities({name: _padded(_axes(entry).get(name, []), name, tensor) for name, tensor in leaves.items()})
    values, mask = _masked(entry, tensors), entry.mask(tensors, defaults(entry))
    wide, wide_mask = _masked(entry, longer), entry.mask(longer, defaults(entry))
    if wide_mask.sum() != mask.sum():
        raise Broken(f"{int(mask.sum())} units count, and {int(wide_mask.sum())} with more padding")
    if not torch.allclose(wide[wide_mask], values[mask], rtol=1e-10, atol=1e-12):
        raise Broken("its values change with more padding behind a row; no mean or norm over positions or chunks")
    return f"{PADDING['T']} positions and {PADDING['C']} chunks of padding: the same values"


def _padded(axes: list[str], name: str, tensor: Tensor) -> Tensor:
    axis = "C" if name.endswith("_chunk_end") or axes[1:2] == ["C"] else "T"
    if tensor.shape[:1] != (SIZES["B"],) or not (set(axes[1:]) & {axis, "S", "T2"} or not axes):
        return tensor  # neither positions nor chunks
    places = [i for i, name in enumerate(axes) if i and name in (axis, "S", "T2")] if axes else [1]
    for place in places:
        shape = [PADDING[axis] if i == place else size for i, size in enumerate(tensor.shape)]
        empty = False if tensor.dtype == torch.bool else -1
        tensor = torch.cat([tensor, torch.full(shape, empty, dtype=tensor.dtype)], place)
    return tensor


def equal_sides(entry: Loss) -> str:
    """Only told: what comes out when the student is its teacher."""
    leaves = {name: t for name, t in example(entry, 7).items() if side_of(name) == "teacher"}
    leaves |= {name.replace("teacher_", "student_"): t.clone() for name, t in leaves.items()}
    own = {name: t for name, t in example(entry, 7).items() if name not in leaves} | one_vocabulary()
    values = _masked(entry, Quantities(own, leaves))
    low, high = values.min().item(), values.max().item()
    return "0" if max(abs(low), abs(high)) < 1e-9 else f"between {low:.3g} and {high:.3g} (not a divergence)"


def half_precision(entry: Loss) -> str:
    """bfloat16 and float16 tensors, and very sure models: values and gradients stay finite."""
    for dtype, scale in ((torch.bfloat16, 2.0), (torch.float16, 2.0), (torch.float32, 60.0)):
        tensors = _direct(entry, example(entry, 8, dtype, scale))
        if not torch.isfinite(_masked(entry, tensors)).all():
            raise Broken(f"a value is NaN or infinite in {dtype} with logits of ±{scale:.0f}")
        for found in _gradients(entry, tensors, _student_floats(entry, tensors)):
            if not torch.isfinite(found).all():
                raise Broken(f"a gradient is NaN or infinite in {dtype} with logits of ±{scale:.0f}")
    return "finite in bfloat16 and float16, and in float32 with logits of ±60"


CHECKS: dict[str, Callable[[Loss], str]] = {
    "signature": signature,
    "one value per unit": one_value_per_unit,
    "gradient": gradient,
    "masked units": masked_units,
    "nothing counts": nothing_counts,
    "batch order": batch_order,
    "padding": padding,
    "student = teacher": equal_sides,
    "bfloat16": half_precision,
}
