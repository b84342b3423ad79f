"""A model beside the one that it was made of: whether kept rows are the same, and all that is no row."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from numpy import ndarray
from torch import Tensor

from tokenkit.align.doctor_facts import Finding, Number
from tokenkit.eval.audit_facts import Part, examples, flagged
from tokenkit.eval.row_facts import IdKinds
from tokenkit.transfer.mixture import ranges
from tokenkit.transfer.plan import Kind, Side, TransferPlan
from tokenkit.transfer.rows import Rows, block_rows
from tokenkit.transfer.shards import DTYPES, Checkpoint, Entry

PART_BYTES = 64 << 20
MOVED = 0.05  # relative length of a change from which on a row is told as moved


@dataclass(frozen=True, eq=False)
class Drift:
    """How far the rows of some ids moved, relative to the length that they had."""

    ids: ndarray
    distance: Float64[ndarray, "N"]


def row_drift(rows: Rows, before: Rows, plan: TransferPlan, side: Side) -> Drift:
    """Of tokens that were copied, or stand for a special one, from one source row each."""
    single = np.isin(plan.kinds, (Kind.COPIED, Kind.SPECIAL)) & (plan.lengths == 1)
    ids = np.flatnonzero(single)
    ids = ids[ids < rows.shape[0]]
    sources = plan.side(side)[ranges(plan.offsets[:-1][ids], plan.lengths[ids])].astype(np.int64)
    distance = np.empty(len(ids))
    step = block_rows(rows.shape[1])
    for begin in range(0, len(ids), step):
        part = slice(begin, begin + step)
        new, old = rows.gather(ids[part]).cpu().double(), before.gather(sources[part]).cpu().double()
        length = old.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        distance[part] = ((new - old).norm(dim=1) / length).numpy()
    return Drift(ids, distance)


def audit_drift(matrix: str, drift: Drift, kinds: IdKinds, dtype: torch.dtype) -> Part:
    """Rows that should be those of the reference."""
    topic = f"{matrix}: kept rows"
    rounding = 2 * float(torch.finfo(dtype).eps)  # what an export in that type does to a row
    moved = drift.distance > max(rounding, 1e-7)
    rows = flagged(topic, matrix, kinds, drift.ids[moved], drift.distance[moved])
    largest = float(drift.distance.max(initial=0))
    middle = float(np.median(drift.distance)) if len(drift.ids) else 0.0
    numbers: dict[str, Number] = {
        "kept": len(drift.ids),
        "equal": int((drift.distance == 0).sum()),
        "moved": int(moved.sum()),
        "median": middle,
        "largest": largest,
        "far": int((drift.distance > MOVED).sum()),
    }
    if not moved.any():
        sentence = f"The {len(drift.ids):,} tokens that the reference has too have its rows."
        return Part((Finding(topic, "ok", sentence, numbers),))
    sentence = (
        f"{int(moved.sum()):,} of {len(drift.ids):,} tokens that the reference has too have other rows; by "
        f"{100 * middle:.2g} % of their length in the median, {100 * largest:.3g} % at most"
        f"{examples(rows)}."
    )
    return Part((Finding(topic, "note", sentence, numbers),), rows)


def audit_body(own: Checkpoint, before: Checkpoint) -> Part:
    """Whether every tensor that is no embedding, output matrix or bias of one is what it was."""
    skip = {
        name
        for tables in (own.tables, before.tables)
        for name in (tables.input, tables.head, tables.bias, *tables.twins)
    }
    ours = {name: entry for name, entry in own.entries.items() if name not in skip}
    theirs = {name: entry for name, entry in before.entries.items() if name not in skip}
    apart = sorted(ours.keys() ^ theirs.keys())
    changed = dict(_changes(ours, theirs))
    worst = max(changed, key=lambda name: changed[name], default=None)
    numbers: dict[str, Number] = {
        "tensors": len(ours),
        "changed": len(changed),
        "missing_or_added": len(apart),
        "largest": max(changed.values(), default=0.0),
    }
    if apart:
        sentence = f"{len(apart)} tensors are in one of the two models alone, such as {apart[0]}."
        return Part((Finding("body", "warning", sentence, numbers),))
    if worst is None:
        sentence = f"All {len(ours)} tensors of the body are those of the reference."
        return Part((Finding("body", "ok", sentence, numbers),))
    sentence = (
        f"{len(changed)} of {len(ours)} tensors of the body are not those of the reference: the model was trained "
        f"since, or written in another type; {worst} moved by {100 * changed[worst]:.2g} % of its length."
    )
    return Part((Finding("body", "note", sentence, numbers),))


def _changes(ours: Mapping[str, Entry], theirs: Mapping[str, Entry]) -> Iterator[tuple[str, float]]:
    """Relative length of the difference of each tensor that differs; infinite where the shape does."""
    for name in sorted(ours.keys() & theirs.keys()):
        a, b = ours[name], theirs[name]
        if a.shape != b.shape or a.dtype not in DTYPES or b.dtype not in DTYPES:
            if a.shape != b.shape or a.dtype != b.dtype or any(not torch.equal(x, y) for x, y in _parts(a, b, "U8")):
                yield name, float("inf")
            continue
        squares = [(float((x - y).square().sum()), float(y.square().sum())) for x, y in _parts(a, b)]
        difference, length = (sum(one) for one in zip(*squares)) if squares else (0.0, 0.0)
        if difference:
            yield name, (difference / max(length, 1e-300)) ** 0.5


def _parts(a: Entry, b: Entry, dtype: str | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Both tensors in parts of some megabytes, in double precision, or as bytes."""
    per = 1 if dtype else DTYPES[a.dtype].itemsize
    count = a.num_bytes // per
    step = PART_BYTES // 8
    for begin in range(0, count, step):
        size = min(step, count - begin)
        yield _values(a, begin, size, dtype), _values(b, begin, size, dtype)


def _values(entry: Entry, begin: int, size: int, dtype: str | None) -> Tensor:
    kind = torch.uint8 if dtype else DTYPES[entry.dtype]
    raw = np.fromfile(entry.path, np.uint8, size * kind.itemsize, offset=entry.begin + begin * kind.itemsize)
    values = torch.from_numpy(raw).view(kind)
    return values if dtype else values.double()
