"""ONNX files answer as the model does, in onnxruntime alone, at any batch, length and cache; else there is no file."""

import copy
import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from transformers import PreTrainedModel

from tokenkit.config import UserError, build
from tokenkit.export import onnx_file
from tokenkit.export.onnx_file import export_onnx
from tokenkit.export.verify import ExportError
from tokenkit.models.expand import attach_expansion, old_inputs
from tokenkit.models.generate import generate
from tokenkit.models.lora import attach_lora
from tokenkit.verbs.export import ExportRun, export

WORKER = Path(__file__).parents[2] / "benchmarks/onnx_worker.py"
TEXTS = ["the cat sat on", "a mat and then ran home to see who", "it"]
SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 400,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
FAMILIES = {
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": 40},
    "Gemma2": {"head_dim": 8, "sliding_window": 40, "query_pre_attn_scalar": 8},
    "Gemma3": {"head_dim": 8, "sliding_window": 40},
    "GPT2": {"bos_token_id": None},
    "GPTNeoX": {},
    "Phi": {},
    "Cohere": {"eos_token_id": 1},
    "Mixtral": {"num_local_experts": 4},
}


def make(family: str, **options: object) -> PreTrainedModel:
    """A random model of two layers, its logits far from equal."""
    config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config"))
    model = getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(config(**{**SIZES, **options})).eval()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Grouped heads, a tied head, 80 rows more than there are tokens, and one layer, for the time it takes."""
    return make("Llama", vocab_size=400, tie_word_embeddings=True, num_hidden_layers=1)


@pytest.fixture(scope="module")
def made(model, bpe, tmp_path_factory):
    """The folder, its figures, and the graph, which is made once."""
    graphs, folder = [], tmp_path_factory.mktemp("onnx") / "new/model"
    with pytest.MonkeyPatch.context() as patch:
        converted = onnx_file.converted
        patch.setattr(onnx_file, "converted", lambda *given: graphs.append(converted(*given)) or graphs[-1])
        figures = export_onnx(model, bpe, folder)
    return folder, figures, graphs[0]


@pytest.fixture
def remembered(made, monkeypatch):
    """Makes exports of the model quick."""
    monkeypatch.setattr(onnx_file, "trace", lambda *given: None)
    monkeypatch.setattr(onnx_file, "converted", lambda *given: made[2])


def test_a_folder_has_what_consumers_look_for(made):
    folder, figures, _ = made
    names = ["config.json", "generation_config.json", "model.onnx", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(file.name for file in folder.iterdir()) == names
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    graph = onnx.load(folder / "model.onnx").graph
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    past = ["past_key_values.0.key", "past_key_values.0.value"]
    assert [value.name for value in graph.input] == ["input_ids", "attention_mask", "position_ids", *past]
    assert [value.name for value in graph.output] == ["logits", "present.0.key", "present.0.value"]
    rows = ["batch_size", "sequence_length"]
    assert shapes["input_ids"] == shapes["position_ids"] == rows
    assert shapes["attention_mask"] == ["batch_size", "past_sequence_length + sequence_length"]
    assert shapes["logits"] == [*rows, 400]
    assert {tuple(shapes[name]) for name in past} == {("batch_size", 2, "past_sequence_length", 8)}
    assert {node.domain for node in graph.node} == {""}
    assert len(graph.initializer) < 40
    assert figures["bytes"]["model.onnx"] == (folder / "model.onnx").stat().st_size


def test_a_tied_matrix_is_stored_once_and_no_paths_are(model, made):
    file = made[0] / "model.onnx"
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert weights < file.stat().st_size < weights + 40_000
    assert b".py" not in file.read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in file.read_bytes()


def test_left_padding_and_any_cut_of_a_text_change_nothing(model, made):
    session = onnxruntime.InferenceSession(made[0] / "model.onnx")
    names = [value.name for value in session.get_inputs()]
    ids = np.random.default_rng(0).integers(0, 400, (3, 50))
    mask = (np.arange(50) >= np.array([[0], [13], [49]])).astype(np.int64)
    with torch.no_grad():
        alone = [torch.tensor(row[keep == 1][None]) for row, keep in zip(ids, mask, strict=True)]
        wanted = [model(row).logits[0].numpy() for row in alone]
    for cuts in ((0, 50), (0, 1, 2, 3, 50), (0, 31, 49, 50)):
        states, logits = [np.zeros((3, 2, 0, 8), np.float32)] * 2, []
        for start, end in pairwise(cuts):
            positions = (mask[:, :end].cumsum(1) - 1).clip(0)[:, start:]
            given = zip(names, [ids[:, start:end], mask[:, :end], positions, *states], strict=True)
            said, *states = session.run(None, dict(given))
            logits.append(said)
        for row, keep, expected in zip(np.concatenate(logits, 1), mask, wanted, strict=True):
            np.testing.assert_allclose(row[keep == 1], expected, atol=1e-4 * np.abs(expected).max())


def test_a_process_without_tokenkit_writes_the_same(model, bpe, made, tmp_path):
    (tmp_path / "prompts.json").write_text(json.dumps(TEXTS), "utf-8")
    command = [
        sys.executable,
        "-c",
        "import sys, runpy; sys.modules['tokenkit'] = sys.modules['torch'] = None; "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')",
    ]
    subprocess.run([*command, WORKER, made[0], tmp_path / "prompts.json", "24", tmp_path / "out.json"], check=True)
    found = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert found["tokens"] >= sum(map(len, found["ids"])) > 24
    ours = generate(model, bpe, TEXTS, max_new_tokens=24)  # without half a character at the end
    half = "\N{REPLACEMENT CHARACTER}"
    assert [text.rstrip(half) for text in found["texts"]] == [text.rstrip(half) for text in ours]


def test_one_file_alone_and_weights_beside_it_where_they_are_large(model, bpe, remembered, tmp_path, monkeypatch):
    figures = export_onnx(model, bpe, tmp_path / "small.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["small.onnx"] == list(figures["bytes"])
    monkeypatch.setattr(onnx_file, "LARGEST", 1000)
    figures = export_onnx(model, bpe, tmp_path / "large.onnx")
    assert list(figures["bytes"]) == ["large.onnx", "large.onnx_data"]
    assert figures["bytes"]["large.onnx_data"] > figures["bytes"]["large.onnx"]
    onnxruntime.InferenceSession(tmp_path / "large.onnx")
    (tmp_path / "large.onnx").unlink()
    before = sorted(file.name for file in tmp_path.iterdir())
    with pytest.raises(UserError, match=r"large\.onnx_data: exists already"):
        export_onnx(model, bpe, tmp_path / "large.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == before


def stopped(*given: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupted(*given: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["x", "x.onnx"])
@pytest.mark.parametrize(("end", "error"), [(stopped, SystemExit), (interrupted, KeyboardInterrupt)])
def test_an_interruption_leaves_nothing(model, bpe, remembered, tmp_path, monkeypatch, name, end, error):
    monkeypatch.setattr(onnx_file, "verify_graph", end)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(error):
        export_onnx(model, bpe, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize("name", ["x", "x.onnx"])
def test_a_graph_that_answers_otherwise_is_refused(model, bpe, remembered, tmp_path, name):
    changed = copy.deepcopy(model)  # the remembered graph is that of the model before
    changed.get_parameter("model.layers.0.mlp.up_proj.weight").data *= 1.01
    with pytest.raises(ExportError, match=r"logits differ by .* alone, .* allowed"):
        export_onnx(changed, bpe, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_one_line_each(model, dense_model, ternary_model, bpe, tmp_path):
    path = tmp_path / "x"
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    mixed = make("Llama")
    mixed.config.layer_types = ["full_attention", "chunked_attention"]
    expanded = dense_model()
    attach_expansion(expanded, *old_inputs(model, bpe.token_bytes))
    cases = [
        (ternary_model(), {}, "the model is ternary; write format=gguf or ternary"),
        (expanded, {}, "added to the model's inputs .* write format=huggingface"),
        (dense_model(vocab_size=300), {}, "300 embedding rows for 320 token ids"),
        (dense_model(), {"dtype": torch.bfloat16}, "bfloat16 is not for graphs; write float32 or float16"),
        (make("Llama", rope_parameters=dynamic), {}, "llama model .*rope_type dynamic .* write format=huggingface"),
        (mixed, {}, r"a llama model .* \(layers of kind chunked_attention\); write format=huggingface"),
        (make("Mamba", state_size=4), {}, "a mamba model .* other things than keys and values"),
    ]
    for one, options, message in cases:
        with pytest.raises(UserError, match=message) as error:
            export_onnx(one, bpe, path, **options)
        assert "\n" not in str(error.value)
    path.touch()
    with pytest.raises(UserError, match="exists already"):
        export_onnx(dense_model(), bpe, path)
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_traced_says_so(dense_model, bpe, tmp_path, monkeypatch):
    model = dense_model(num_hidden_layers=1)
    forward = type(model.model.norm).forward
    monkeypatch.setattr(type(model.model.norm), "forward", lambda self, x: forward(self, x) if x.sum() > 0 else x)
    with pytest.raises(
        UserError, match=r"a llama model cannot be written as a graph \(.*; write format=huggingface"
    ) as error:
        export_onnx(model, bpe, tmp_path / "x")
    assert "\n" not in str(error.value)
    assert (list(tmp_path.iterdir()), model.config._attn_implementation) == ([], "sdpa")


def run(folder: Path, output: Path, **keys: object) -> ExportRun:
    """A run file of the verb."""
    return build(ExportRun, {"model": {"source": str(folder)}, "format": "onnx", "output": str(output), **keys})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dynamic_axes": False}, "write sequence_length=128"),
        ({"sequence_length": 64}, "only with dynamic_axes=false"),
        ({"dtype": "bfloat16"}, "write float32 or float16"),
    ],
)
def test_mistakes_in_a_run_are_one_line(model_folder, tmp_path, keys, message):
    with pytest.raises(UserError, match=message) as error:
        export(run(model_folder, tmp_path / "x.onnx", **keys))
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(UserError, match=r"needs onnxruntime .*; pip install onnxruntime"):
        export(run(model_folder, tmp_path / "x"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_windows_norms_and_experts_of_their_own(bpe, tmp_path, family):
    figures = export_onnx(make(family, **FAMILIES[family]), bpe, tmp_path / "x")
    inputs = onnxruntime.InferenceSession(tmp_path / "x/model.onnx").get_inputs()
    assert [value.name for value in inputs[-2:]] == ["past_key_values.1.key", "past_key_values.1.value"]
    assert figures["logit_difference"] < figures["tolerance"] / 10


@pytest.mark.slow
def test_fixed_shapes_float16_and_merged_adapters(bpe, tmp_path):
    model = make("Llama")
    figures = export_onnx(model, bpe, tmp_path / "fixed.onnx", length=32)
    shapes = [value.shape for value in onnxruntime.InferenceSession(tmp_path / "fixed.onnx").get_inputs()]
    assert (shapes, "generated_tokens" in figures) == ([[1, 32]] * 3, False)
    assert export_onnx(model, bpe, tmp_path / "half", dtype=torch.float16)["dtype"] == "float16"
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "float16"
    attach_lora(model, rank=4, alpha=8.0)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data += 0.1
    assert export_onnx(model, bpe, tmp_path / "merged.onnx")["logit_difference"] < figures["tolerance"]
