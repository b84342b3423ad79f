"""Noise: as large as it says, nothing at 0 and while measuring, the same after a stop."""

import json
import math

import pytest
import torch
from test_checkpoint import final, metrics, run_file
from test_step import encode, make_task

from tokenkit.config import UserError, build
from tokenkit.data.batch import collate
from tokenkit.data.example import cut
from tokenkit.train.noise import (
    Noise,
    add_gradient_noise,
    embedding_noise,
    generator,
    neftune,
    noisy_weights,
    spread_noise,
)
from tokenkit.train.schema import NoiseConfig
from tokenkit.train.step import Beside, accumulate_gradients
from tokenkit.verbs.distill import distill

CPU = torch.device("cpu")


def draws(seed=0, name="x"):
    return generator(CPU, seed, name)


def test_noise_on_logits_has_the_share_that_it_says_over_1e5_draws():
    values = torch.randn(4, 50, 500, generator=draws()) * torch.tensor([0.1, 1.0, 3.0, 10.0])[:, None, None]
    noise = spread_noise(values, 0.25, draws(1)) - values
    for row, own in zip(noise, values, strict=True):
        assert row.std().item() == pytest.approx(0.25 * own.std().item(), rel=0.03)
    assert abs(noise.mean().item()) < 0.02
    assert noise.numel() == 100_000


def test_a_masked_id_stays_masked_and_has_no_say():
    values = torch.randn(2, 3, 40, generator=draws())
    masked = torch.cat([values, torch.full((2, 3, 5), -math.inf)], -1)
    found = spread_noise(masked, 0.5, draws(1))
    assert (found[..., 40:] == -math.inf).all()
    assert found[..., :40].isfinite().all()
    spread = (found[..., :40] - values).std() / values.std()
    assert spread.item() == pytest.approx(0.5, rel=0.25)


def test_embedding_noise_is_uniform_within_its_bound_and_knows_each_rows_own_length():
    lengths = torch.tensor([16.0, 64.0])[:, None, None]
    noise = embedding_noise(torch.Size((2, 64, 800)), lengths, 5.0, draws())
    for row, length in zip(noise, (16, 64), strict=True):
        bound = 5 / math.sqrt(length * 800)
        assert row.abs().max() <= bound
        assert row.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)  # of a uniform draw


@pytest.mark.parametrize("step", [0, 1, 99])
def test_gradient_noise_has_its_published_variance(step):
    parameter = torch.nn.Parameter(torch.zeros(100_000))
    idle = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(100_000)
    add_gradient_noise({"w": parameter, "idle": idle}, 0.3, step, 7)
    assert parameter.grad.std().item() == pytest.approx(math.sqrt(0.3 / (1 + step) ** 0.55), rel=0.03)
    assert parameter.grad.mean().item() == pytest.approx(1, abs=0.01)
    assert idle.grad is None


def test_weights_are_noisy_inside_and_have_their_old_bits_after():
    parameter = torch.nn.Parameter(torch.randn(100_000, generator=draws()) * 3)
    zero = torch.nn.Parameter(torch.zeros(5))  # an adapter that has not begun yet
    before = parameter.detach().clone()
    with noisy_weights({"w": parameter, "zero": zero}, 0.1, 3):
        assert (parameter - before).std().item() == pytest.approx(0.1 * before.square().mean().sqrt().item(), rel=0.03)
        assert not zero.any()
    assert torch.equal(parameter, before)
    with pytest.raises(ZeroDivisionError), noisy_weights({"w": parameter}, 0.1, 3):
        raise ZeroDivisionError
    assert torch.equal(parameter, before)


def test_neftune_acts_in_training_only_and_leaves_no_hook():
    embedding, ids = torch.nn.Embedding(9, 8), torch.arange(6).reshape(2, 3)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    plain = embedding(ids)
    with neftune(embedding, 5.0, mask, draws()):
        noisy = embedding(ids)
        embedding.eval()
        assert torch.equal(embedding(ids), plain)
        embedding.train()
    assert 0 < (noisy - plain)[0].abs().max() <= 5 / math.sqrt(3 * 8)
    assert (noisy - plain)[1].abs().max() <= 5 / math.sqrt(1 * 8)
    assert torch.equal(embedding(ids), plain)


LOSSES = {"forward_kl": {}, "hidden_states": {}}


@pytest.fixture
def task(model_folder, bpe):
    task = make_task(model_folder, bpe, bpe, LOSSES)
    task.train_mode(True)  # dropout too
    return task


def gradients(task, documents, bpe, config, seed=5):
    rows = encode(task, cut(documents[:1], 90)[:4], bpe, bpe)
    for parameter in task.trainable().values():
        parameter.grad = None
    noise = None if config is None else Noise(NoiseConfig(**config), task)
    parts = [collate(rows[at : at + 2], [at, at + 1]) for at in (0, 2)]
    state = torch.random.get_rng_state()
    accumulate_gradients(task, parts, seed, None, None, Beside(noise=noise))
    torch.random.set_rng_state(state)
    return {name: p.grad.clone() for name, p in task.trainable().items() if p.grad is not None}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_zero_leaves_every_bit_and_each_kind_changes_some(task, documents, bpe):
    plain = gradients(task, documents, bpe, None)
    assert same(plain, gradients(task, documents, bpe, {}))
    seen = [plain]
    for kind in ("teacher_logits", "features", "neftune"):
        found = gradients(task, documents, bpe, {kind: 0.3})
        assert not any(same(found, other) for other in seen)
        assert same(found, gradients(task, documents, bpe, {kind: 0.3}))  # the same seed, the same bits
        assert not same(found, gradients(task, documents, bpe, {kind: 0.3}, seed=6))
        seen.append(found)
    assert same(plain, gradients(task, documents, bpe, None))  # and nothing stays behind


@pytest.mark.parametrize(
    ("noise", "losses", "words"),
    [
        ({"teacher_logits": 0.1}, {"clm": {}}, r"train.noise.teacher_logits: no loss of this run reads the logits"),
        ({"features": 0.1}, {"forward_kl": {}}, r"train.noise.features: no loss of this run reads states of a live"),
    ],
)
def test_noise_that_nothing_would_feel_is_refused(model_folder, bpe, noise, losses, words):
    with pytest.raises(UserError, match=words) as caught:
        Noise(NoiseConfig(**noise), make_task(model_folder, bpe, bpe, losses))
    assert "\n" not in str(caught.value)


def test_an_auto_encoder_has_no_embedding_for_noise(pretrain):
    with pytest.raises(UserError, match=r"train.noise.neftune: what is trained here has no input embedding"):
        pretrain("run", noise={"neftune": 5.0})


def test_a_noisy_run_resumes_exactly_and_measures_without_noise(tmp_path, model_folder, corpus):
    noise = {"teacher_logits": 0.1, "features": 0.1, "neftune": 5.0, "gradient": 1e-4, "weights": 0.01}

    def run(name, noise, **more):
        options = {"steps": 5, "eval_at": [0, 5], "noise": noise, "optimizer": {"learning_rate": 1e-3}}
        made = run_file(tmp_path, model_folder, corpus, name, **options, **more)
        return build(type(made), made.model_dump(mode="json") | {"losses": LOSSES, "target_tokenizer": None})

    from tokenkit.train.loop import Interrupted

    distill(run("whole", noise), quiet=True)
    with pytest.raises(Interrupted):
        distill(run("cut", noise, stop_after=3), quiet=True)
    distill(run("cut", noise), resume=True, quiet=True)
    distill(run("plain", {}), quiet=True)
    whole, stopped, plain = (final(tmp_path / name) for name in ("whole", "cut", "plain"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert not all(torch.equal(whole[name], plain[name]) for name in whole)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    first = [metrics(tmp_path / name)[0]["bits_per_byte"] for name in ("whole", "plain")]
    assert first[0] == first[1]
    results = json.loads((tmp_path / "whole/results.json").read_text("utf-8"))
    assert results["zero_shot_bits_per_byte"] == first[0]
    last = [row["bits_per_byte"] for row in metrics(tmp_path / "whole") if "bits_per_byte" in row][-1]
    assert last == results["trained_bits_per_byte"]
