"""Policies over gradients: closed forms, what they promise, what only one loss trains, and what a look costs."""

import json
import math
import multiprocessing
import os
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_balance import NAMES, WEIGHTS, Toy, config_of, flat, step_of
from test_checkpoint import final, metrics, run_file
from test_step import encode, make_task

from tokenkit.config import UserError, build
from tokenkit.data.example import cut
from tokenkit.train import policies
from tokenkit.train.balance import build_balance
from tokenkit.train.diagnosis import Diagnosis
from tokenkit.train.loop import Interrupted
from tokenkit.train.optimizer import build_optimizer
from tokenkit.train.scaler import Guard
from tokenkit.train.schema import OptimizerConfig
from tokenkit.verbs.distill import distill

AGREEING = ["fixed_ratio", "project_aux", "drop_conflict", "mgda", "cagrad"]
ONES = {"main": 1.0, "aux": 1.0}


class Quadratics:
    """|w - a|^2 / 2 and |w - b|^2 / 2 at w = 0, whose gradients are -a and -b, each with a map of its own along."""

    def __init__(self, method, main, aux):
        self.shared = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.own = {n: torch.nn.Parameter(torch.tensor([0.5], dtype=torch.float64)) for n in ONES}
        self.targets = {"main": main, "aux": aux}
        self.trained = [self.shared, *self.own.values()]
        self.balance = build_balance(config_of(method), list(ONES), list, self.trained)

    def forward(self, share=1.0):
        def value(name):
            away = self.shared + torch.tensor(self.targets[name], dtype=torch.float64)
            return share * (away.square().sum() / 2 + self.own[name].sum() ** 2)

        return {name: value(name) for name in ONES}

    def step(self, parts=(1.0,), weights=ONES):
        for parameter in self.trained:
            parameter.grad = None
        shared = self.balance.backward([lambda part=part: self.forward(part) for part in parts], weights)
        return self.shared.grad, {n: p.grad.item() for n, p in self.own.items()}, shared


AGAINST = ((1.0, 0.0), (-2.0, 1.0))  # an angle of more than 90 degrees


@pytest.mark.parametrize("parts", [(1.0,), (0.25, 0.75)])
def test_project_aux_takes_from_the_auxiliary_alone(parts):
    gradient, own, shared = Quadratics("project_aux", *AGAINST).step(parts)
    main = torch.tensor(AGAINST[0], dtype=torch.float64)
    aux = gradient - main
    assert aux @ main >= -1e-6
    torch.testing.assert_close(gradient, torch.tensor([1.0, 1.0], dtype=torch.float64))  # (-2, 1) without its -2
    torch.testing.assert_close(gradient @ main, main @ main)
    assert own == {"main": 1.0, "aux": 1.0}  # what is a loss's own is not changed
    assert shared.weights == {"main": 3.0, "aux": 1.0}


def test_the_main_loss_may_be_named():
    gradient, _, _ = Quadratics({"method": "project_aux", "main": "aux"}, *AGAINST).step()
    torch.testing.assert_close(gradient, torch.tensor([-1.8, 1.4], dtype=torch.float64))
    with pytest.raises(UserError, match=r"train.balance.main: 'other' is no loss of this run; write one of main, aux"):
        Quadratics({"method": "project_aux", "main": "other"}, *AGAINST)


@pytest.mark.parametrize("method", ["project_aux", "drop_conflict"])
@pytest.mark.parametrize("aux", [(0.0, 3.0), (2.0, 0.7)])
@pytest.mark.parametrize("parts", [(1.0,), (0.3, 0.7)])
def test_orthogonal_or_aligned_is_the_sum_bit_for_bit(method, aux, parts):
    found, own, _ = Quadratics(method, (1.0, 0.0), aux).step(parts)
    expected, plain, _ = Quadratics("none", (1.0, 0.0), aux).step(parts)
    assert torch.equal(found, expected)
    assert own == plain


def test_drop_conflict_keeps_the_main_gradient_alone_and_what_is_the_others_own():
    gradient, own, shared = Quadratics("drop_conflict", *AGAINST).step()
    assert torch.equal(gradient, torch.tensor(AGAINST[0], dtype=torch.float64))
    assert own == {"main": 1.0, "aux": 1.0}
    assert shared.weights == {"main": 1.0, "aux": 0.0}


@pytest.mark.parametrize(
    "pair", [AGAINST, ((1.0, 0.0), (0.0, 2.0)), ((1.0, 0.0), (3.0, 0.0)), ((2.0, 1.0), (1.0, 3.0))]
)
def test_two_task_mgda_equals_its_closed_form(pair):
    one, two = np.array(pair)
    share = np.clip(((two - one) @ two) / ((one - two) @ (one - two)), 0, 1)
    gradient, own, shared = Quadratics("mgda", *pair).step()
    np.testing.assert_allclose(gradient.numpy(), share * one + (1 - share) * two, rtol=1e-12, atol=1e-12)
    assert shared.weights == pytest.approx({"main": share, "aux": 1 - share})
    assert own == {"main": 1.0, "aux": 1.0}


gradient_sets = st.lists(st.lists(st.floats(-3, 3, width=16), min_size=4, max_size=4), min_size=2, max_size=4).filter(
    lambda rows: all(sum(x * x for x in row) > 1e-3 for row in rows)
)


def simplex(count, steps):
    """Every point of a grid on the simplex."""
    for bars in np.ndindex(*[steps + 1] * (count - 1)):
        if list(bars) == sorted(bars):
            yield np.array([b - a for a, b in pairwise([0, *bars, steps])]) / steps


@given(gradient_sets)
@settings(deadline=None, derandomize=True, max_examples=50)
def test_the_shortest_mixture_is_shorter_than_any_other_and_opposes_none(rows):
    gradients = np.array(rows, dtype=np.float64)
    gram = gradients @ gradients.T
    shares = policies.min_norm(gram)
    assert shares.min() >= 0
    assert shares.sum() == pytest.approx(1)
    mixture = shares @ gradients
    best = min(np.linalg.norm(point @ gradients) for point in simplex(len(rows), 12))
    assert np.linalg.norm(mixture) <= best + 1e-6
    assert (gradients @ mixture).min() >= mixture @ mixture - 1e-6 * gram.max()


@given(gradient_sets, st.sampled_from([0.1, 0.4, 0.9]))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_cagrad_stays_near_the_sum_and_does_as_well_as_the_best_of_a_grid(rows, c):
    gradients = np.array(rows, dtype=np.float64)
    count, mean = len(rows), np.mean(rows, 0)
    update = np.array(policies.cagrad(gradients @ gradients.T, -1, c=c)) @ gradients / count
    assert np.linalg.norm(update - mean) <= c * np.linalg.norm(mean) * (1 + 1e-6) + 1e-9
    worst = (gradients @ update).min()
    assert worst >= (gradients @ mean).min() - 1e-6
    bound = min(  # of the dual: no update within reach helps its worst-off loss more than the least of these
        point @ gradients @ mean + c * np.linalg.norm(mean) * np.linalg.norm(point @ gradients)
        for point in simplex(count, 12)
    )
    assert worst <= bound + 1e-6


@pytest.mark.parametrize(("count", "steps", "near"), [(2, 9999, 1e-6), (3, 150, 1e-3)])
@pytest.mark.parametrize("seed", range(4))
def test_cagrad_reaches_the_bound_of_its_dual(count, steps, near, seed):
    gradients = np.random.default_rng(seed).normal(size=(count, 3))
    mean, c = gradients.mean(0), 0.5
    update = np.array(policies.cagrad(gradients @ gradients.T, -1, c=c)) @ gradients / count
    reach = c * np.linalg.norm(mean)
    bound = min(p @ gradients @ mean + reach * np.linalg.norm(p @ gradients) for p in simplex(count, steps))
    assert (gradients @ update).min() == pytest.approx(bound, abs=near)


def test_fixed_ratio_makes_every_gradient_as_long_as_the_main_one_times_its_weight():
    toy = Quadratics({"method": "fixed_ratio", "alpha": 0.5}, (3.0, 4.0), (0.0, 0.5))
    gradient, own, shared = toy.step(weights={"main": 1.0, "aux": 0.2})
    torch.testing.assert_close(gradient, torch.tensor([3.0, 4.0 + 0.2 * 5.0], dtype=torch.float64))
    assert shared.weights["aux"] * 0.5 == pytest.approx(0.2 * 5.0)
    assert own == {"main": 1.0, "aux": 0.2}
    toy.targets["aux"] = (0.0, 1.5)
    _, _, shared = toy.step(weights={"main": 1.0, "aux": 0.2})
    assert shared.weights["aux"] == pytest.approx(0.2 * 5.0 / (0.5 * 0.5 + 0.5 * 1.5))  # running length


@pytest.mark.parametrize("method", AGREEING)
@pytest.mark.parametrize("cut_", [(2, 2), (3, 1)])
def test_a_step_is_the_same_however_it_is_cut(method, cut_):
    whole, parts = Toy(method), Toy(method)
    for _ in range(3):
        expected, shared = whole.step()
        found, again = parts.step(cut_)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)
        assert again.weights == pytest.approx(shared.weights, rel=1e-6)


@pytest.mark.parametrize("method", AGREEING)
def test_what_is_learnt_survives_a_stop_digit_by_digit(method):
    config = {"method": method, "every": 3}
    whole, first = Toy(config), Toy(config)
    steps = [whole.step((3, 1)) for _ in range(5)]
    for _ in range(2):
        first.step((3, 1))
    second = Toy(config)
    second.model.load_state_dict(first.model.state_dict())
    second.balance.state |= json.loads(json.dumps(first.balance.state))
    for gradient, shared in steps[2:]:
        found, again = second.step((3, 1))
        assert torch.equal(found, gradient)
        assert again == shared


def test_looks_cost_a_backward_pass_for_each_loss_and_every_n_steps_amortises(monkeypatch):
    passes = {"grad": 0, "backward": 0}
    grad, backward = torch.autograd.grad, torch.autograd.backward

    def counted(kind, original):
        def call(*arguments, **options):
            passes[kind] += 1
            return original(*arguments, **options)

        return call

    monkeypatch.setattr(torch.autograd, "grad", counted("grad", grad))
    monkeypatch.setattr(torch.autograd, "backward", counted("backward", backward))
    toy = Toy({"method": "mgda", "every": 4})
    for _ in range(8):
        toy.step((4,))
    assert passes == {"grad": 2 * len(NAMES), "backward": 8}  # 1 + the number of losses where it looks, else 1
    assert toy.calls == 8


@pytest.mark.parametrize("method", AGREEING)
def test_a_masked_loss_has_no_say_and_what_is_not_finite_is_not_hidden(method):
    found, _ = Toy(method, leave_out={"far"}).step((2, 2))
    expected, _ = Toy(method, leave_out={"far"}).step((2, 2), {**WEIGHTS, "far": 0.0})
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    gradient, _ = Toy(method, scale=math.inf).step()
    assert not gradient.isfinite().all()


@pytest.mark.parametrize("method", ["project_aux", "mgda", "fixed_ratio"])
def test_a_projector_gets_the_gradient_of_its_own_loss(model_folder, bpe, unigram, documents, method):
    losses = {"clm": {"weight": 0.3}, "hidden_states": {"project": True, "weight": 2.0}}
    task = make_task(model_folder, bpe, unigram, losses)
    rows = encode(task, cut(documents[:2], 120)[:4], unigram, bpe)
    names = [*task.trainable()]
    own = [name for name in names if name.startswith("projectors.")]
    assert own

    def gradients(chosen):
        step_of(task, chosen, rows, (2, 2))
        found = {name: p.grad.clone() for name, p in task.trainable().items()}
        for parameter in task.trainable().values():
            parameter.grad = None
        return found

    plain, changed = gradients("none"), gradients(method)
    for name in own:
        torch.testing.assert_close(changed[name], plain[name], rtol=1e-6, atol=1e-10)
    if method != "project_aux":  # which changes nothing where they agree
        assert any(not torch.allclose(changed[n], plain[n]) for n in names if n not in own)
    optimizer = build_optimizer(task.trainable(), OptimizerConfig(projector_lr_scale=3.0))
    scaled = {id(p) for group in optimizer.param_groups if group["lr_scale"] == 3.0 for p in group["params"]}
    assert scaled == {id(task.trainable()[name]) for name in own}  # complete before the first step


def test_diagnosis_by_hand():
    toy = Quadratics("none", (3.0, 4.0), (-4.0, 2.0))
    diagnosis = Diagnosis(toy.trained, list(ONES))
    forwards = diagnosis.look([toy.forward], ONES)
    assert len(forwards) == 1
    values = diagnosis.values()
    assert values["gradient_norm/main"] == pytest.approx(5)
    assert values["gradient_norm/aux"] == pytest.approx(math.sqrt(20))
    assert values["gradient_cosine/main/aux"] == pytest.approx(-4 / 5 / math.sqrt(20))
    assert values["gradient_opposed/main/aux"] == 1
    toy.targets["aux"] = (1.0, 1.0)
    diagnosis.look([toy.forward], ONES)
    assert diagnosis.values()["gradient_opposed/main/aux"] == 0.5
    again = Diagnosis(toy.trained, list(ONES))
    again.load_state(diagnosis.state())
    again.look([toy.forward], ONES)
    assert again.values()["gradient_opposed/main/aux"] == pytest.approx(1 / 3)
    assert all(parameter.grad is None for parameter in toy.trained)


def test_diagnosis_does_not_see_what_half_precision_multiplies_with():
    toy, guard = Quadratics("none", (3.0, 4.0), (-4.0, 2.0)), Guard(torch.device("cpu"), scaling=True)
    plain, scaled = Diagnosis(toy.trained, list(ONES)), Diagnosis(toy.trained, list(ONES))
    plain.look([toy.forward], ONES)
    scaled.look([lambda: {name: guard.scaled(share) for name, share in toy.forward().items()}], ONES, guard.scale)
    assert scaled.values() == plain.values()  # the factor is a power of two


def test_the_noise_scale_is_that_of_gradients_of_known_spread():
    """Rows with gradients g + s n in D dimensions: tr(S) = D s^2, so B = D s^2 / |g|^2."""
    rows, parts, dims, spread = 32, 4, 50, 2.0
    draws = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(dims, dtype=torch.float64))
    mean = torch.full((dims,), 0.5, dtype=torch.float64)
    diagnosis = Diagnosis([weight], ["only"], batch_rows=rows, noise_scale=True)
    for _ in range(150):
        data = mean + spread * torch.randn(rows, dims, generator=draws, dtype=torch.float64)
        chunks = data.split(rows // parts)
        diagnosis.look([lambda c=c: {"only": (c @ weight).sum() / rows} for c in chunks], {"only": 1.0})
    expected = dims * spread**2 / mean.square().sum().item()
    assert diagnosis.values()["gradient_noise/scale"] == pytest.approx(expected, rel=0.05)


def test_a_run_logs_what_it_diagnoses_and_resumes_exactly(tmp_path, model_folder, corpus):
    options = {"balance": {"method": "project_aux", "every": 2}, "diagnose_every": 2, "noise_scale": True, "steps": 6}

    def run(name, **more):
        made = run_file(tmp_path, model_folder, corpus, name, **options, **more)
        losses = {"clm": {}, "hidden_states": {"project": True}}
        values = made.model_dump(mode="json") | {"losses": losses, "target_tokenizer": None}
        return build(type(made), values)

    distill(run("whole"), quiet=True)
    with pytest.raises(Interrupted):
        distill(run("cut", stop_after=3), quiet=True)
    distill(run("cut"), resume=True, quiet=True)
    whole, stopped = final(tmp_path / "whole"), final(tmp_path / "cut")
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert any(name.startswith("projectors.") for name in whole)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    looks = {row["step"]: row for row in metrics(tmp_path / "whole") if "gradient_norm/clm" in row}
    assert [*looks] == [2, 4, 6]
    wanted = {f"gradient_{key}" for key in ("norm/hidden_states", "cosine/clm/hidden_states", "noise/trace")}
    assert all(wanted | {"gradient_opposed/clm/hidden_states"} <= row.keys() for row in looks.values())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"method": "mgda", "main": "clm"}, r"train.balance.main: no option of 'mgda', which has every"),
        ({"method": "cagrad", "c": 1.0}, r"balance.c: input should be less than 1"),
        ({"method": "project_aux", "every": 0}, r"balance.every: input should be greater"),
    ],
)
def test_a_mistake_is_one_line(value, words):
    with pytest.raises(UserError, match=words) as caught:
        config_of(value)
    assert "\n" not in str(caught.value)


def share(rank, store, folder, method):
    """One of two processes with half of the rows each."""
    torch.set_num_threads(1)
    torch.set_num_threads(1)  # a pool of threads does not survive the fork
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    from tokenkit.train.parallel import add_gradients

    toy = Toy(method)
    toy.balance.backward([lambda: toy.forward(toy.rows[rank::2])], WEIGHTS)
    add_gradients(toy.trained)
    save_file({"gradient": flat(toy.trained)}, folder / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", ["mgda", "project_aux"])
def test_two_processes_decide_as_one(tmp_path, method):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=share, args=(rank, tmp_path / "store", tmp_path, method)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    expected, _ = Toy(method).step()  # after the forks: a child of a process with threads may wait for them for ever
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")["gradient"]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)
