"""What every initialiser must do, and that means are means."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenkit.config import UserError
from tokenkit.models.hypernet import FILE, Hypernet
from tokenkit.models.hypernet_layers import HypernetConfig
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.transfer import INITIALIZERS, Initializer
from tokenkit.transfer.evidence import LACKING, Evidence, Texts
from tokenkit.transfer.initialize import Choice, all_rows, origins
from tokenkit.transfer.plan import Kind, Side, TransferPlan, plan_transfer
from tokenkit.transfer.rows import TensorRows

EVERY = pytest.mark.parametrize("one", INITIALIZERS.values(), ids=INITIALIZERS.keys())


WIDTH = 8
NOTHING = Evidence(load_tokenizer("byte"), load_tokenizer("byte"))


def rows_for(source: Tokenizer, extra: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(source.vocab_size + extra, WIDTH, generator=torch.Generator().manual_seed(5)).to(dtype)


def model_of(rows: torch.Tensor) -> LlamaForCausalLM:
    """A tiny model with these embedding rows."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(rows), tie_word_embeddings=True, **sizes)).to(rows.dtype)
    model.get_input_embeddings().weight.data.copy_(rows)
    return model


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hypernetwork that has learnt something, for one matrix of any source."""
    made = Hypernet(HypernetConfig(num_heads=2, max_seq_length=4), width=WIDTH, seed=0)
    with torch.no_grad():
        for parameter in made.networks.parameters():
            parameter.add_(0.02)
    path = tmp_path_factory.mktemp("hypernet") / FILE
    made.save(path, {})
    return path


def evidence_for(
    source: Tokenizer, target: Tokenizer, texts: list[str], old: torch.Tensor, network: Path | None = None
) -> Evidence:
    """A donor whose last ids have no row, a little text, a model, and a hypernetwork."""
    sides: tuple[Side, Side] = ("input", "head")
    generator = torch.Generator().manual_seed(1)
    drawn = {side: torch.randn(target.vocab_size - 2, 6, generator=generator) for side in sides}
    donor = {side: TensorRows(rows) for side, rows in drawn.items()}
    return Evidence(source, target, donor, Texts(texts), model_of(old), network, {"input": TensorRows(old)})


def made(
    name: str, old: torch.Tensor, plan: TransferPlan, side: Side, evidence: Evidence | None = None, seed: int = 0
) -> torch.Tensor:
    source = TensorRows(old)
    known = evidence or NOTHING
    return all_rows(Choice(name, seed=seed).maker(side, source, plan, known), source, plan, len(plan))


def test_the_folder_is_the_registry() -> None:
    assert all(one.summary for one in INITIALIZERS.values())
    assert {"fvt", "mean"} <= set(INITIALIZERS)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("names", ["small large", "large one_role", "marked small", "byte marked", "small small"])
def test_contract(
    tokenizers: dict[str, Tokenizer],
    corpus: list[str],
    network: Path,
    one: Initializer,
    dtype: torch.dtype,
    names: str,
) -> None:
    """Shape, type, finite, the same twice, copies and special rows exact, the source untouched, origins told."""
    source, target = (tokenizers[name] for name in names.split())
    plan = plan_transfer(source, target, source_rows=source.vocab_size)
    old = rows_for(source, dtype=dtype)
    kept, evidence = old.clone(), evidence_for(source, target, corpus, old, network)
    for side in ("input", "head"):
        new = made(one.name, old, plan, side, evidence, seed=3)
        assert new.shape == (target.vocab_size, WIDTH)
        assert new.dtype == dtype
        assert new.isfinite().all()
        assert torch.equal(new, made(one.name, old, plan, side, evidence, seed=3))
        exact = (plan.kinds == Kind.SPECIAL) | ((plan.kinds == Kind.COPIED) & one.copies)
        for i in np.flatnonzero(exact & (plan.lengths == 1)):
            assert torch.equal(new[i], old[plan.side(side)[plan.offsets[i]]])
        maker = Choice(one.name, seed=3).maker(side, TensorRows(old), plan, evidence)
        assert sum(origins(maker).values()) == len(maker) == len(plan)
        some = np.array([5, 3, len(plan) - 1])  # in another order, and alone
        torch.testing.assert_close(maker(some).to(dtype), new[torch.from_numpy(some)])
    assert torch.equal(old, kept)


def test_fvt_rows_are_means_of_their_pieces(tokenizers: dict[str, Tokenizer]) -> None:
    source, target = tokenizers["small"], tokenizers["large"]
    plan, old = plan_transfer(source, target, source_rows=source.vocab_size), rows_for(source)
    new = made("fvt", old, plan, "input")
    for i in range(target.vocab_size):
        pieces = plan.pieces[plan.offsets[i] : plan.offsets[i + 1]].tolist()
        torch.testing.assert_close(new[i], torch.stack([old[p] for p in pieces]).mean(0))


def test_a_mean_can_be_as_long_as_its_pieces(tokenizers: dict[str, Tokenizer]) -> None:
    source, target = tokenizers["small"], tokenizers["large"]
    plan, old = plan_transfer(source, target, source_rows=source.vocab_size), TensorRows(rows_for(source))
    maker = INITIALIZERS["fvt"].fn(old, plan, side="input", keep_norm=True)
    for i in plan.free[:20].tolist():
        pieces = plan.pieces[plan.offsets[i] : plan.offsets[i + 1]].astype(np.int64)
        wanted = old.gather(pieces).norm(dim=1).mean()
        torch.testing.assert_close(maker(np.array([i]))[0].norm(), wanted)


def test_half_precision_means_are_rounded_once(tokenizers: dict[str, Tokenizer]) -> None:
    source, target = tokenizers["byte"], tokenizers["large"]
    plan, old = plan_transfer(source, target, source_rows=source.vocab_size), rows_for(source, dtype=torch.bfloat16)
    assert torch.equal(made("fvt", old, plan, "head"), made("fvt", old.float(), plan, "head").bfloat16())


def test_ordinary_rows_of_mean_are_the_mean_of_rows_with_an_id(tokenizers: dict[str, Tokenizer]) -> None:
    source, target = tokenizers["small"], tokenizers["large"]
    old = rows_for(source, extra=7)
    old[-7:] = 1e6  # padding rows
    new = made("mean", old, plan_transfer(source, target, source_rows=len(old)), "input")
    torch.testing.assert_close(new[50], old[:-7].mean(0))
    assert torch.equal(new[50], new[target.token_bytes.index(b"\n")])


def test_drawn_rows_follow_the_seed_and_the_spread_of_the_source(tokenizers: dict[str, Tokenizer]) -> None:
    source, target = tokenizers["byte"], tokenizers["small"]
    plan = plan_transfer(source, target, source_rows=128)
    drawn = torch.from_numpy(np.flatnonzero(plan.kinds == Kind.DRAWN))
    old = rows_for(source)[:128] * 0.1 + 4.0
    first, second = (made("fvt", old, plan, "input", seed=seed)[drawn] for seed in (0, 1))
    assert not torch.equal(first, second)
    assert abs(float(first.mean()) - 4.0) < 0.05
    assert 0.05 < float(first.std()) < 0.15


def test_evidence_that_is_not_there_is_asked_for(tokenizers: dict[str, Tokenizer]) -> None:
    source, target = tokenizers["small"], tokenizers["large"]
    plan, old = plan_transfer(source, target, source_rows=source.vocab_size), rows_for(source)
    for one in INITIALIZERS.values():
        for need in set(one.needs) - {"source_tokenizer", "target_tokenizer"}:
            assert need in LACKING
        if set(one.needs) & set(LACKING):
            with pytest.raises(UserError, match=f"transfer.initializer: {one.name!r} needs"):
                made(one.name, old, plan, "input", Evidence(source, target))
