"""`tokenkit export`: a folder in, another container out; what is forced is measured, what is wrong is one line."""

import json

import pytest
import yaml

from tokenkit.config import build
from tokenkit.export.ternary import export_latent
from tokenkit.models.ternary import TernaryConfig, attach_ternary
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.verbs.export import ExportRun, export
from tokenkit.verbs.model import ModelChoice, load_pair


def test_a_dense_model_as_ordinary_folder_and_as_gguf(tokenkit, model_folder, tmp_path):
    code, out, _ = tokenkit("export", f"model.source={model_folder}", "format=gguf", f"output={tmp_path}/x.gguf")
    found = yaml.safe_load(out)
    assert (code, found["type"], found["architecture"], found["pre"]) == (0, "f16", "llama", "dbrx")
    code, _, _ = tokenkit(
        "export", f"model.source={model_folder}", "format=huggingface", f"output={tmp_path}/hf", "dtype=bfloat16"
    )
    assert code == 0
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"


def test_rounding_without_training_has_to_be_forced_and_says_what_it_cost(tokenkit, model_folder, corpus, tmp_path):
    words = ["export", f"model.source={model_folder}", "format=ternary", f"output={tmp_path}/t"]
    code, _, error = tokenkit(*words)
    assert (code, error.count("\n")) == (2, 1)
    assert "force_ptq=true" in error
    code, out, _ = tokenkit(*words, "force_ptq=true", f"corpus.path={corpus}", "corpus.max_bytes=2000")
    found = yaml.safe_load(out)
    assert code == 0
    assert found["damage"]["kl_nats_per_token"] > 0
    assert found["damage"]["bits_per_byte_after"] != found["damage"]["bits_per_byte_before"]
    assert found["ternary_layers"] == 14
    code, out, _ = tokenkit("export", f"model.source={tmp_path}/t", "format=unpacked", f"output={tmp_path}/dense")
    assert (code, yaml.safe_load(out)["ternary_layers"]) == (0, 14)
    code, _, error = tokenkit("export", f"model.source={tmp_path}/t", "format=latent", f"output={tmp_path}/l")
    assert (code, error.count("\n")) == (2, 1)
    assert "nothing left to train" in error


def test_latent_weights_are_where_the_other_formats_begin(model_folder, tmp_path):
    model, tokenizer = load_pair(ModelChoice(source=str(model_folder)), "cpu")
    attach_ternary(model, TernaryConfig(sub_norm="o_down", calibrate=False))
    export_latent(model, tokenizer, tmp_path / "latent")
    base = {"model": {"source": str(tmp_path / "latent")}}
    packed = export(build(ExportRun, {**base, "format": "ternary", "output": str(tmp_path / "packed")}))
    assert (packed["model_type"], packed["close_positions"] >= 0.95) == ("bitnet", True)
    written = export(build(ExportRun, {**base, "format": "gguf", "type": "f16", "output": str(tmp_path / "x.gguf")}))
    assert written["architecture"] == "bitnet"
    again = export(build(ExportRun, {**base, "format": "latent", "output": str(tmp_path / "again")}))
    assert again["typical_difference"] <= 1e-6
    assert load_tokenizer(str(tmp_path / "again")).vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["format=onyx"], "format"),
        (["format=gguf", "type=q9"], "type"),
        (["format=huggingface", "shards=3"], "unknown key"),
    ],
)
def test_mistakes_in_a_run_are_one_line(tokenkit, model_folder, tmp_path, words, message):
    code, _, error = tokenkit("export", f"model.source={model_folder}", f"output={tmp_path}/x", *words)
    assert (code, error.count("\n")) == (2, 1)
    assert message in error
    assert list(tmp_path.iterdir()) == []
