"""The estimate counts what there is to count exactly, is near what a run takes, and never spoils the printed run."""

import json

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.verbs.estimate_shape import SHAPE
from tokenkit.config import build, parse_yaml
from tokenkit.losses.kl import forward_kl
from tokenkit.models.memory import Side, parameter_bytes, step_spent, without_memory
from tokenkit.models.rates import Rates
from tokenkit.models.view import ModelView
from tokenkit.train.optimizer import build_optimizer
from tokenkit.train.optimizer_schema import OptimizerConfig
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.estimate import dry_run_text, estimate_distill, optimizer_bytes

RATES = Rates({4: 1e9, 2: 1e9}, 1e9, 1e6, 1e6)
DEMO = "tokenkit/assets/demo_teacher"


@pytest.fixture
def run(tmp_path):
    def make(**changes):
        values = {
            "output": str(tmp_path / "out"),
            "model": {"source": DEMO},
            "losses": {"forward_kl": {}},
            "data": {"source": {"stdlib": "train", "max_bytes": 20_000}, "window_bytes": 128},
            "train": {"steps": 4, "batch_size": 4, "device": "cpu"} | changes.pop("train", {}),
            "eval": {"source": {"stdlib": "held_out", "max_bytes": 300}},
        }
        return build(DistillRun, values | changes)

    return make


def spent(rows=2, tokens=16, needs=frozenset({"label_logp"}), microbatches=1, half=None, checkpointing=False):
    with without_memory("cpu"):
        model = LlamaForCausalLM(SHAPE).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        student = Side(ModelView(model), rows, tokens, needs)
        found = step_spent(student, None, half=half, microbatches=microbatches, width=64)
    return found, parameter_bytes(model)


def kept_in_truth(checkpointing, half=None):
    """Bytes that autograd saves of a real forward pass, beside parameters."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(SHAPE).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = model.model(torch.zeros(2, 16, dtype=torch.long), use_cache=False).last_hidden_state
    assert kept.requires_grad
    return sum(seen.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_that_autograd_saves(checkpointing):
    found, _ = spent(checkpointing=checkpointing)
    assert found.kept_bytes == pytest.approx(kept_in_truth(checkpointing), abs=16_384)


def test_operations_are_six_per_weight_and_token_and_what_attention_takes():
    found, _ = spent()
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    body = 6 * matrices * 2 * 16
    attention = 2 * (2 + 5) * 2 * 16 * 16 * 64 * 2  # products forward and back, in two layers
    head = 2 * 4 * 2 * 16 * 64 * 512
    assert found.flops == body + attention + head


def test_more_rows_and_microbatches():
    one, _ = spent(rows=2)
    two, parameters = spent(rows=4)
    assert two.kept_bytes == pytest.approx(2 * one.kept_bytes, rel=0.05)
    assert two.flops == 2 * one.flops
    cut, _ = spent(rows=2, microbatches=4)
    assert cut.flops == 4 * one.flops
    assert one.peak_bytes < cut.peak_bytes <= one.peak_bytes + parameters  # the second one finds gradients there
    less, _ = spent(rows=4, checkpointing=True)
    assert less.kept_bytes < two.kept_bytes / 3
    assert less.flops > two.flops


def test_logits_take_what_a_divergence_takes():
    plain, _ = spent(rows=8)
    whole, _ = spent(rows=8, needs=frozenset({"logits"}))
    assert whole.kept_bytes - plain.kept_bytes >= 8 * 16 * 512 * 4


def test_logits_of_both_sides_take_what_forward_kl_takes():
    rows, tokens, needs = 8, 16, frozenset({"logits"})
    plain, _ = spent(rows=rows)
    with without_memory("cpu"):
        own, other = (ModelView(LlamaForCausalLM(SHAPE)) for _ in range(2))
        sides = (Side(view, rows, tokens, needs) for view in (own, other))
        found = step_spent(*sides, half=None, microbatches=1, width=64)
    logits, taught = torch.randn(2, rows, tokens, 512)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward_kl(logits.clone().requires_grad_(), taught)
    held = rows * tokens * (2 * 512 + 64) * 4 + sum(saved.values())  # both logits, and the states of the teacher
    assert found.kept_bytes - plain.kept_bytes == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimizer_remembers_as_much(name):
    model = LlamaForCausalLM(SHAPE)
    parameters = dict(model.named_parameters())
    optimizer = build_optimizer(parameters, OptimizerConfig(name=name))
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [value for one in optimizer.state.values() for value in one.values() if isinstance(value, torch.Tensor)]
    truth = sum(value.numel() * value.element_size() for value in state if value.ndim)
    assert optimizer_bytes(model, OptimizerConfig(name=name)) == pytest.approx(truth, rel=0.02)


@pytest.mark.slow
def test_weights_of_each_mode_and_of_shared_processes(run):
    full = estimate_distill(run(), RATES)
    assert full.weights == full.gradients == full.teacher == full.optimizer / 2
    lora = estimate_distill(run(train={"mode": "lora", "embeddings": "none", "lora": {"rank": 4}}), RATES)
    assert lora.gradients < 0.1 * full.gradients
    assert lora.teacher < 0.5 * full.teacher  # its body is the student's
    assert lora.peak < full.peak
    four = estimate_distill(run(train={"parallel": {"data": 4}, "batch_size": 16}), RATES)
    assert (four.rows, four.tokens) == (full.rows, full.tokens)
    assert four.optimizer == pytest.approx(full.optimizer / 4, rel=1e-3)
    across = estimate_distill(run(train={"parallel": {"model": 2}}), RATES)
    assert across.activations < full.activations
    fewer = estimate_distill(run(teacher={"source": DEMO, "quantize": "int4"}), RATES)
    assert fewer.teacher < 0.6 * full.teacher


@pytest.mark.slow
def test_the_printed_run_stays_one_and_says_what_it_takes(run, tmp_path):
    text = dry_run_text(run())
    assert build(DistillRun, parse_yaml(text)) == run()
    said = [line for line in text.splitlines() if line.startswith("# ")]
    assert said[0] == "# memory per process, estimated for one process on cpu, float32, full:"
    assert any("time per step, estimated" in line for line in said)
    stages = [{"name": "a", "train": {"mode": "embeddings"}}, {"name": "b"}]
    lines = dry_run_text(run(losses={"alm": {}}, target_tokenizer="byte", stages=stages)).splitlines()
    assert {line.split(":")[0] for line in lines if line.startswith("# ")} == {"# a", "# b"}


def test_what_is_not_here_is_said_in_a_comment(run, tmp_path, tokenkit):
    file = tmp_path / "run.yaml"
    values = json.loads(run().model_dump_json())
    file.write_text(json.dumps({**values, "model": {"source": str(tmp_path / "later")}}), "utf-8")
    code, out, _ = tokenkit("distill", file, "--dry-run")
    assert code == 0
    assert "# memory: not estimated (" in out
    assert parse_yaml(out)["model"]["source"] == str(tmp_path / "later")


def test_a_run_of_pretrain(tmp_path, tokenkit):
    words = [
        f"output={tmp_path / 'out'}",
        "tokenizer={train: {kind: bpe, vocab_size: 400}}",
        "model={model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
        "num_attention_heads: 2, num_key_value_heads: 2}",
        "data={source: {stdlib: train, max_bytes: 10000}}",
        "train={steps: 2, batch_size: 2, device: cpu}",
        "eval={source: {stdlib: held_out, max_bytes: 300}}",
    ]
    code, out, err = tokenkit("pretrain", *words, "--dry-run")
    assert code == 0, err
    assert "(a guess: the tokenizer is not learnt yet)" in out
    assert "# time per step, estimated" in out
    assert not (tmp_path / "out").exists()
