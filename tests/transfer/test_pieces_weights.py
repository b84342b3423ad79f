"""Initialisers that need nothing but the source: zeros, normal draws, and pieces weighted from one edge."""

import itertools

import numpy as np
import pytest
import torch

from tokenkit.config import UserError
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer import INITIALIZERS
from tokenkit.transfer.mixture import Mixture, Origin, normal_draw
from tokenkit.transfer.normal import covariance_root
from tokenkit.transfer.plan import Side, TransferPlan, plan_transfer
from tokenkit.transfer.rows import TensorRows

SIDES = pytest.mark.parametrize("side", ["input", "head"])


@pytest.fixture(scope="module")
def plan(tokenizers: dict[str, Tokenizer]) -> TransferPlan:
    return plan_transfer(tokenizers["marked"], tokenizers["large"], source_rows=tokenizers["marked"].vocab_size)


@pytest.fixture(scope="module")
def old(tokenizers: dict[str, Tokenizer]) -> torch.Tensor:
    """Rows whose dimensions lean on each other."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(tokenizers["marked"].vocab_size, 12, generator=generator)
    return rows @ torch.randn(12, 12, generator=generator) + 3.0


def maker(name: str, old: torch.Tensor, plan: TransferPlan, side: Side = "input", **options: float) -> Mixture:
    return INITIALIZERS[name].fn(TensorRows(old), plan, side=side, seed=4, **options)


def every(one: Mixture) -> torch.Tensor:
    return one(np.arange(len(one)))


@pytest.mark.parametrize("name", ["zero", "normal", "edge_pieces"])
@SIDES
def test_what_is_not_free_is_what_fvt_makes(old: torch.Tensor, plan: TransferPlan, name: str, side: Side) -> None:
    assert len(plan.free) > 20
    kept = np.setdiff1d(np.arange(len(plan)), plan.free)
    one, chain = maker(name, old, plan, side), maker("fvt", old, plan, side)
    assert torch.equal(every(one)[kept], every(chain)[kept])
    assert np.array_equal(one.origin[kept], chain.origin[kept])
    assert set(one.origin[plan.free]) == {Origin.INITIALIZER}


def test_zero_is_zero(old: torch.Tensor, plan: TransferPlan) -> None:
    assert not every(maker("zero", old, plan))[plan.free].any()


@pytest.mark.parametrize("count", [400, 5])  # rows: more and fewer than dimensions
def test_the_root_of_a_covariance_gives_it_back(count: int) -> None:
    rows = torch.randn(count, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = rows.T.cov(correction=0)
    root = covariance_root(covariance)
    torch.testing.assert_close(root @ root.T, covariance, atol=1e-12, rtol=1e-9)


def test_normal_rows_are_the_mean_and_a_draw_of_the_covariance(old: torch.Tensor, plan: TransferPlan) -> None:
    made = every(maker("normal", old, plan, scale=0.25))
    root = torch.linalg.cholesky(old.double().T.cov(correction=0))
    for i in plan.free.tolist():
        wanted = old.double().mean(0) + 0.5 * root @ normal_draw(4, i, 12).double()
        torch.testing.assert_close(made[i].double(), wanted, rtol=1e-4, atol=1e-4)
    mean = every(maker("normal", old, plan, scale=0.0))[plan.free]
    torch.testing.assert_close(mean, old.mean(0).expand_as(mean))


@SIDES
def test_equal_weights_are_fvt(old: torch.Tensor, plan: TransferPlan, side: Side) -> None:
    made = every(maker("edge_pieces", old, plan, side, input_decay=1.0, head_decay=1.0))
    torch.testing.assert_close(made, every(maker("fvt", old, plan, side)))


@SIDES
def test_without_others_the_edge_is_copied(old: torch.Tensor, plan: TransferPlan, side: Side) -> None:
    made = every(maker("edge_pieces", old, plan, side, input_decay=0.0, head_decay=0.0))
    for i in plan.free.tolist():
        pieces = plan.side(side)[plan.offsets[i] : plan.offsets[i + 1]].tolist()
        assert torch.equal(made[i], old[pieces[-1 if side == "input" else 0]])


@SIDES
def test_weights_fall_from_the_edge_by_the_decay_and_sum_to_one(
    old: torch.Tensor, plan: TransferPlan, side: Side
) -> None:
    decay = {"input_decay": 0.7} if side == "input" else {"head_decay": 0.7}
    made = maker("edge_pieces", old, plan, side, **decay)
    for i in plan.free.tolist():
        ids, weights = zip(*made.sources(i))
        assert list(ids) == plan.side(side)[plan.offsets[i] : plan.offsets[i + 1]].tolist()
        assert sum(weights) == pytest.approx(1)
        from_edge = weights[::-1] if side == "input" else weights
        assert [b / a for a, b in itertools.pairwise(from_edge)] == pytest.approx([0.7] * (len(ids) - 1))


@pytest.mark.parametrize(
    "name, options",
    [("normal", {"scale": -1.0}), ("edge_pieces", {"input_decay": 1.5}), ("edge_pieces", {"head_decay": -0.5})],
)
def test_options_out_of_range_are_one_line(
    old: torch.Tensor, plan: TransferPlan, name: str, options: dict[str, float]
) -> None:
    (key, value) = next(iter(options.items()))
    with pytest.raises(UserError, match=f"transfer.{name}.{key}: {value}, where .* is needed") as error:
        maker(name, old, plan, **options)
    assert "\n" not in str(error.value)
