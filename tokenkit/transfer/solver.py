"""Orthogonal matching pursuit, many rows at a time. Pati+ 1993; inner products kept as in Rubinstein+ 2008.

Greedy: the atom most alike what is left of a row is taken, the row is fitted anew to all atoms taken, and so on. As it
stands, each step looks at every atom: a product with the whole table per row and step. Two things make that cheap.

Inner products of atoms, held if they fit, say what a step does to the likeness of all other atoms: the width of the
rows plays no part in it. And a step seldom takes an atom that was not much alike a few steps before. So `STRIDE` steps
are made among the `SHORTLIST` most alike, then all atoms are looked at for all those steps together, which reads the
inner products once instead of once per step. A row for which an atom outside its list was better is done again with
that atom in the list, until none is missed: what comes out is what looking at all atoms each time would give. A search
that is `screened` leaves out that check: it looks at all atoms only to make the next list.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import embedding_bag

STRIDE = 8  # steps between two looks at all atoms
SHORTLIST = 512
GRAM_BYTES = 4 << 30  # of inner products that are held at most: those of 32,768 atoms
BATCH_BYTES = 32 << 20  # of likenesses to all atoms, or of gathered atoms, that a batch of rows may take
DEPENDENT = 1e-5  # an atom with less of its square outside the span of those taken adds nothing in float32
DELICATE = 1e-2  # below this share the weights are computed again in float64
TIE = 1e-5  # atoms whose likeness differs by a smaller share than this are equally good
NOTHING = 1e-6  # likeness, as a share of the lengths of atom and row, that is rounding


@dataclass(frozen=True, eq=False)
class Pursuit:
    """A sparse sum of atoms per row: `weights[r, :lengths[r]]` of `ids[r, :lengths[r]]`; zero weights behind."""

    ids: Int64[Tensor, "R K"]
    weights: Float[Tensor, "R K"]
    lengths: Int64[Tensor, "R"]


@dataclass(frozen=True, eq=False)
class Atoms:
    """What rows are made of. `gram`: the inner products of all of them, or None where they are made as needed."""

    table: Float[Tensor, "A D"]
    gram: Float[Tensor, "A A"] | None
    longest: float = 1.0

    @staticmethod
    def of(table: Float[Tensor, "A D"], *, rows: int, k: int, gram_bytes: int = GRAM_BYTES) -> "Atoms":
        """With inner products held if they fit, and if so many rows with k atoms each are worth making them."""
        worth = rows * k >= len(table) and 4 * len(table) ** 2 <= gram_bytes
        longest = float(table.square().sum(1).max().sqrt())
        return Atoms(table, inner_products(table) if worth else None, longest)

    def pursue(
        self, targets: Float[Tensor, "R D"], k: int, *, screen: int | None = None, tolerance: float = 0.0
    ) -> Pursuit:
        """At most k atoms for each row; fewer where what is left of it is no longer than `tolerance` times the row,
        or lies outside the span of all atoms."""
        k = min(k, len(self.table))
        size = min(len(self.table), SHORTLIST if screen is None else max(screen, k))
        parts = [self._batch(part, k, size, screen is None, tolerance) for part in targets.split(self._rows(size))]
        return Pursuit(*(torch.cat([part.__dict__[one.name] for part in parts]) for one in fields(Pursuit)))

    def _rows(self, size: int) -> int:
        """How many rows are worked on together."""
        count, width = self.table.shape
        return max(1, BATCH_BYTES // (4 * (count if self.gram is not None else STRIDE * count + size * width)))

    def _batch(self, targets: Tensor, k: int, size: int, exact: bool, tolerance: float) -> Pursuit:
        state = _State.begun(self, targets, k, size)
        for begin in range(0, k, STRIDE):
            steps, rows = range(begin, min(begin + STRIDE, k)), torch.arange(len(targets), device=targets.device)
            for attempt in range(len(steps)):  # each time one step more is right, so the last needs no check
                _take(self, state, rows, steps)
                missed = _look(self, state, rows, steps, attempt if exact and attempt + 1 < len(steps) else None)
                rows = rows[missed]
                if len(rows) == 0:
                    break
            if bool((state.lengths < steps.stop).all()):
                break
        return state.pursuit(self.table, tolerance)

    def products(self, ids: Int64[Tensor, "*B T"], others: Int64[Tensor, "*B N"]) -> Float[Tensor, "*B T N"]:
        """Inner products of atoms with other atoms."""
        if self.gram is not None:
            return self.gram[ids[..., :, None], others[..., None, :]]
        return self.table[ids] @ self.table[others].transpose(-1, -2)


@dataclass(frozen=True, eq=False)
class _State:
    """Rows on their way. With Q the orthonormal vectors made of the atoms taken, one after the other: `inverse` is each
    vector of Q in terms of atoms, `sums` the fitted row after each step in terms of atoms, `left` its squared rest."""

    targets: Float[Tensor, "R D"]
    squares: Float[Tensor, "R"]
    first: Float[Tensor, "R A"]  # likeness of all atoms to the row
    listed: Int64[Tensor, "R N"]
    alike: Float[Tensor, "R N"]  # likeness of the listed atoms to what was left when the list was made
    known: Float[Tensor, "R K N"]  # inner products of the atoms taken with those listed
    ids: Int64[Tensor, "R K"]
    inverse: Float[Tensor, "R K K"]
    sums: Float[Tensor, "R K K"]
    left: Float[Tensor, "R K"]
    pivot: Float[Tensor, "R"]  # the smallest share of its square that an atom taken had outside the span of the others
    lengths: Int64[Tensor, "R"]

    @staticmethod
    def begun(atoms: Atoms, targets: Tensor, k: int, size: int) -> "_State":
        first, rows = targets @ atoms.table.T, len(targets)
        listed = first.abs().topk(size, dim=1).indices
        ids = torch.zeros(rows, k, dtype=torch.int64, device=targets.device)
        inverse, squares = targets.new_zeros(rows, k, k), targets.square().sum(1)
        alike, known = first.gather(1, listed), targets.new_empty(rows, k, size)
        more = ids, inverse, inverse.clone(), inverse[:, 0].clone(), torch.ones_like(squares), torch.zeros_like(ids[:, 0])
        return _State(targets, squares, first, listed, alike, known, *more)

    def pursuit(self, table: Tensor, tolerance: float) -> Pursuit:
        """What was taken until little enough is left: the first atoms are those of a search for fewer."""
        k = self.ids.shape[1]
        enough = (self.left <= tolerance**2 * self.squares[:, None]) & (tolerance > 0)
        wanted = torch.where(enough.any(1), enough.int().argmax(1) + 1, k)
        lengths = torch.minimum(self.lengths, wanted)
        last = (lengths - 1).clamp_min(0)
        weights = self.sums.gather(1, last[:, None, None].expand(-1, 1, k))[:, 0]
        weights = weights * (torch.arange(k, device=last.device) < lengths[:, None])
        for row in ((self.pivot < DELICATE) & (lengths > 0)).nonzero()[:, 0].tolist():
            taken = self.ids[row, : int(lengths[row])]
            weights[row, : len(taken)] = _least_squares(table[taken], self.targets[row])
        return Pursuit(self.ids, weights, lengths)


def _take(atoms: Atoms, state: _State, rows: Int64[Tensor, "S"], steps: range) -> None:
    """Makes these steps for these rows, each among its listed atoms; what was there of the steps is overwritten."""
    listed, likeness, known = state.listed[rows], state.alike[rows], state.known[rows]
    ids, inverse, sums, left = state.ids[rows], state.inverse[rows], state.sums[rows], state.left[rows]
    lengths, pivot, squares = state.lengths[rows].clamp_max(steps.start), state.pivot[rows], state.squares[rows]
    every = torch.arange(len(rows), device=rows.device)
    for t in steps:
        place = likeness.abs().argmax(1)
        best, ids[:, t] = likeness[every, place], listed[every, place]
        known[:, t] = atoms.products(ids[:, t : t + 1], listed)[:, 0]
        square = known[every, t, place]
        inside = torch.bmm(inverse[:, :t, :t], known[every, :t, place][:, :, None])
        outside = (square - inside.square().sum((1, 2))).clamp_min(0)
        going = (lengths == t) & (outside > DEPENDENT * square) & (best.abs() > NOTHING * (square * squares).sqrt())
        scale = torch.where(going, outside.rsqrt(), 0)
        inverse[:, t, :t] = torch.bmm(inside.transpose(1, 2), inverse[:, :t, :t])[:, 0] * -scale[:, None]
        inverse[:, t, t] = scale
        along = best * scale
        sums[:, t] = sums[:, t - 1] * (t > 0) + along[:, None] * inverse[:, t]
        left[:, t] = (squares if t == 0 else left[:, t - 1]) - along.square()
        likeness -= along[:, None] * torch.bmm(inverse[:, t : t + 1, : t + 1], known[:, : t + 1])[:, 0]
        lengths = lengths + going
        pivot = torch.where(going, torch.minimum(pivot, outside / square), pivot)
    made = {"ids": ids, "inverse": inverse, "sums": sums, "left": left, "lengths": lengths, "pivot": pivot}
    for name, values in made.items():
        state.__dict__[name][rows] = values


def _look(atoms: Atoms, state: _State, rows: Int64[Tensor, "S"], steps: range, attempt: int | None) -> Bool[Tensor, "S"]:
    """For which rows a step should have taken an atom outside the list, which now is in it; others get a new list.
    No attempt: nothing is checked."""
    missed = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    seen = range(steps.stop - 1 if attempt is None else steps.start, steps.stop)
    for place, now in enumerate(_courses(atoms, state, rows, seen)):
        row, sizes = int(rows[place]), now.abs()
        if attempt is not None and _is_missed(atoms, state, row, steps, sizes):
            missed[place] = True
            _add(atoms, state, row, steps.start, sizes[:-1].argmax(1), attempt)
        else:
            state.listed[row] = sizes[-1].topk(state.listed.shape[1]).indices
            state.alike[row] = now[-1][state.listed[row]]
            state.known[row, : steps.stop] = atoms.products(state.ids[row, : steps.stop], state.listed[row])
    return missed


def _is_missed(atoms: Atoms, state: _State, row: int, steps: range, sizes: Float[Tensor, "S A"]) -> bool:
    """Whether an atom was more alike than the one taken after any step but the last."""
    most = sizes[:-1].amax(1)
    had = sizes[:-1].gather(1, state.ids[row, steps.start + 1 : steps.stop, None])[:, 0]
    tried = torch.arange(steps.start + 1, steps.stop, device=sizes.device) <= state.lengths[row]
    something = most > NOTHING * atoms.longest * state.squares[row].sqrt()
    return bool((tried & something & (had < (1 - TIE) * most)).any())


def _add(atoms: Atoms, state: _State, row: int, begin: int, better: Int64[Tensor, "B"], attempt: int) -> None:
    """Puts atoms into a row's list in place of those least alike, which are its last."""
    end = state.listed.shape[1] - attempt * len(better)
    where = slice(max(end - len(better), 0), max(end, 0))
    better = better[: where.stop - where.start]
    products = atoms.products(state.ids[row, :begin], better)
    state.listed[row, where], state.known[row, :begin, where] = better, products
    fitted = state.sums[row, begin - 1, :begin] @ products if begin else 0
    state.alike[row, where] = state.first[row, better] - fitted


def _courses(atoms: Atoms, state: _State, rows: Int64[Tensor, "R"], steps: range) -> Iterator[Float[Tensor, "S A"]]:
    """The likeness of all atoms to what is left of each row, after each of the steps."""
    for row in rows.tolist():
        taken, sums = state.ids[row, : steps.stop], state.sums[row, steps.start : steps.stop, : steps.stop]
        if atoms.gram is not None:
            same = taken.expand(len(steps), -1).contiguous()
            fitted = embedding_bag(same, atoms.gram, per_sample_weights=sums.contiguous(), mode="sum")
            yield torch.sub(state.first[row], fitted, out=fitted)
        else:
            yield torch.mm(state.targets[row] - sums @ atoms.table[taken], atoms.table.T)


def _least_squares(taken: Float[Tensor, "T D"], row: Float[Tensor, "D"]) -> Float[Tensor, "T"]:
    """Weights of rows whose sum is nearest to one row, in float64."""
    exact = taken.double()
    return torch.linalg.lstsq(exact.T, row.double()[:, None]).solution[:, 0].to(row)


def inner_products(table: Float[Tensor, "A D"]) -> Float[Tensor, "A A"]:
    """Of all rows with all rows: half of them made, and mirrored."""
    count, step = len(table), 2048
    gram = table.new_empty(count, count)
    for begin in range(0, count, step):
        end = begin + step
        gram[begin:end, begin:] = table[begin:end] @ table[begin:].T
        gram[end:, begin:end] = gram[begin:end, end:].T
    return gram
