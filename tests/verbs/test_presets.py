"""Presets resolve without a network, have the weights that formulas say, and work when they are made small."""

import json
from pathlib import Path

import pytest

from tokenkit.config import UserError
from tokenkit.models.bitlinear import ternary_layers
from tokenkit.models.count import unique_parameters
from tokenkit.verbs.distill import distill
from tokenkit.verbs.presets import FAMILIES, preset_models, preset_names, preset_run, train_teacher


def gpt2(layers, width=768, vocab=50257, positions=1024):
    return (vocab + positions) * width + layers * (12 * width**2 + 13 * width) + 2 * width


def llama(layers, width, inner, heads, groups, vocab, *, tied, bias=0):
    head = width // heads
    attention = 2 * width**2 + 2 * width * head * groups + bias * (width + 2 * head * groups)
    return vocab * width * (1 if tied else 2) + layers * (attention + 3 * width * inner + 2 * width) + width


def phi(layers, width=2560, inner=10240, vocab=51200):
    block = 4 * (width**2 + width) + (width * inner + inner) + (inner * width + width) + 2 * width
    return vocab * width + layers * block + 2 * width + vocab * width + vocab


def phi3(layers):
    return llama(layers, 3072, 8192, 32, 32, 32064, tied=False)


PHI3_NORMS = 3 * 3072 + 8192  # before qkv, o, gate and up, down
COUNTS = {
    "distilgpt2": gpt2(6),
    "qwen-0.5b-bitnet": llama(24, 896, 4864, 14, 2, 151936, tied=True, bias=1) + 24 * (896 + 4864),
    "phi-3-mini-bitnet": phi3(32) + 32 * PHI3_NORMS,
    "phi-3-mini-short-bitnet": phi3(16) + 16 * PHI3_NORMS,
    "llama-3.1-bitnet": llama(32, 4096, 14336, 32, 8, 128256, tied=False) + 32 * (4096 + 14336),
    "smollm-135m-15-layers": 81_413_568,
    "smollm-360m": 81_413_568,
    "smollm-1.7b": 81_413_568,
    "phi-2": phi(16),
    "phi-3.5": phi3(16),
}
PUBLISHED = {  # the whole models
    "distilgpt2": 124_439_808,
    "qwen-0.5b-bitnet": 494_032_768,
    "phi-3-mini-bitnet": 3_821_079_552,
    "llama-3.1-bitnet": 8_030_261_248,
    "smollm-135m-15-layers": 134_515_008,
    "smollm-360m": 361_821_120,
    "smollm-1.7b": 1_711_376_384,
    "phi-2": 2_779_683_840,
    "phi-3.5": 3_821_079_552,
}


def test_every_preset_is_counted():
    assert preset_names() == sorted(COUNTS)
    assert COUNTS["distilgpt2"] == 81_912_576
    assert llama(15, 576, 1536, 9, 3, 49152, tied=True) == 81_413_568


@pytest.mark.parametrize("name", COUNTS)
def test_a_preset_resolves_and_has_the_weights(name):
    run = preset_run(name, ["train.seed=3"])
    assert run.train.seed == 3
    teacher, student = preset_models(name)
    assert unique_parameters(student) == COUNTS[name]
    assert unique_parameters(teacher) == PUBLISHED.get(name, phi3(32))
    assert {p.device.type for p in student.parameters()} == {"meta"}
    assert bool(ternary_layers(student)) == (run.ternary is not None)


def test_the_documented_weights_are_these():
    page = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text("utf-8")
    for name, count in COUNTS.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` ")]
        assert f" {count:,}" in row


def test_mistakes():
    with pytest.raises(UserError, match="did you mean 'distilgpt2'"):
        preset_run("distilgpt", [])
    with pytest.raises(UserError, match=r"'my.yaml': a run file beside preset=phi-2"):
        preset_run("phi-2", ["my.yaml"])
    assert set(FAMILIES) == {preset_run(name, []).model.source for name in preset_names()}


def test_a_dry_run_of_a_preset(tokenkit, tmp_path):
    code, out, error = tokenkit("distill", "--preset", "distilgpt2", "--smoke", "--dry-run", f"output={tmp_path / 'o'}")
    assert code == 0, error
    assert str(tmp_path / "o-teacher" / "model") in out
    assert not list(tmp_path.iterdir())
    code, _, error = tokenkit("distill", "--smoke", "--dry-run")
    assert code == 2
    assert "--smoke: goes with --preset" in error


SMALL = ("distilgpt2", "qwen-0.5b-bitnet", "phi-3-mini-short-bitnet", "llama-3.1-bitnet", "smollm-360m", "phi-2")


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_small_preset_trains_and_is_exported(name, tmp_path):
    run = preset_run(name, [f"output={tmp_path / 'run'}", "train.device=cpu"], smoke=True)
    train_teacher(name, run, quiet=True)
    results = distill(run, quiet=True)
    assert results["steps"] == 20
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    assert (tmp_path / "run/model/model.safetensors").is_file()
    ternary = json.loads((tmp_path / "run/ternary/config.json").read_text("utf-8")) if run.ternary else {}
    assert ternary.get("quantization_config", {}).get("quant_method") == ("bitnet" if run.ternary else None)
