"""Balances by their laws: the cut of a step, a stop, a scaled loss and a masked one change nothing they should not."""

import json
import math

import pytest
import torch
from test_checkpoint import final, metrics, run_file
from test_step import make_task
from transformers import AutoConfig, AutoModelForCausalLM

from tokenkit.config import UserError, build
from tokenkit.data.batch import collate
from tokenkit.data.example import cut as cut_documents
from tokenkit.data.example import make_examples
from tokenkit.models.lora import attach_lora
from tokenkit.train.balance import build_balance, last_layer
from tokenkit.train.loop import Interrupted
from tokenkit.train.schema import TrainConfig
from tokenkit.train.step import accumulate_gradients
from tokenkit.verbs.distill import distill

STEPWISE = ["none", "uncertainty", "gradnorm", "identity", "pcgrad", "gradmag", "pcgrad+gradmag:1e-6+gradclip:0.3"]
LOOKING = ["magnitude", "ema", "approx_gradmag", "approx_gradmag_preserve_mag"]
NAMES = ("near", "far", "odd")
WEIGHTS = {"near": 1.0, "far": 0.5, "odd": 2.0}


def config_of(value):
    return build(TrainConfig, {"steps": 1, "balance": value}).balance


class Toy:
    """Two layers, three losses per row of data, and a balance over them; the losses are as unlike as can be."""

    def __init__(self, method, scale=1.0, leave_out=()):
        torch.manual_seed(0)
        sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 8, "bos_token_id": 0, "eos_token_id": 0}
        config = AutoConfig.for_model("gpt2", vocab_size=11, **sizes)  # float64 throughout, no float32 norm inside
        self.model = AutoModelForCausalLM.from_config(config).double().eval()
        self.rows = torch.randint(0, 11, (4, 5))
        self.scale, self.leave_out, self.calls = scale, leave_out, 0
        self.trained = list(self.model.parameters())
        self.balance = build_balance(config_of(method), NAMES, lambda: last_layer(self.model), self.trained)

    def forward(self, rows):
        """Each loss's share of its mean over the step of four rows."""
        self.calls += 1
        hidden = self.model.base_model(rows).last_hidden_state
        logp = self.model.lm_head(hidden).log_softmax(-1)
        values = {
            "near": -logp[:, :-1].gather(-1, rows[:, 1:, None]).mean((1, 2)),
            "far": self.scale * 50 * (hidden - 1).square().mean((1, 2)),
            "odd": 1e-3 * logp.exp().square().sum(-1).mean(1),
        }
        return {name: value.sum() / 4 for name, value in values.items() if name not in self.leave_out}

    def step(self, cut=(4,), weights=WEIGHTS):
        """Gradients of one step, and what the balance says of it; the parameters then move a little."""
        self.model.zero_grad()
        parts = torch.split(self.rows, list(cut))
        shared = self.balance.backward([lambda rows=rows: self.forward(rows) for rows in parts], weights)
        gradient = flat(self.trained)
        with torch.no_grad():
            for parameter in self.trained:
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad
        return gradient, shared


def flat(parameters):
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])


def separate(weights=WEIGHTS):
    """The gradient of each loss by itself, whole and in the last layer, and its value."""
    whole, last, value = {}, {}, {}
    for name in NAMES:
        toy = Toy("none", leave_out=set(NAMES) - {name})
        whole[name], shared = toy.step(weights=dict.fromkeys(NAMES, 1.0))
        last[name], value[name] = flat(last_layer(toy.model)), shared.means[name]
    return whole, last, value


@pytest.mark.parametrize("method", STEPWISE + LOOKING)
@pytest.mark.parametrize("cut", [(2, 2), (3, 1)])
def test_a_step_is_the_same_however_it_is_cut(method, cut):
    whole, parts = Toy(method), Toy(method)
    for _ in range(3):
        expected, shared = whole.step()
        found, shared_by_parts = parts.step(cut)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert shared_by_parts.weights == pytest.approx(shared.weights, rel=1e-9)
        assert shared_by_parts.means == pytest.approx(shared.means, rel=1e-9)


@pytest.mark.parametrize("method", STEPWISE + LOOKING)
def test_the_cost_is_one_forward_pass_or_two_where_a_factor_needs_the_whole_step(method):
    one, two = Toy(method), Toy(method)
    one.step((4,))
    two.step((2, 2))
    two.step((2, 2))
    assert one.calls == 1
    assert two.calls == (4 if method in STEPWISE else 6 if method == "ema" else 8)  # ema: only at its first step


@pytest.mark.parametrize("method", STEPWISE + LOOKING)
def test_what_is_learnt_survives_a_stop_digit_by_digit(method):
    whole, first = Toy(method), Toy(method)
    steps = [whole.step((3, 1)) for _ in range(4)]
    for _ in range(2):
        first.step((3, 1))
    second = Toy(method)
    second.model.load_state_dict(first.model.state_dict())
    second.balance.state |= json.loads(json.dumps(first.balance.state))
    for gradient, shared in steps[2:]:
        found, again = second.step((3, 1))
        assert torch.equal(found, gradient)
        assert again == shared


@pytest.mark.parametrize("method", STEPWISE + LOOKING)
def test_a_fully_masked_loss_has_no_say(method):
    masked, absent = Toy(method, leave_out={"far"}), Toy(method, leave_out={"far"})
    before = json.dumps(masked.balance.state.get("far"))
    for _ in range(2):
        found, shared = masked.step((2, 2))
        expected, _ = absent.step((2, 2), {**WEIGHTS, "far": 0.0})
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert "far" not in shared.means
        assert method in STEPWISE or shared.weights["far"] == 0
    assert json.dumps(masked.balance.state.get("far")) == before


@pytest.mark.parametrize("method", ["magnitude", "ema", "approx_gradmag", "approx_gradmag_preserve_mag"])
def test_a_loss_without_value_or_gradient_gets_weight_0_and_not_1_over_nothing(method):
    toy = Toy(method, scale=0.0)
    gradient, shared = toy.step()
    assert shared.weights["far"] == 0
    torch.testing.assert_close(gradient, Toy(method, leave_out={"far"}).step()[0], rtol=0, atol=0)


@pytest.mark.parametrize("method", ["approx_gradmag", "gradmag:1e-30", "magnitude", "ema"])
def test_scaling_one_loss_changes_nothing(method):
    expected, _ = Toy(method).step()
    found, _ = Toy(method, scale=2.0**12).step()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", STEPWISE + LOOKING)
def test_no_loss_at_all_leaves_no_gradient(method):
    toy = Toy(method, leave_out=NAMES)
    toy.balance.backward([dict, dict], WEIGHTS)
    assert all(parameter.grad is None for parameter in toy.trained)


@pytest.mark.parametrize("method", [*LOOKING, "gradmag", "gradclip:1"])
def test_what_is_not_finite_is_not_hidden(method):
    gradient, _ = Toy(method, scale=math.inf).step()
    assert not gradient.isfinite().all()


@pytest.mark.parametrize("cut", [(4,), (1, 3)])
def test_gradmag_by_hand(cut):
    whole, last, _ = separate()
    factors = {name: WEIGHTS[name] / last[name].norm().item() for name in NAMES}
    gradient, shared = Toy("approx_gradmag").step(cut)
    torch.testing.assert_close(gradient, sum(factors[n] * whole[n] for n in NAMES), rtol=1e-9, atol=1e-12)
    assert shared.weights == pytest.approx(factors, rel=1e-9)
    gradient, shared = Toy("approx_gradmag_preserve_mag").step(cut)
    total = sum(factors.values())
    torch.testing.assert_close(gradient, sum(factors[n] / total * whole[n] for n in NAMES), rtol=1e-9, atol=1e-12)
    assert sum(shared.weights.values()) == pytest.approx(1, abs=1e-12)


def test_magnitude_by_hand():
    whole, _, value = separate()
    gradient, _ = Toy("magnitude").step()
    expected = sum(WEIGHTS[n] / value[n] * whole[n] for n in NAMES)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_the_identity_is_the_plain_sum_and_none_is_too():
    whole, _, _ = separate()
    expected = sum(WEIGHTS[n] * whole[n] for n in NAMES)
    for method in ("none", "identity"):
        torch.testing.assert_close(Toy(method).step((2, 2))[0], expected, rtol=1e-9, atol=1e-12)


def test_running_deviations_by_hand():
    toy, alpha = Toy({"method": "ema", "alpha": 0.8}), 0.8
    mean, variance = {}, {}
    for _ in range(4):
        _, shared = toy.step((3, 1))
        for name, value in shared.means.items():
            if name not in mean:
                mean[name], variance[name] = value, value**2
            assert shared.weights[name] == pytest.approx(WEIGHTS[name] / math.sqrt(variance[name]), rel=1e-9)
            variance[name] = alpha * variance[name] + (1 - alpha) * (value - mean[name]) ** 2
            mean[name] = alpha * mean[name] + (1 - alpha) * value


def test_uncertainty_learns_s_as_autograd_and_adam_do():
    toy = Toy({"method": "uncertainty", "s_init": 0.2, "learning_rate": 0.05})
    s = {name: torch.tensor(0.2, dtype=torch.float64, requires_grad=True) for name in NAMES}
    optimizer = torch.optim.Adam(s.values(), lr=0.05)
    for _ in range(5):
        factors = {name: WEIGHTS[name] * math.exp(-s[name].item()) for name in NAMES}
        _, shared = toy.step((2, 2))
        assert shared.weights == pytest.approx(factors, rel=1e-9)
        optimizer.zero_grad()
        sum(WEIGHTS[n] * shared.means[n] * (-s[n]).exp() + s[n] / 2 for n in NAMES).backward()
        optimizer.step()
    assert {n: entry["value"] for n, entry in toy.balance.state.items()} == pytest.approx(
        {n: value.item() for n, value in s.items()}, rel=1e-9
    )


def test_uncertainty_rests_at_a_schedules_zero():
    toy = Toy("uncertainty")
    toy.step(weights={**WEIGHTS, "far": 0.0})
    assert toy.balance.state["far"]["value"] == 0
    assert toy.balance.state["near"]["value"] != 0


def test_gradnorm_learns_as_autograd_and_adam_do():
    toy = Toy({"method": "gradnorm", "alpha": 0.5, "learning_rate": 0.02})
    w = {name: torch.tensor(1.0, dtype=torch.float64, requires_grad=True) for name in NAMES}
    optimizer, initial = torch.optim.Adam(w.values(), lr=0.02), {}
    for _ in range(5):
        expected = {name: WEIGHTS[name] * w[name].item() for name in NAMES}
        norms = last_layer_norms(toy)
        _, shared = toy.step((2, 2))
        assert shared.weights == pytest.approx(expected, rel=1e-9)
        initial = initial or shared.means
        lag = {n: shared.means[n] / initial[n] for n in NAMES}
        rate = {n: lag[n] / (sum(lag.values()) / 3) for n in NAMES}
        weighted = {n: w[n] * WEIGHTS[n] * norms[n] for n in NAMES}
        target = sum(weighted.values()).detach() / 3
        optimizer.zero_grad()
        (sum((weighted[n] - target * rate[n] ** 0.5).abs() for n in NAMES) / 3).backward()
        optimizer.step()
        with torch.no_grad():
            scale = 3 / sum(w.values())
            for value in w.values():
                value *= scale
    found = {n: entry["value"] for n, entry in toy.balance.state.items()}
    assert found == pytest.approx({n: value.item() for n, value in w.items()}, rel=1e-9)
    assert sum(found.values()) == pytest.approx(3)


def last_layer_norms(toy):
    shares, parameters = toy.forward(toy.rows), last_layer(toy.model)
    return {
        name: torch.cat([g.flatten() for g in torch.autograd.grad(share, parameters, retain_graph=True)]).norm().item()
        for name, share in shares.items()
    }


def test_a_parameter_that_no_loss_reaches_keeps_no_gradient():
    toy = Toy("pcgrad")
    idle = torch.nn.Parameter(torch.ones(3))
    toy.balance.parameters.append(idle)
    toy.step((2, 2))
    assert idle.grad is None
    assert all(parameter.grad is not None for parameter in toy.trained)


MODELS = {
    "llama": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2},
    "gpt2": {"n_embd": 8, "n_layer": 3, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0},
    "mixtral": {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 3,
    },
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_last_layer_is_found_by_structure(kind):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=20, **MODELS[kind]))
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)] for p in last_layer(model)}
    assert found == {name for name in names.values() if ".2." in name and "experts.2" not in name.split(".2.")[0]}
    model.requires_grad_(False)
    with pytest.raises(UserError, match=r"nothing is trained in the last layer; use train\.mode=lora or full"):
        last_layer(model)


def test_of_an_adapted_layer_the_adapters_count():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=20, **MODELS["llama"]))
    attach_lora(model, rank=2, alpha=2)
    trained = [name for name, p in model.named_parameters() if any(p is t for t in last_layer(model))]
    assert len(trained) == 14
    assert all("layers.2." in name and ".lora_" in name for name in trained)


@pytest.mark.parametrize(
    "value, words",
    [
        ("gradmog", r"train.balance: 'gradmog' is not known; write one of none, magnitude, ema.* or a chain of"),
        ("pcgrad+gradclip", r"'gradclip' in 'pcgrad\+gradclip' is not known.*such as pcgrad\+gradclip:1.0"),
        ("gradclip:0", "'gradclip:0' is not known"),
        ("gradclip:many", "'gradclip:many' is not known"),
        ("gradnorm+pcgrad", r"'gradnorm' in 'gradnorm\+pcgrad' is not known"),
        ({"method": "ema", "s_init": 0.2}, "train.balance.s_init: no option of 'ema', which has alpha"),
        ({"method": "ema", "alpha": 1.0}, "balance.alpha: input should be less than 1, not 1.0"),
        ({"methud": "ema"}, "balance.methud: unknown key; did you mean 'method'"),
    ],
)
def test_a_mistake_is_one_line(value, words):
    with pytest.raises(UserError, match=words) as caught:
        config_of(value)
    assert "\n" not in str(caught.value)


def test_a_word_is_the_method_with_its_defaults():
    assert config_of("gradnorm") == config_of({"method": "gradnorm", "alpha": 0.12, "learning_rate": 0.025})
    assert config_of("uncertainty").s_init == 0
    assert config_of(config_of("ema").model_dump()) == config_of("ema")


@pytest.fixture(scope="module")
def examples(bpe, unigram, documents):
    windows = [w for length in (40, 160, 90, 250) for w in cut_documents(documents[:1], length)[:1]]  # unequal rows
    return make_examples(windows, unigram, bpe)


def step_of(task, method, examples, cut):
    """Gradients of one step of a distillation and its result; the task's parameters stay as they are."""
    task.student.model.zero_grad()
    names, trained = list(task.objective.weights()), list(task.trainable().values())
    balance = build_balance(config_of(method), names, task.last_layer, trained)
    rows = iter(range(len(examples)))
    parts = [[next(rows) for _ in range(size)] for size in cut]
    batches = [collate([examples[row] for row in part], part) for part in parts]
    result = accumulate_gradients(task, batches, 0, balance)
    return flat(trained), result


@pytest.mark.parametrize("method", ["approx_gradmag_preserve_mag", "gradnorm", "magnitude", "pcgrad+gradclip:1"])
def test_a_distillation_step_is_the_same_however_it_is_cut(model_folder, bpe, unigram, examples, method):
    task = make_task(model_folder, bpe, unigram, {"alm": {"weight": 0.7}, "clm": {"weight": 0.2}})
    expected, whole = step_of(task, method, examples, (4,))
    for cut in ((2, 2), (3, 1)):
        found, parts = step_of(task, method, examples, cut)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)  # float32 norms inside the model
        assert parts.weights == pytest.approx(whole.weights, rel=1e-6)
        assert parts.loss == pytest.approx(whole.loss, rel=1e-6)


@pytest.mark.parametrize("method", ["approx_gradmag_preserve_mag", "pcgrad"])
def test_activations_may_be_computed_again(model_folder, bpe, unigram, examples, method):
    task = make_task(model_folder, bpe, unigram, {"alm": {}, "clm": {}})
    task.train_mode(True)
    expected, _ = step_of(task, method, examples, (2, 2))
    task.student.model.activation_checkpointing_enable({"use_reentrant": False})
    found, _ = step_of(task, method, examples, (2, 2))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "train",
    [
        {"balance": "uncertainty"},
        {"balance": "ema", "accumulation": 1},
        {"balance": "approx_gradmag_preserve_mag"},
        {"balance": "gradnorm", "mode": "lora", "lora": {"rank": 4, "dropout": 0.2}},
        {"balance": "pcgrad+gradclip:1"},
    ],
    ids=lambda train: train["balance"],
)
def test_a_balanced_run_resumed_equals_one_never_stopped(tmp_path, model_folder, corpus, train):
    losses = {"alm": {"weight": 0.8, "schedule": "linear(0,1,4)"}, "clm": {"weight": 0.3}}
    whole = run_file(tmp_path, model_folder, corpus, "whole", **train)
    whole = build(type(whole), {**whole.model_dump(mode="json"), "losses": losses})
    stopped = build(type(whole), {**whole.model_dump(mode="json"), "output": tmp_path / "cut"})
    until = stopped.model_dump(mode="json")
    until["train"]["stop_after"] = 3
    distill(whole, quiet=True)
    with pytest.raises(Interrupted):
        distill(build(type(whole), until), quiet=True)
    distill(stopped, resume=True, quiet=True)
    expected, found = final(tmp_path / "whole"), final(tmp_path / "cut")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    weights = [row["weight/alm"] for row in metrics(tmp_path / "whole") if "weight/alm" in row]
    assert len(weights) == 7
    assert weights[0] == 0
    assert weights[-1] > 0
