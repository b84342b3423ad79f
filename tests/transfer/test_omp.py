"""Matching pursuit beside the plain one, a row and a step at a time with numpy's least squares."""

import numpy as np
import pytest
import torch
from numpy import ndarray

from tokenkit.config import UserError
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer import INITIALIZERS, solver
from tokenkit.transfer.mixture import Mixture, Origin
from tokenkit.transfer.plan import TransferPlan, plan_transfer
from tokenkit.transfer.rows import TensorRows
from tokenkit.transfer.solver import Atoms, Pursuit, inner_products


def plain(atoms: ndarray, row: ndarray, k: int) -> tuple[list[int], ndarray]:
    """Takes the atom most alike the rest, k times, and fits all anew."""
    taken: list[int] = []
    rest, weights = row, np.zeros(0)
    for _ in range(k):
        taken.append(int(np.abs(atoms @ rest).argmax()))
        weights = np.linalg.lstsq(atoms[taken].T, row, rcond=None)[0]
        rest = row - weights @ atoms[taken]
    return taken, weights


def tables(count: int, rows: int, width: int, *, unit: bool = True, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that lie near a subspace, as those of embeddings do: atoms, and targets of another spread."""
    generator = torch.Generator().manual_seed(seed)
    subspace = torch.randn(width // 4, width, generator=generator) / (width // 4) ** 0.5
    made = torch.randn(count + rows, width // 4, generator=generator) @ subspace
    made = made + 0.4 * torch.randn(count + rows, width, generator=generator)
    atoms = made[:count] * torch.rand(count, 1, generator=generator).add(0.5)
    return torch.nn.functional.normalize(atoms, dim=1) if unit else atoms, made[count:] * 0.1


def rest(atoms: torch.Tensor, targets: torch.Tensor, found: Pursuit) -> torch.Tensor:
    """The share of each row's length that is left."""
    fitted = torch.einsum("rk,rkd->rd", found.weights.double(), atoms.double()[found.ids])
    return (targets - fitted).norm(dim=1) / targets.double().norm(dim=1)


@pytest.mark.parametrize("gram_bytes", [1 << 30, 0], ids=["held", "as needed"])
@pytest.mark.parametrize("k", [1, 8, 32])
@pytest.mark.parametrize("unit", [True, False])
def test_equals_the_plain_one(monkeypatch: pytest.MonkeyPatch, gram_bytes: int, k: int, unit: bool) -> None:
    """The same atoms in the same order on 98 % of rows, and as much left on all."""
    monkeypatch.setattr(solver, "NARROW", 0)
    atoms, targets = tables(1500, 60, 96, unit=unit)
    whole = Atoms.of(atoms, rows=10_000, k=k, gram_bytes=gram_bytes)
    assert (whole.gram is None) == (gram_bytes == 0)
    found = whole.pursue(targets, k)
    table, left, same = atoms.double().numpy(), rest(atoms, targets, found), 0
    for row, target in enumerate(targets.double().numpy()):
        taken, weights = plain(table, target, k)
        same += taken == found.ids[row].tolist()
        assert abs(np.linalg.norm(target - weights @ table[taken]) / np.linalg.norm(target) - float(left[row])) < 1e-4
    assert same >= 0.98 * len(targets)
    assert (found.lengths == k).all()


def test_an_atom_outside_the_list_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With lists that are much too short nearly every stride is made again, and the answer is the same."""
    atoms, targets = tables(1500, 40, 96)
    wanted = Atoms.of(atoms, rows=10_000, k=24).pursue(targets, 24)
    monkeypatch.setattr(solver, "NARROW", 0)
    whole = Atoms.of(atoms, rows=10_000, k=24)
    monkeypatch.setattr(solver, "SHORTLIST", 12)
    assert torch.equal(whole.pursue(targets, 24).ids, wanted.ids)
    assert not torch.equal(whole.pursue(targets, 24, screen=24).ids, wanted.ids)


def test_rows_do_not_depend_on_those_beside_them() -> None:
    atoms, targets = tables(1200, 30, 64)
    whole = Atoms.of(atoms, rows=10_000, k=16)
    together, alone = whole.pursue(targets, 16), whole.pursue(targets[7:8], 16)
    assert torch.equal(together.ids[7:8], alone.ids)
    torch.testing.assert_close(together.weights[7:8], alone.weights)


def test_a_search_for_fewer_is_the_beginning() -> None:
    atoms, targets = tables(1200, 30, 64)
    whole = Atoms.of(atoms, rows=10_000, k=16)
    assert torch.equal(whole.pursue(targets, 16).ids[:, :5], whole.pursue(targets, 5).ids)


@pytest.mark.parametrize("gram_bytes", [1 << 30, 0], ids=["held", "as needed"])
def test_screened_leaves_hardly_more(monkeypatch: pytest.MonkeyPatch, gram_bytes: int) -> None:
    atoms, targets = tables(1500, 40, 256)
    whole = Atoms.of(atoms, rows=10_000, k=16, gram_bytes=gram_bytes)
    narrow = whole.pursue(targets, 16, screen=128)
    assert torch.equal(narrow.ids, whole.pursue(targets, 16).ids)
    monkeypatch.setattr(solver, "NARROW", 0)
    whole = Atoms.of(atoms, rows=10_000, k=16, gram_bytes=gram_bytes)
    exact, screened = (rest(atoms, targets, whole.pursue(targets, 16, screen=screen)) for screen in (None, 128))
    assert screened.mean() <= 1.02 * exact.mean()
    everything = whole.pursue(targets, 16, screen=len(atoms))
    assert torch.equal(everything.ids, whole.pursue(targets, 16).ids)


def test_equal_atoms_and_rows_that_are_atoms() -> None:
    """Twins never stand beside each other in a sum; a row that is an atom is that atom; zero rows are nothing."""
    atoms, targets = tables(300, 20, 24)
    doubled = torch.cat([atoms, atoms, atoms + 1e-7])
    found = Atoms.of(doubled, rows=10_000, k=16).pursue(torch.cat([targets, 3 * atoms[:10], torch.zeros(2, 24)]), 16)
    for row in range(20):
        first = found.ids[row, : found.lengths[row]] % 300
        assert len(set(first.tolist())) == len(first) == 16
    assert found.weights.isfinite().all()
    assert found.lengths[20:].tolist() == [1] * 10 + [0, 0]
    torch.testing.assert_close(found.weights[20:30, 0], torch.full((10,), 3.0))
    assert (found.ids[20:30, 0] % 300).tolist() == list(range(10))


def test_more_atoms_than_dimensions() -> None:
    """No more atoms than dimensions are taken, and then nothing is left."""
    atoms, targets = tables(200, 20, 12)
    found = Atoms.of(atoms, rows=10_000, k=64).pursue(targets, 64)
    assert (found.lengths <= 12).all()
    assert rest(atoms, targets, found).max() < 1e-4


def test_nearly_dependent_atoms_are_weighted_in_double() -> None:
    atoms, targets = tables(400, 10, 32)
    near = torch.nn.functional.normalize(atoms + 0.03 * atoms.roll(1, 0), dim=1)
    both = torch.cat([atoms, near])
    found = Atoms.of(both, rows=10_000, k=24).pursue(targets, 24)
    left = rest(both, targets, found)
    for row in range(10):
        chosen = both[found.ids[row, : found.lengths[row]]].double().numpy()
        target = targets[row].double().numpy()
        exact = np.linalg.lstsq(chosen.T, target, rcond=None)[0]
        assert float(left[row]) <= np.linalg.norm(target - exact @ chosen) / np.linalg.norm(target) + 1e-5


def test_tolerance_stops_at_the_first_that_is_enough() -> None:
    atoms, targets = tables(1200, 30, 64)
    whole = Atoms.of(atoms, rows=10_000, k=40)
    found = whole.pursue(targets, 40, tolerance=0.3)
    assert 1 < found.lengths.float().mean() < 40
    assert (rest(atoms, targets, found)[found.lengths < 40] <= 0.3 + 1e-4).all()
    for row in range(5):
        fewer = whole.pursue(targets[row : row + 1], int(found.lengths[row]) - 1)
        assert float(rest(atoms, targets[row : row + 1], fewer)) > 0.3


def test_inner_products_are_mirrored() -> None:
    table = tables(150, 1, 16)[0]
    for step in (1, 64, 150, 1000):
        torch.testing.assert_close(inner_products(table, step=step), table @ table.T)


def made(
    source: Tokenizer, target: Tokenizer, donor: torch.Tensor, **options: float | bool | None
) -> tuple[Mixture, TransferPlan, torch.Tensor]:
    plan = plan_transfer(source, target, source_rows=source.vocab_size)
    old = torch.randn(source.vocab_size, 9, generator=torch.Generator().manual_seed(3))
    maker = INITIALIZERS["omp"].fn(TensorRows(old), plan, TensorRows(donor), side="input", **options)
    return maker, plan, old


def test_rows_are_the_donors_sums_of_source_rows(tokenizers: dict[str, Tokenizer]) -> None:
    """Fitted to donor rows of shared tokens, by their angle or not; applied to the source rows of the same tokens."""
    source, target = tokenizers["small"], tokenizers["large"]
    donor = torch.randn(target.vocab_size, 40, generator=torch.Generator().manual_seed(4))
    donor *= torch.linspace(0.2, 2, len(donor))[:, None]
    for normalize in (True, False):
        maker, plan, old = made(source, target, donor, k=6, normalize=normalize)
        ids, sources = plan.anchors
        table = donor[torch.from_numpy(ids)].double().numpy()
        scale = np.linalg.norm(table, axis=1, keepdims=True) if normalize else np.ones((len(table), 1))
        for i in plan.free[:15].tolist():
            taken, weights = plain(table / scale, donor[i].double().numpy(), 6)
            wanted = (weights / scale[taken, 0]) @ old[torch.from_numpy(sources[taken])].double().numpy()
            np.testing.assert_allclose(maker(np.array([i]))[0].numpy(), wanted, rtol=1e-3, atol=1e-4)
            assert maker.origin[i] == Origin.INITIALIZER


def test_a_donor_that_is_the_source_in_other_dimensions_gives_that_row_back(tokenizers: dict[str, Tokenizer]) -> None:
    """Where donor rows are sums of a few shared ones, so are the new rows of the same source rows."""
    source, target = tokenizers["small"], tokenizers["large"]
    plan = plan_transfer(source, target, source_rows=source.vocab_size)
    donor = torch.randn(target.vocab_size, 64, generator=torch.Generator().manual_seed(4))
    ids, sources = (torch.from_numpy(part) for part in plan.anchors)
    free = torch.from_numpy(plan.free)
    first, second = ids[torch.arange(len(free)) % len(ids)], ids[(torch.arange(len(free)) + 1) % len(ids)]
    donor[free] = 0.7 * donor[first] - 0.4 * donor[second]
    maker, plan, old = made(source, target, donor, k=8)
    place = {int(i): int(s) for i, s in zip(ids, sources, strict=True)}
    wanted = torch.stack(
        [0.7 * old[place[int(a)]] - 0.4 * old[place[int(b)]] for a, b in zip(first, second, strict=True)]
    )
    torch.testing.assert_close(maker(plan.free), wanted, rtol=1e-3, atol=1e-3)
    assert np.diff(maker.offsets)[plan.free].max() == 2


def test_tokens_without_a_donor_row_stay_with_the_chain(tokenizers: dict[str, Tokenizer]) -> None:
    source, target = tokenizers["small"], tokenizers["large"]
    donor = torch.randn(target.vocab_size // 2, 12, generator=torch.Generator().manual_seed(4))
    donor[len(donor) - 5 :] = 0
    maker, plan, _ = made(source, target, donor, k=4)
    beyond = plan.free[plan.free >= len(donor) - 5]
    assert len(beyond)
    assert (maker.origin[beyond] != Origin.INITIALIZER).all()
    assert (maker.origin[plan.free[plan.free < len(donor) - 5]] == Origin.INITIALIZER).all()


def test_options_that_make_no_sense(tokenizers: dict[str, Tokenizer]) -> None:
    donor = torch.randn(tokenizers["large"].vocab_size, 12)
    for options in ({"k": 0}, {"screen": 0}, {"tolerance": -0.5}):
        with pytest.raises(UserError, match=rf"transfer.omp.{next(iter(options))}: .* is needed"):
            made(tokenizers["small"], tokenizers["large"], donor, **options)
