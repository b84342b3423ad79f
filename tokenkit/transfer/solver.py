"""Orthogonal matching pursuit, many rows at a time. Pati+ 1993; inner products kept as in Rubinstein+ 2008.

Greedy: the atom most alike what is left of a row is taken, the row is fitted anew to all atoms taken, and so on. As it
stands, each step looks at every atom: a product with the whole table per row and step. Where rows are narrow that is
what is done. Where they are wide, two things make it cheap.

Inner products of atoms, held if they fit, say what a step does to the likeness of all other atoms: the width of the
rows plays no part in it. And a step seldom takes an atom that was not much alike a few steps before. So `STRIDE` steps
are made among the `SHORTLIST` most alike, then all atoms are looked at for all those steps together, which reads the
inner products once instead of once per step. A row for which an atom outside its list was better is done again with
that atom in the list, until none is missed: what comes out is what looking at all atoms each time would give. A search
that is `screened` leaves out that check: it looks at all atoms only to make the next list.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import embedding_bag

STRIDE, SCREENED_STRIDE = 6, 8  # steps between two looks at all atoms
SHORTLIST = 384
NARROW = 384  # up to this width a product with the table costs less than reading inner products
GRAM_BYTES = 4 << 30  # of inner products that are held at most: those of 32,768 atoms
BATCH_BYTES = 16 << 20  # of likenesses to all atoms, or of gathered atoms, that a batch of rows may take
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
    longest: float
    """The length of the longest atom."""

    @staticmethod
    def of(table: Float[Tensor, "A D"], *, rows: int, k: int, gram_bytes: int = GRAM_BYTES) -> "Atoms":
        """With inner products held if they fit, and if so many rows with k atoms each are worth making them."""
        fits = table.shape[1] > NARROW and 4 * len(table) ** 2 <= gram_bytes
        worth = fits and rows * k >= len(table)
        longest = float(table.square().sum(1).max().sqrt())
        return Atoms(table, inner_products(table) if worth else None, longest)

    def pursue(
        self, targets: Float[Tensor, "R D"], k: int, *, screen: int | None = None, tolerance: float = 0.0
    ) -> Pursuit:
        """At most k atoms for each row; fewer where what is left of it is no longer than `tolerance` times the row,
        or lies outside the span of all atoms."""
        k, count = min(k, len(self.table)), len(self.table)
        # Narrow rows are searched whole in less time, and lists that are not checked choose badly among few dimensions.
        screen = screen if self.table.shape[1] > NARROW else None
        if screen is not None:
            stride, size = SCREENED_STRIDE, min(max(screen, k), count)
        else:
            stride, size = (STRIDE, min(SHORTLIST, count)) if self.gram is not None else (1, 1)
        check = screen is None and stride > 1 and size < count
        room = count + 3 * k * k + size * (k + (self.table.shape[1] if self.gram is None else 0))
        parts = targets.split(max(1, BATCH_BYTES // (4 * room)))
        made = [self._batch(part, _State.begun(self, part, k, size), stride, check, tolerance) for part in parts]
        return Pursuit(*(torch.cat([part.__dict__[one.name] for part in made]) for one in fields(Pursuit)))

    def _batch(self, targets: Tensor, state: "_State", stride: int, check: bool, tolerance: float) -> Pursuit:
        k = state.ids.shape[1]
        for begin in range(0, k, stride):
            steps, rows = range(begin, min(begin + stride, k)), torch.arange(len(targets), device=targets.device)
            for attempt in steps:  # each time one step more is right, so the last attempt needs no check
                _take(self, state, rows, steps)
                if self.gram is None:
                    _relist(self, state, steps.stop)
                    break
                rows = rows[_look(self, state, rows, steps, check=check and attempt != steps[-1])]
                if len(rows) == 0:
                    break
            enough = state.left[:, steps.stop - 1] <= tolerance**2 * state.squares
            if bool(((state.lengths < steps.stop) | (enough & (tolerance > 0))).all()):
                break
        return state.pursuit(self.table, tolerance)

    def products_with(self, others: Int64[Tensor, "*B N"]) -> Callable[[Tensor], Tensor]:
        """A function from ids [*B, T] to the inner products [*B, T, N] of these atoms with the others."""
        if self.gram is not None:
            flat, count = self.gram.view(-1), len(self.table)
            return lambda ids: flat.take(ids[..., :, None] * count + others[..., None, :])
        gathered = self.table[others].transpose(-1, -2)
        return lambda ids: self.table[ids] @ gathered


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
        sums, left, pivot = inverse.clone(), inverse[:, 0].clone(), torch.ones_like(squares)
        lengths = torch.zeros_like(ids[:, 0])
        return _State(targets, squares, first, listed, alike, known, ids, inverse, sums, left, pivot, lengths)

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


def _take(atoms: Atoms, state: _State, rows: Int64[Tensor, "W"], steps: range) -> None:
    """Makes these steps for these rows, each among its listed atoms; what was there of the steps is overwritten."""
    listed, likeness, known = state.listed[rows], state.alike[rows], state.known[rows]
    ids, inverse, sums, left = state.ids[rows], state.inverse[rows], state.sums[rows], state.left[rows]
    lengths, pivot, squares = state.lengths[rows].clamp_max(steps.start), state.pivot[rows], state.squares[rows]
    every, products = torch.arange(len(rows), device=rows.device), atoms.products_with(listed)
    for t in steps:
        place = likeness.abs().argmax(1)
        best, ids[:, t] = likeness[every, place], listed[every, place]
        known[:, t] = products(ids[:, t : t + 1])[:, 0]
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


def _relist(atoms: Atoms, state: _State, steps: int) -> None:
    """New lists for all rows after so many steps, by the table alone."""
    taken, size = state.ids[:, :steps], state.listed.shape[1]
    rest = state.targets - torch.bmm(state.sums[:, steps - 1 : steps, :steps], atoms.table[taken])[:, 0]
    sizes = torch.mm(rest, atoms.table.T, out=state.first).abs_()  # nobody needs the first ones any more
    state.listed[:] = sizes.argmax(1, keepdim=True) if size == 1 else sizes.topk(size, dim=1).indices
    state.alike[:] = torch.bmm(atoms.table[state.listed], rest[:, :, None])[:, :, 0]
    state.known[:, :steps] = atoms.products_with(state.listed)(taken)


def _look(atoms: Atoms, state: _State, rows: Int64[Tensor, "W"], steps: range, *, check: bool) -> Bool[Tensor, "W"]:
    """For which rows a step should have taken an atom outside the list, which now is in it; others get a new list."""
    missed = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    for place, row in enumerate(rows.tolist()):
        now = _course(atoms, state, row, steps if check else range(steps.stop - 1, steps.stop))
        sizes = now.abs()
        if check and _is_missed(atoms, state, row, steps, sizes):
            missed[place] = True
            _add(atoms, state, row, steps.start, sizes[:-1].argmax(1))
        else:
            state.listed[row] = sizes[-1].topk(state.listed.shape[1]).indices
            state.alike[row] = now[-1][state.listed[row]]
            state.known[row, : steps.stop] = atoms.products_with(state.listed[row])(state.ids[row, : steps.stop])
    return missed


def _is_missed(atoms: Atoms, state: _State, row: int, steps: range, sizes: Float[Tensor, "S A"]) -> bool:
    """Whether an atom was more alike than the one taken, after any step but the last."""
    most = sizes[:-1].amax(1)
    had = sizes[:-1].gather(1, state.ids[row, steps.start + 1 : steps.stop, None])[:, 0]
    tried = torch.arange(steps.start + 1, steps.stop, device=sizes.device) <= state.lengths[row]
    something = most > NOTHING * atoms.longest * state.squares[row].sqrt()
    return bool((tried & something & (had < (1 - TIE) * most)).any())


def _add(atoms: Atoms, state: _State, row: int, begin: int, better: Int64[Tensor, "B"]) -> None:
    """Puts atoms at the end of a row's list, in place of those least alike; what was put there before moves up."""
    better = better[: state.listed.shape[1]]
    count = len(better)
    products = atoms.products_with(better)(state.ids[row, :begin])
    fitted = state.sums[row, begin - 1, :begin] @ products if begin else 0
    for part in (state.listed[row], state.alike[row], state.known[row, :begin]):
        part[..., -2 * count : -count] = part[..., -count:].clone()
    state.listed[row, -count:], state.known[row, :begin, -count:] = better, products
    state.alike[row, -count:] = state.first[row, better] - fitted


def _course(atoms: Atoms, state: _State, row: int, steps: range) -> Float[Tensor, "S A"]:
    """The likeness of all atoms to what is left of a row, after each of the steps, by their inner products."""
    assert atoms.gram is not None
    bags = state.ids[row, : steps.stop].expand(len(steps), -1).contiguous()
    weights = state.sums[row, steps.start : steps.stop, : steps.stop].contiguous()
    fitted = embedding_bag(bags, atoms.gram, per_sample_weights=weights, mode="sum")
    return torch.sub(state.first[row], fitted, out=fitted)


def _least_squares(taken: Float[Tensor, "T D"], row: Float[Tensor, "D"]) -> Float[Tensor, "T"]:
    """Weights of rows whose sum is nearest to one row, in float64."""
    exact = taken.double()
    return torch.linalg.lstsq(exact.T, row.double()[:, None]).solution[:, 0].to(row)


def inner_products(table: Float[Tensor, "A D"], *, step: int = 2048) -> Float[Tensor, "A A"]:
    """Of all rows with all rows: half of them made, and mirrored, so many rows at a time."""
    count = len(table)
    gram = table.new_empty(count, count)
    for begin in range(0, count, step):
        end = begin + step
        gram[begin:end, begin:] = table[begin:end] @ table[begin:].T
        gram[end:, begin:end] = gram[begin:end, end:].T
    return gram
