"""Groups hit exactly the tensors named; every optimizer learns, and goes on from its saved state bit for bit."""

import copy
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig

from tokenkit.config import UserError
from tokenkit.train.optimizer import build_optimizer, parameter_groups, set_learning_rate
from tokenkit.train.optimizer_classes import Combined, honours_found_inf
from tokenkit.train.optimizer_state import optimizer_tensors, put_optimizer
from tokenkit.train.parameter_kinds import parameter_kinds
from tokenkit.train.schema import OptimizerConfig

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SMALL = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
GATED = {**SMALL, "intermediate_size": 80, "num_key_value_heads": 2, "head_dim": 16}
CONFIGS = {
    "llama": LlamaConfig(**GATED, tie_word_embeddings=False, attention_bias=True),
    "gpt2": GPT2Config(vocab_size=96, n_positions=32, n_embd=64, n_layer=2, n_head=4, **NO_DROPOUT),
    "gemma3": Gemma3TextConfig(**GATED, sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
}
ATTENTION = [f"self_attn.{part}_proj.weight" for part in "qkvo"]
MLP = [f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
MATRICES = {
    "llama": [f"model.layers.{n}.{name}" for n in range(2) for name in (*ATTENTION, *MLP)],
    "gpt2": [
        f"transformer.h.{n}.{name}.weight"
        for n in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ],
    "gemma3": [f"model.layers.{n}.{name}" for n in range(2) for name in (*ATTENTION, *MLP)],
}
TABLES = {
    "llama": {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"},
    "gpt2": {"transformer.wte.weight": "embedding", "transformer.wpe.weight": "embedding"},
    "gemma3": {"model.embed_tokens.weight": "embedding"},
}
NORMS_PER_LAYER = {"llama": 2, "gpt2": 4, "gemma3": 4}  # gpt2: with biases
EIGHT_BIT = ("adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion_8bit", "paged_lion_8bit")
NAMES = ("adamw", "muon", "lion", "soap", *EIGHT_BIT)


def model_of(name="llama", seed=0, layers=2):
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[name])
    config.num_hidden_layers = layers
    return AutoModelForCausalLM.from_config(config)


def named(model):
    parameters = dict(model.named_parameters())
    return parameters, parameter_kinds(parameters, [model])


def names_in(groups, parameters, chosen):
    """Names of the parameters in the groups of which something is true."""
    ids = {id(p) for group in groups if chosen(group) for p in group["params"]}
    return sorted(name for name, p in parameters.items() if id(p) in ids)


@pytest.mark.parametrize("name", CONFIGS)
def test_kinds_come_from_the_modules(name):
    parameters, kinds = named(model_of(name))
    assert kinds.keys() == parameters.keys()
    assert sorted(n for n, kind in kinds.items() if kind == "matrix") == sorted(MATRICES[name])
    assert {n: kind for n, kind in kinds.items() if kind in ("embedding", "head")} == TABLES[name]
    norms = [n for n, kind in kinds.items() if kind == "norm"]
    query_and_key = 4 if name == "gemma3" else 0
    final = 2 if name == "gpt2" else 1
    assert len(norms) == 2 * NORMS_PER_LAYER[name] + query_and_key + final
    assert all(parameters[n].ndim == 1 for n, kind in kinds.items() if kind in ("norm", "vector"))


@pytest.mark.parametrize("name", CONFIGS)
def test_matrices_and_tables_are_decayed_and_nothing_else(name):
    parameters, kinds = named(model_of(name))
    groups = parameter_groups(parameters, OptimizerConfig(weight_decay=0.1), kinds)
    assert names_in(groups, parameters, lambda g: g["weight_decay"] == 0.1) == sorted([*MATRICES[name], *TABLES[name]])
    assert sum(len(group["params"]) for group in groups) == len(parameters)


def test_a_norm_or_a_bias_with_two_dimensions_is_not_decayed():
    class HeadNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4, 8))

    class Body(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = HeadNorm()
            self.layernorm = torch.nn.Linear(8, 8)  # called a norm, and none
            self.bias = torch.nn.Parameter(torch.zeros(4, 8))

    body = Body()
    parameters, kinds = named(body)
    groups = parameter_groups(parameters, OptimizerConfig(weight_decay=0.1), kinds)
    assert names_in(groups, parameters, lambda g: g["weight_decay"] > 0) == ["layernorm.weight"]
    by_shape = parameter_groups(parameters, OptimizerConfig(weight_decay=0.1))
    expected = ["bias", "layernorm.weight", "q.weight"]
    assert names_in(by_shape, parameters, lambda g: g["weight_decay"] > 0) == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_patterns_hit_what_they_name_and_the_first_counts(name):
    parameters, kinds = named(model_of(name))
    table = next(iter(TABLES[name]))
    patterns = [
        {"pattern": ".*(embed_tokens|wte).*", "lr_scale": 0.1, "weight_decay_scale": 0.0},
        {"pattern": ".*(embed|wte|wpe|lm_head).*", "lr_scale": 2.0},
        {"pattern": r"\.1\.mlp\.", "lr_scale": 0.5, "weight_decay_scale": 3.0},
    ]
    config = OptimizerConfig(weight_decay=0.1, learning_rate=0.02, param_groups=patterns)
    optimizer = build_optimizer(parameters, config, kinds)
    set_learning_rate(optimizer, 0.02)
    groups = optimizer.param_groups
    assert names_in(groups, parameters, lambda g: g["lr"] == pytest.approx(0.002)) == [table]
    assert names_in(groups, parameters, lambda g: g["lr"] == 0.04) == [n for n in TABLES[name] if n != table]
    own = sorted(n for n in parameters if ".1.mlp." in n)
    assert names_in(groups, parameters, lambda g: g["lr"] == 0.01) == own
    heavy = [n for n in own if kinds[n] == "matrix"]
    assert names_in(groups, parameters, lambda g: g["weight_decay"] == pytest.approx(0.3)) == heavy
    assert table in names_in(groups, parameters, lambda g: g["weight_decay"] == 0)


def test_a_pattern_that_matches_nothing_is_one_line():
    parameters, kinds = named(model_of())
    config = OptimizerConfig(param_groups=[{"pattern": "embeddings"}])
    with pytest.raises(UserError, match=r"train.optimizer.param_groups: 'embeddings' matches none .*; write") as caught:
        build_optimizer(parameters, config, kinds)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_muon_moves_hidden_matrices_and_adamw_the_rest(name):
    parameters, kinds = named(model_of(name))
    optimizer = build_optimizer(parameters, OptimizerConfig(name="muon"), kinds)
    assert isinstance(optimizer, Combined)
    muon, adamw = optimizer.parts
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    assert names_in(muon.param_groups, parameters, lambda g: True) == sorted(MATRICES[name])
    assert names_in(adamw.param_groups, parameters, lambda g: True) == sorted(parameters.keys() - {*MATRICES[name]})


def test_the_combined_optimizer_is_one():
    model = model_of()
    parameters, kinds = named(model)
    optimizer = build_optimizer(parameters, OptimizerConfig(name="muon", weight_decay=0.1), kinds)
    set_learning_rate(optimizer, 0.5)
    assert {group["lr"] for part in optimizer.parts for group in part.param_groups} == {0.5}
    set_learning_rate(optimizer, 1e-3)
    run(model, optimizer, range(2))
    assert all(part.state is optimizer.state for part in optimizer.parts)
    assert set(optimizer.state) == set(parameters.values())
    other, saved = model_of(), optimizer.state_dict()
    other.load_state_dict(model.state_dict())
    others, other_kinds = named(other)
    again = build_optimizer(others, OptimizerConfig(name="muon", weight_decay=0.1), other_kinds)
    again.load_state_dict(copy.deepcopy(saved))
    assert run(other, again, range(2, 4)) == run(model, optimizer, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3
    embeddings = {name: p for name, p in parameters.items() if "embed" in name}
    with pytest.raises(UserError, match=r"train.optimizer.name: muon, .*none is trained; write adamw"):
        build_optimizer(embeddings, OptimizerConfig(name="muon"), kinds)


def run(model, optimizer, steps):
    """Losses of some steps; what is read depends on the step alone."""
    losses = []
    for step in steps:
        ids = torch.randint(0, 12, (4, 12), generator=torch.Generator().manual_seed(step % 3))
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def rate_of(name):
    return 1e-3 if "lion" in name else 1e-2 if name == "soap" else 3e-3


@pytest.mark.parametrize(("name", "model_name"), [*((name, "llama") for name in NAMES), ("soap", "gpt2")])
def test_learns_and_goes_on_bit_for_bit(tmp_path, name, model_name):
    pytest.importorskip("bitsandbytes" if name in EIGHT_BIT else "pytorch_optimizer")
    config = OptimizerConfig(name=name, learning_rate=rate_of(name), weight_decay=0.1)
    model = model_of(model_name, layers=1)
    parameters, kinds = named(model)
    optimizer = build_optimizer(parameters, config, kinds)
    losses = run(model, optimizer, range(16))
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])
    saved = optimizer_tensors(parameters, optimizer)
    assert {key.split(".weight.")[0] for key in saved if ".weight." in key} == {
        key.removesuffix(".weight") for key in parameters if key.endswith(".weight")
    }
    save_file(saved, tmp_path / "optimizer.safetensors")
    other = model_of(model_name, 1, layers=1)
    other.load_state_dict(model.state_dict())
    others, other_kinds = named(other)
    again = build_optimizer(others, config, other_kinds)
    put_optimizer(others, again, load_file(tmp_path / "optimizer.safetensors"))
    assert run(model, optimizer, range(16, 24)) == run(other, again, range(16, 24))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert optimizer_tensors(others, again).keys() == saved.keys()


def test_state_is_as_small_as_its_name_says():
    pytest.importorskip("bitsandbytes")
    sizes = {}
    for name in ("adamw", "adamw_8bit", "lion_8bit"):
        parameters = {"w": torch.nn.Parameter(torch.randn(256, 256))}
        optimizer = build_optimizer(parameters, OptimizerConfig(name=name))
        parameters["w"].grad = torch.randn(256, 256)
        optimizer.step()
        sizes[name] = sum(t.nbytes for t in optimizer_tensors(parameters, optimizer).values())
    assert sizes["adamw_8bit"] < 0.3 * sizes["adamw"]
    assert sizes["lion_8bit"] < 0.15 * sizes["adamw"]


def test_the_fused_kernel_is_a_choice_and_the_same_step():
    found = {}
    for fused in (True, False):
        model = model_of()
        parameters, kinds = named(model)
        optimizer = build_optimizer(parameters, OptimizerConfig(fused=fused, weight_decay=0.1), kinds)
        assert honours_found_inf(optimizer) is fused
        run(model, optimizer, range(3))
        found[fused] = [p.detach().clone() for p in model.parameters()]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found[True], found[False]))


@pytest.mark.parametrize(
    ("name", "module"), [("lion", "pytorch_optimizer"), ("soap", "pytorch_optimizer"), ("lion_8bit", "bitsandbytes")]
)
def test_a_missing_package_is_one_line(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, f"{module}.optim", None)
    words = rf"train.optimizer.name: {name}, needs {module}, which is not installed; pip install {module}"
    with pytest.raises(UserError, match=words) as caught:
        build_optimizer({"w": torch.nn.Parameter(torch.ones(2, 2))}, OptimizerConfig(name=name))
    assert "\n" not in str(caught.value)


def test_lists_numbers_and_the_order_in_memory_come_back():
    """Sums over columns and over rows round differently, so a matrix that lies by columns has to do so again."""
    pytest.importorskip("pytorch_optimizer")
    found = []
    for _ in range(2):
        parameters = {"w": torch.nn.Parameter(torch.randn(6, 4)), "b": torch.nn.Parameter(torch.randn(4))}
        found.append((parameters, build_optimizer(parameters, OptimizerConfig(name="soap"))))
    (parameters, optimizer), (others, again) = found
    for _ in range(12):
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    put_optimizer(others, again, optimizer_tensors(parameters, optimizer))
    for name in parameters:
        state, other = optimizer.state[parameters[name]], again.state[others[name]]
        assert {key: type(value) for key, value in state.items()} == {key: type(v) for key, v in other.items()}
        assert other["precondition_frequency"] == 10
        for key in ("GG", "Q"):
            assert [len(entry) for entry in state[key]] == [len(entry) for entry in other[key]]
            for mine, theirs in zip(state[key], other[key]):
                if len(mine):
                    assert torch.equal(mine, theirs)
                    assert mine.stride() == theirs.stride()
    assert [group["step"] for group in again.param_groups] == [12]


def test_what_has_no_place_in_a_checkpoint_is_told():
    parameters = {"w": torch.nn.Parameter(torch.ones(2))}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    optimizer.state[parameters["w"]]["odd"] = {"a": 1}
    with pytest.raises(TypeError, match=r"w\.odd: a dict has no place in a checkpoint"):
        optimizer_tensors(parameters, optimizer)
    with pytest.raises(ValueError, match="state called nonsense"):
        put_optimizer(parameters, optimizer, {"nonsense": torch.ones(1)})
