"""Steps that are not finite leave the weights alone; float16 finds its factor, learns, and resumes bit for bit."""

import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tokenkit.config import UserError, build
from tokenkit.train.optimizer import build_optimizer
from tokenkit.train.optimizer_state import optimizer_tensors, put_optimizer
from tokenkit.train.scaler import FIRST_SCALE, MOST_SKIPPED, Guard, autocast
from tokenkit.train.schema import LoopConfig, OptimizerConfig

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, head_dim=16
)


def parameter(value=1.0):
    return {"w": torch.nn.Parameter(torch.full((4,), value))}


def stepped(guard, optimizer, parameters, gradient, step=0, loss=1.0):
    """One step under a gradient that is given as the loss had it, before scaling."""
    parameters["w"].grad = torch.full((4,), gradient) * guard.scale
    guard.unscale(parameters.values())
    norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
    guard.step(optimizer, step, loss, norm)


@pytest.mark.parametrize("name", ["adamw", "muon", "lion"])
@pytest.mark.parametrize(("gradient", "loss"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, -math.inf)])
def test_a_step_that_is_not_finite_moves_nothing_and_is_told_at_the_next_look(name, gradient, loss):
    parameters = {"w": torch.nn.Parameter(torch.ones(2, 2))}
    optimizer = build_optimizer(parameters, OptimizerConfig(name=name, weight_decay=0.1))
    guard = Guard(CPU, scaling=False)
    for step, (value, said) in enumerate([(1.0, 1.0), (gradient, loss), (1.0, 1.0)]):
        before, state = parameters["w"].detach().clone(), optimizer_tensors(parameters, optimizer)
        state = {key: tensor.clone() for key, tensor in state.items()}
        parameters["w"].grad = torch.full((2, 2), value)
        norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        guard.step(optimizer, step, said, norm)
        unmoved = torch.equal(before, parameters["w"])
        assert unmoved == (step == 1)
        assert parameters["w"].isfinite().all()
        if step == 1:
            after = optimizer_tensors(parameters, optimizer)
            assert all(torch.equal(state[key], after[key]) for key in state.keys() | after.keys())
    bad = guard.look()
    assert (bad.step, bad.in_a_row) == (1, 0)
    assert bad.loss == loss or (math.isnan(bad.loss) and math.isnan(loss))
    assert math.isfinite(bad.norm) == math.isfinite(gradient)


def test_without_trouble_there_is_nothing_to_tell_and_every_bit_is_as_without_a_guard():
    found = []
    for guarded in (False, True):
        torch.manual_seed(0)
        parameters = {"w": torch.nn.Parameter(torch.randn(50, 7)), "b": torch.nn.Parameter(torch.randn(7))}
        optimizer, guard = build_optimizer(parameters, OptimizerConfig(weight_decay=0.1)), Guard(CPU, scaling=False)
        for step in range(8):
            loss = sum((p**3).sum() * torch.randn(()) for p in parameters.values())
            guard.scaled(loss).backward()
            guard.unscale(parameters.values())
            norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), 0.5)
            if guarded:
                guard.step(optimizer, step, loss.detach(), norm)
            else:
                optimizer.step()
            optimizer.zero_grad()
        assert (guard.look(), guard.values(), guard.state()) == (None, {}, {})
        found.append(parameters)
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("w", "b"))


def test_the_factor_moves_as_torchs_does():
    overflows = [True, True, False, False, False, False, True, *[False] * 9, True, True, False]
    guard = Guard(CPU, scaling=True, grown_after=3)
    parameters = parameter()
    optimizer = build_optimizer(parameters, OptimizerConfig())
    torchs = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE, growth_interval=3)
    theirs = parameter()
    their_optimizer = build_optimizer(theirs, OptimizerConfig())
    scales = []
    for step, overflow in enumerate(overflows):
        gradient = math.inf if overflow else 0.01
        stepped(guard, optimizer, parameters, gradient, step)
        torchs.scale(torch.ones(1))
        theirs["w"].grad = torch.full((4,), gradient) * torchs.get_scale()
        torchs.unscale_(their_optimizer)
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.0)
        torchs.step(their_optimizer)
        torchs.update()
        assert guard.values()["loss_scale"] == torchs.get_scale()
        assert torch.equal(parameters["w"], theirs["w"])
        scales.append(torchs.get_scale())
    assert len(set(scales)) > 3
    assert guard.values()["skipped_steps"] == sum(overflows)
    assert guard.look() is None


def test_the_factor_never_grows_beyond_float32():
    guard = Guard(CPU, scaling=True, grown_after=1)
    guard.scale = torch.tensor(2.0**127)
    parameters = parameter()
    optimizer = build_optimizer(parameters, OptimizerConfig())
    parameters["w"].grad = torch.ones(4)
    guard.unscale(parameters.values())
    assert parameters["w"].grad.tolist() == [2.0**-127] * 4
    guard.step(optimizer, 0, 1.0, torch.tensor(1.0))
    assert guard.values()["loss_scale"] == 2.0**127


def test_too_many_overflows_in_a_row_are_told_and_fewer_are_not():
    guard, parameters = Guard(CPU, scaling=True), parameter()
    optimizer = build_optimizer(parameters, OptimizerConfig())
    for step in range(MOST_SKIPPED - 1):
        stepped(guard, optimizer, parameters, math.inf, step)
    assert guard.look() is None
    stepped(guard, optimizer, parameters, 1e-3, MOST_SKIPPED - 1)
    first = MOST_SKIPPED
    for step in range(first, first + MOST_SKIPPED):
        assert guard.look() is None
        stepped(guard, optimizer, parameters, math.nan, step, loss=math.nan)
    bad = guard.look()
    assert (bad.step, bad.in_a_row) == (first, MOST_SKIPPED)
    assert math.isnan(bad.loss)


def test_a_scaled_loss_has_the_same_value_and_unscaled_gradients_are_the_same_bits():
    torch.manual_seed(0)
    weights, x = torch.randn(6, 5), torch.randn(9, 6)
    guard, found = Guard(CPU, scaling=True), []
    for scaled in (False, True):
        w = torch.nn.Parameter(weights.clone())
        loss = (x @ w).tanh().square().mean()
        out = guard.scaled(loss) if scaled else loss
        assert torch.equal(out, loss)
        out.backward()
        if scaled:
            assert torch.equal(w.grad, found[0] * FIRST_SCALE)
            guard.unscale([w])
        found.append(w.grad)
    assert torch.equal(found[0], found[1])


def test_gradients_too_small_for_float16_survive_by_scaling():
    grads = {}
    for scaling in (False, True):
        torch.manual_seed(0)
        w, x = torch.nn.Parameter(torch.randn(8, 8)), torch.randn(16, 8)
        guard = Guard(CPU, scaling=scaling)
        with autocast(CPU, "float16"):
            out = x @ w
        assert out.dtype == torch.float16
        guard.scaled(out.float().mean() * 1e-6).backward()
        guard.unscale([w])
        grads[scaling] = w.grad
    assert not grads[False].any()
    assert torch.allclose(grads[True], (x.mean(0) / 8 * 1e-6).unsqueeze(1).expand(8, 8), rtol=2e-2, atol=1e-10)


REFUSED = {"gradnorm": True, "mgda": True, "approx_gradmag": True, "pcgrad+gradclip:1": True, "gradmag:1e-6": True}
ALLOWED = {"ema": False, "none": False, "pcgrad": False, "approx_gradmag_preserve_mag": False}


@pytest.mark.parametrize(("method", "refused"), [*(REFUSED | ALLOWED).items()])
def test_balances_that_gradients_of_another_size_would_mislead_are_refused_beside_float16(method, refused):
    values = {"steps": 4, "precision": "float16", "balance": {"method": method}}
    if not refused:
        assert build(LoopConfig, values).precision == "float16"
        return
    with pytest.raises(
        UserError, match=rf"train.precision: float16 .*train.balance.method={re.escape(method)} .*bfloat16"
    ) as caught:
        build(LoopConfig, values)
    assert "\n" not in str(caught.value)


class Run:
    """A tiny model under a precision, step by step; what it reads depends on the step alone."""

    def __init__(self, precision, seed=0, grown_after=4):
        torch.manual_seed(seed)
        self.model, self.precision = LlamaForCausalLM(CONFIG), precision
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = build_optimizer(self.parameters, OptimizerConfig(learning_rate=5e-3))
        self.guard = Guard(CPU, scaling=precision == "float16", grown_after=grown_after)
        self.scales = []

    def go(self, steps):
        losses = []
        for step in steps:
            ids = torch.randint(0, 8, (4, 12), generator=torch.Generator().manual_seed(step % 2))
            with autocast(CPU, self.precision):
                logits = self.model(input_ids=ids).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
            self.optimizer.zero_grad()
            self.guard.scaled(loss).backward()
            self.guard.unscale(self.parameters.values())
            norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), 1.0)
            self.guard.step(self.optimizer, step, loss.detach(), norm)
            losses.append(loss.item())
            self.scales.append(self.guard.values().get("loss_scale"))
        return losses


@pytest.fixture
def overflowing():
    """So high a first factor that float16 overflows some times before it fits."""
    run = Run("float16")
    run.guard.scale = torch.tensor(2.0**20)
    return run


def test_float16_learns_as_float32_does():
    wide, half = (Run(precision, grown_after=1000).go(range(30)) for precision in ("float32", "float16"))
    assert wide[-1] < 0.75 * wide[0]
    assert half[-1] == pytest.approx(wide[-1], rel=0.03)
    assert half != wide


def test_float16_resumes_bit_for_bit_in_the_middle_of_its_search(overflowing, tmp_path):
    overflowing.go(range(6))
    skipped = overflowing.guard.values()["skipped_steps"]
    assert 0 < skipped < 6
    save_file(optimizer_tensors(overflowing.parameters, overflowing.optimizer), tmp_path / "optimizer")
    save_file({name: tensor.clone() for name, tensor in overflowing.guard.state().items()}, tmp_path / "guard")
    other = Run("float16", seed=1)
    other.model.load_state_dict(overflowing.model.state_dict())
    put_optimizer(other.parameters, other.optimizer, load_file(tmp_path / "optimizer"))
    other.guard.load_state(load_file(tmp_path / "guard"))
    assert other.go(range(6, 20)) == overflowing.go(range(6, 20))
    assert other.scales == overflowing.scales[6:]
    assert len(set(other.scales)) > 1
    assert other.guard.values() == overflowing.guard.values()
    assert all(torch.equal(a, b) for a, b in zip(other.model.parameters(), overflowing.model.parameters()))
