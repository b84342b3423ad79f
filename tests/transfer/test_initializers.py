"""What every initialiser must do, and that means are means."""

import numpy as np
import pytest
import torch

from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer import INITIALIZERS, Initializer
from tokenkit.transfer.plan import Kind, plan_transfer

EVERY = pytest.mark.parametrize("one", INITIALIZERS.values(), ids=INITIALIZERS.keys())


def rows_for(source: Tokenizer, extra: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(source.vocab_size + extra, 8, generator=torch.Generator().manual_seed(5)).to(dtype)


def test_the_folder_is_the_registry() -> None:
    assert set(INITIALIZERS) == {"fvt", "mean"}
    assert all(one.summary for one in INITIALIZERS.values())


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("names", ["small large", "large one_role", "marked small", "byte marked", "small small"])
def test_contract(tokenizers: dict[str, Tokenizer], one: Initializer, dtype: torch.dtype, names: str) -> None:
    source, target = (tokenizers[name] for name in names.split())
    plan = plan_transfer(source, target, source_rows=source.vocab_size)
    old = rows_for(source, dtype=dtype)
    kept = old.clone()
    for side in ("input", "head"):
        new = one.fn(old, plan, side=side, seed=3)
        assert new.shape == (target.vocab_size, 8)
        assert new.dtype == dtype
        assert new.isfinite().all()
        assert torch.equal(new, one.fn(old, plan, side=side, seed=3))
        exact = (plan.kinds == Kind.SPECIAL) | ((plan.kinds == Kind.COPIED) & one.copies)
        for i in np.flatnonzero(exact & (plan.lengths == 1)):
            assert torch.equal(new[i], old[plan.side(side)[plan.offsets[i]]])
    assert torch.equal(old, kept)


def test_fvt_rows_are_means_of_their_pieces(tokenizers: dict[str, Tokenizer]) -> None:
    source, target = tokenizers["small"], tokenizers["large"]
    plan, old = plan_transfer(source, target, source_rows=source.vocab_size), rows_for(source)
    new = INITIALIZERS["fvt"].fn(old, plan, side="input")
    for i in range(target.vocab_size):
        pieces = plan.pieces[plan.offsets[i] : plan.offsets[i + 1]].tolist()
        torch.testing.assert_close(new[i], torch.stack([old[p] for p in pieces]).mean(0))


def test_half_precision_means_are_rounded_once(tokenizers: dict[str, Tokenizer]) -> None:
    source, target = tokenizers["byte"], tokenizers["large"]
    plan, old = plan_transfer(source, target, source_rows=source.vocab_size), rows_for(source, dtype=torch.bfloat16)
    fn = INITIALIZERS["fvt"].fn
    assert torch.equal(fn(old, plan, side="head"), fn(old.float(), plan, side="head").bfloat16())


def test_ordinary_rows_of_mean_are_the_mean_of_rows_with_an_id(tokenizers: dict[str, Tokenizer]) -> None:
    source, target = tokenizers["small"], tokenizers["large"]
    old = rows_for(source, extra=7)
    old[-7:] = 1e6  # padding rows
    new = INITIALIZERS["mean"].fn(old, plan_transfer(source, target, source_rows=len(old)), side="input")
    torch.testing.assert_close(new[50], old[:-7].mean(0))
    assert torch.equal(new[50], new[target.token_bytes.index(b"\n")])


def test_drawn_rows_follow_the_seed_and_the_spread_of_the_source(tokenizers: dict[str, Tokenizer]) -> None:
    source, target = tokenizers["byte"], tokenizers["small"]
    plan = plan_transfer(source, target, source_rows=128)
    drawn = torch.from_numpy(np.flatnonzero(plan.kinds == Kind.DRAWN))
    old = rows_for(source)[:128] * 0.1 + 4.0
    first, second = (INITIALIZERS["fvt"].fn(old, plan, side="input", seed=seed)[drawn] for seed in (0, 1))
    assert not torch.equal(first, second)
    assert abs(float(first.mean()) - 4.0) < 0.05
    assert 0.05 < float(first.std()) < 0.15
