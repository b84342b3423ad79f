"""`tokenkit inspect`: every element of a difference in size has a cause, and the causes add up."""

import json
import os
import struct

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from tokenkit.eval.size_difference import difference
from tokenkit.models.count import inventory_of

LLAMA = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 90}


def gpt2_shapes(layers):
    """Names and shapes of GPT-2 as its first files had them, without the prefix of the body."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=layers))
    return {name.removeprefix("transformer."): tuple(p.shape) for name, p in model.named_parameters()}


def write_sparse(folder, shapes, layers, dtype="F32", **config):
    """A folder whose safetensors file has a header and a hole where the numbers would be: inspect reads no number."""
    folder.mkdir()
    header, end, size = {}, 0, {"F32": 4, "BF16": 2}[dtype]
    for name, shape in shapes.items():
        length = size * int(torch.tensor(shape).prod())
        header[name] = {"dtype": dtype, "shape": [*shape], "data_offsets": [end, end + length]}
        end += length
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + end)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": layers, **config}), "utf-8")
    return folder


def masks(layers):
    return {f"h.{layer}.attn.bias": (1, 1, 1024, 1024) for layer in range(layers)}


def asked(tokenkit, *words):
    code, out, error = tokenkit("inspect", *words, "--json")
    assert code == 0, error
    return json.loads(out)


def adds_up(found):
    causes = {cause["cause"]: cause["elements"] for cause in found["causes"]}
    assert sum(causes.values()) == found["a"]["stored_elements"] - found["b"]["stored_elements"]
    return causes


@pytest.mark.parametrize(("layers", "elements", "percent"), [(6, 6_291_456, "7.13 %"), (12, 12_582_912, "9.18 %")])
def test_an_old_gpt2_file_holds_causal_masks(tokenkit, tmp_path, layers, elements, percent):
    shapes = gpt2_shapes(layers)
    old = write_sparse(tmp_path / "old", {**shapes, **masks(layers)}, layers)
    new = write_sparse(tmp_path / "new", shapes, layers)
    found = asked(tokenkit, old, new)
    parameters = {6: 81_912_576, 12: 124_439_808}[layers]
    assert found["a"]["parameters"] == found["b"]["parameters"] == found["b"]["stored_elements"] == parameters
    assert found["a"]["stored_elements"] == parameters + elements
    assert found["a"]["stored_bytes"] == 4 * (parameters + elements)
    assert adds_up(found) == {"causal-mask buffers": elements}
    assert f"{elements:,} elements more ({percent}" in found["causes"][0]["sentence"]
    assert found["causes"][0]["patterns"] == ["h.*.attn.bias"]
    assert found["sentences"][0] == f"Both have {parameters:,} parameters."
    code, out, _ = tokenkit("inspect", old, new)
    assert code == 0
    assert percent in " ".join(out.split())
    assert adds_up(asked(tokenkit, new, old)) == {"causal-mask buffers": -elements}
    assert adds_up(asked(tokenkit, old, f"gpt2:n_layer={layers}")) == {"causal-mask buffers": elements}


def test_a_head_stored_twice_is_tying(tokenkit, tmp_path):
    shapes = gpt2_shapes(2)
    twice = write_sparse(tmp_path / "twice", {**shapes, "lm_head.weight": (50257, 768)}, 2)
    once = write_sparse(tmp_path / "once", shapes, 2)
    found = asked(tokenkit, twice, once)
    assert adds_up(found) == {"tied duplicate": 50257 * 768}
    assert found["a"]["parameters"] == found["b"]["parameters"]
    assert found["causes"][0]["patterns"] == ["lm_head.weight"]
    assert "shares with the input embedding" in found["causes"][0]["sentence"]


def test_half_the_bytes_is_a_type(tokenkit, tmp_path):
    shapes = gpt2_shapes(2)
    full = write_sparse(tmp_path / "full", shapes, 2)
    half = write_sparse(tmp_path / "half", shapes, 2, "BF16")
    found = asked(tokenkit, full, half)
    assert found["causes"] == []
    assert found["a"]["stored_bytes"] == 2 * found["b"]["stored_bytes"]
    assert "dtype: A stores float32, B bfloat16" in found["sentences"][-1]


@pytest.mark.parametrize(
    ("a", "b", "causes"),
    [
        ("gpt2:n_layer=6", "gpt2", {"layers": -6 * 7_087_872}),
        ("gpt2", "gpt2:n_positions=512", {"position table": 512 * 768}),
        ("gpt2:vocab_size=50304", "gpt2", {"vocabulary": 47 * 768}),
        ("gpt2", "gpt2:tie_word_embeddings=false", {"output matrix": -50257 * 768}),
        ("gpt2", "gpt2", {}),
        ("gpt2:n_inner=1536", "gpt2", {"sizes": -12 * 1536 * (2 * 768 + 1)}),
    ],
)
def test_causes_between_configurations(tokenkit, a, b, causes):
    assert adds_up(asked(tokenkit, a, b)) == causes


@pytest.mark.parametrize(
    "b",
    [
        {"hidden_size": 16, "num_hidden_layers": 5, "vocab_size": 40},
        {"tie_word_embeddings": True, "num_key_value_heads": 2, "mlp_bias": True},
    ],
)
def test_several_causes_at_once_add_up(tmp_path, b):
    for name, changes in (("a", {}), ("b", b)):
        AutoModelForCausalLM.from_config(LlamaConfig(**{**LLAMA, **changes})).save_pretrained(tmp_path / name)
    one, two = inventory_of(str(tmp_path / "a")), inventory_of(str(tmp_path / "b"))
    there, back = difference(one, two), difference(two, one)
    assert sum(cause.elements for cause in there.causes) == one.stored_elements - two.stored_elements
    assert len(there.causes) > 1
    mirrored = {"tensors of A alone": "tensors of B alone", "tensors of B alone": "tensors of A alone"}
    found = {cause.cause: cause.elements for cause in back.causes}
    for cause in there.causes:
        if cause.cause in ("layers", "vocabulary", "sizes"):  # which of two changes counts first depends on the side
            assert (found[cause.cause] < 0) == (cause.elements > 0)
        else:
            assert found[mirrored.get(cause.cause, cause.cause)] == -cause.elements


def test_two_architectures_have_tensors_of_their_own(tokenkit):
    shape = "hidden_size=768,intermediate_size=3072,num_attention_heads=12,num_hidden_layers=12"
    found = adds_up(asked(tokenkit, "gpt2", f"llama:{shape}"))
    assert found["position table"] == 1024 * 768
    assert found["tensors of A alone"] > 0 > found["tensors of B alone"]


def test_one_alone_and_the_run_file(tokenkit, tmp_path):
    found = asked(tokenkit, "gpt2:n_layer=6")
    assert found["parameters"] == sum(g["elements"] for g in found["groups"] if g["kind"] == "trainable") == 81_912_576
    code, out, _ = tokenkit("inspect", "gpt2:n_layer=6")
    assert code == 0
    assert "81,912,576 parameters, each once" in out
    run = tmp_path / "run.yaml"
    run.write_text("a: gpt2:n_layer=6\nb: gpt2\n", "utf-8")
    assert asked(tokenkit, run) == asked(tokenkit, "gpt2:n_layer=6", "gpt2") == asked(tokenkit, run, "b=gpt2")
    assert tokenkit("inspect", "a=gpt2")[0] == 0


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ((), "a: missing"),
        (("gpt2", "gpt2", "gpt2"), "3 words"),
        (("gpt9",), "no causal language model"),
        (("gpt2", "gpt2:n_layers=1"), "did you mean 'n_layer'"),
        (("gpt2", "./nowhere"), "no such folder"),
    ],
)
def test_mistakes_are_one_line(tokenkit, words, part):
    code, out, error = tokenkit("inspect", *words)
    assert (code, out) == (2, "")
    assert error.count("\n") == 1, error
    assert part in error
