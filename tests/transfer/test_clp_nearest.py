"""Means by likeness in a donor, beside the same in a few plain lines."""

import numpy as np
import pytest
import torch

from tokenkit.config import UserError
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer import INITIALIZERS
from tokenkit.transfer.mixture import Mixture, Origin
from tokenkit.transfer.plan import TransferPlan, plan_transfer
from tokenkit.transfer.rows import TensorRows


@pytest.fixture
def plan(tokenizers: dict[str, Tokenizer]) -> TransferPlan:
    return plan_transfer(tokenizers["small"], tokenizers["large"], source_rows=tokenizers["small"].vocab_size)


@pytest.fixture
def old(tokenizers: dict[str, Tokenizer]) -> torch.Tensor:
    return torch.randn(tokenizers["small"].vocab_size, 7, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def donor(plan: TransferPlan) -> torch.Tensor:
    return torch.randn(len(plan), 24, generator=torch.Generator().manual_seed(4))


def cosines(plan: TransferPlan, donor: torch.Tensor, i: int) -> np.ndarray:
    rows = donor.double().numpy()
    anchors = rows[plan.anchors[0]]
    return anchors @ rows[i] / np.linalg.norm(anchors, axis=1) / np.linalg.norm(rows[i])


def maker(name: str, old: torch.Tensor, plan: TransferPlan, donor: torch.Tensor, **options: float | None) -> Mixture:
    return INITIALIZERS[name].fn(TensorRows(old), plan, TensorRows(donor), side="head", **options)


@pytest.mark.parametrize("top", [None, 5])
def test_clp(plan: TransferPlan, old: torch.Tensor, donor: torch.Tensor, top: int | None) -> None:
    """Positive cosines over their sum, of all shared tokens or those most alike."""
    rows = old.double().numpy()[plan.anchors[1]]
    made = maker("clp", old, plan, donor, top=top)
    for i in plan.free[:20].tolist():
        weights = np.maximum(cosines(plan, donor, i), 0)
        if top is not None:
            weights[np.argsort(-weights)[top:]] = 0
        np.testing.assert_allclose(made(np.array([i]))[0], weights @ rows / weights.sum(), rtol=1e-4, atol=1e-5)
        assert made.origin[i] == Origin.INITIALIZER


def test_nearest(plan: TransferPlan, old: torch.Tensor, donor: torch.Tensor) -> None:
    """The softmax of the k largest cosines; one neighbour is a copy of it, at any temperature."""
    rows = old.double().numpy()[plan.anchors[1]]
    made, copied = maker("nearest", old, plan, donor, k=4, temperature=0.2), maker("nearest", old, plan, donor, k=1)
    for i in plan.free[:20].tolist():
        likeness = cosines(plan, donor, i)
        best = np.argsort(-likeness)[:4]
        weights = np.exp(likeness[best] / 0.2)
        np.testing.assert_allclose(made(np.array([i]))[0], weights @ rows[best] / weights.sum(), rtol=1e-4, atol=1e-5)
        assert torch.equal(copied(np.array([i]))[0], old[plan.anchors[1][best[0]]])


@pytest.mark.parametrize("name", ["clp", "nearest"])
def test_a_token_that_the_donor_does_not_know_stays_with_the_chain(
    plan: TransferPlan, old: torch.Tensor, donor: torch.Tensor, name: str
) -> None:
    """Ids beyond its rows, rows of zeros, and a donor that shares no token at all."""
    fewer = donor[: len(donor) // 2].clone()
    fewer[-5:] = 0
    made = maker(name, old, plan, fewer)
    unknown = plan.free >= len(fewer) - 5
    assert unknown.any()
    assert (made.origin[plan.free[unknown]] != Origin.INITIALIZER).all()
    assert (made.origin[plan.free[~unknown]] == Origin.INITIALIZER).all()
    none = maker(name, old, plan, donor[: int(plan.anchors[0].min())])
    assert (none.origin != Origin.INITIALIZER).all()


def test_weights_are_shares(plan: TransferPlan, old: torch.Tensor, donor: torch.Tensor) -> None:
    for name in ("clp", "nearest"):
        made = maker(name, old, plan, donor)
        for i in plan.free.tolist():
            weights = np.array([weight for _, weight in made.sources(i)])
            assert (weights > 0).all()
            assert abs(weights.sum() - 1) < 1e-5


def test_options_that_make_no_sense(plan: TransferPlan, old: torch.Tensor, donor: torch.Tensor) -> None:
    for name, key, value in (("clp", "top", 0), ("nearest", "k", 0), ("nearest", "temperature", 0.0)):
        with pytest.raises(UserError, match=f"transfer.{name}.{key}: .* is needed"):
            maker(name, old, plan, donor, **{key: value})
