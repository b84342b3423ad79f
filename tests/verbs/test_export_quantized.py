"""`tokenkit export format=int8` and its like from the command line: figures, mistakes in one line, and uploading."""

import json
import sys

import huggingface_hub
import pytest
import yaml
from transformers import AutoModelForCausalLM

from tokenkit.config import UserError, build
from tokenkit.export import quantized_verify
from tokenkit.models.load import quiet
from tokenkit.verbs.export import ExportRun, export


class Client:
    """Notes what it is asked to do."""

    calls: list = []

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))
        return f"hub://{repo_id}"

    def model_info(self, repo_id):
        return type("Info", (), {"private": True})()

    def upload_folder(self, **options):
        files = sorted(path.name for path in options["folder_path"].iterdir())
        self.calls.append(("upload", options["repo_id"], files))


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setattr(Client, "calls", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", Client)
    return Client


@pytest.fixture
def words(model_folder, corpus, tmp_path):
    source = [f"corpus.path={corpus}", "corpus.max_bytes=2000"]
    return ["export", f"model.source={model_folder}", f"output={tmp_path}/out", *source]


def test_the_figures_are_printed_and_the_folder_evaluated(tokenkit, words, corpus, tmp_path):
    code, out, _ = tokenkit(*words, "format=int8")
    found = yaml.safe_load(out)
    assert (code, found["format"], found["quantized_layers"]) == (0, "int8", 14)
    assert abs(found["rise"]) <= 0.01
    assert found["bytes"] < found["bytes_unquantized"]
    code, out, _ = tokenkit(
        "eval", f"model.source={tmp_path}/out", f"eval.source.path={corpus}", "eval.source.max_bytes=2000"
    )
    measured = yaml.safe_load(out)["bits_per_byte"]
    assert (code, measured) == (0, pytest.approx(found["bits_per_byte_after"], rel=1e-5))


def test_int4_through_the_command_line(tokenkit, words, tmp_path):
    pytest.importorskip("compressed_tensors")
    code, _, error = tokenkit(*words, "format=int4")
    assert (code, error.count("\n")) == (2, 1)
    assert "down_proj: 48 columns are no multiple of group_size 32; write skip=[down_proj]" in error
    code, out, _ = tokenkit(*words, "format=int4", "skip=[down_proj]", "max_rise=1")
    assert (code, yaml.safe_load(out)["quantized_layers"]) == (0, 12)
    code, _, error = tokenkit(*words, "format=int4")
    assert (code, error.count("\n"), "exists already" in error) == (2, 1, True)


@pytest.mark.parametrize(("format", "package"), [("int8", "torchao"), ("int4", "compressed_tensors")])
def test_without_the_package_it_is_named(tokenkit, words, tmp_path, monkeypatch, format, package):
    monkeypatch.setitem(sys.modules, package, None)
    code, _, error = tokenkit(*words, f"format={format}")
    name = package.replace("_", "-")
    assert (code, error.count("\n")) == (2, 1)
    assert f"needs {name}" in error
    assert f"pip install {name}" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("format=int9", "did you mean"),
        ("max_rise=-1", "max_rise"),
        ("format=int4 int4_layout=tiled device=cpu", "int4_layout=packed needs neither"),
        ("format=int8 push_to_hub=true", "write hub.repo_id=OWNER/NAME"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tokenkit, words, tmp_path, change, message):
    code, _, error = tokenkit(*words, *([] if "format" in change else ["format=int8"]), *change.split())
    assert (code, error.count("\n")) == (2, 1)
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_answers_otherwise_is_one_line(tokenkit, words, model_folder, tmp_path, monkeypatch):
    def other(folder, device):
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(model_folder)
        model.model.norm.weight.data *= 2
        return model

    monkeypatch.setattr(quantized_verify, "load_stock", other)
    code, _, error = tokenkit(*words, "format=int8")
    assert (code, error.count("\n")) == (2, 1)
    assert "nothing was written" in error
    assert list(tmp_path.iterdir()) == []


def run_of(model_folder, tmp_path, **changes):
    values = {"model": {"source": str(model_folder)}, "format": "huggingface", "output": str(tmp_path / "small")}
    return build(ExportRun, values | changes)


def test_nothing_is_uploaded_unless_told_to(model_folder, tmp_path, client):
    export(run_of(model_folder, tmp_path, hub={"repo_id": "me/small"}))
    assert client.calls == []
    assert not (tmp_path / "small/README.md").exists()


def test_an_upload_is_private_and_has_a_card_of_facts(model_folder, tmp_path, client):
    figures = export(
        run_of(model_folder, tmp_path, format="int8", push_to_hub=True, hub={"repo_id": "me/small"}, max_rise=1.0)
    )
    (made, _, options), (sent, name, files) = client.calls
    assert (made, sent, name, figures["hub"]) == ("create", "upload", "me/small", "hub://me/small")
    assert options == {"private": True, "exist_ok": True}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {*files}
    card = (tmp_path / "small/README.md").read_text("utf-8")
    assert "| bits per byte after |" in card
    assert "library_name: transformers" in card
    assert str(model_folder) not in card


def test_one_file_is_no_folder_to_upload(model_folder, tmp_path, client):
    with pytest.raises(UserError, match="only a folder is uploaded"):
        run_of(
            model_folder, tmp_path, format="gguf", output=str(tmp_path / "x.gguf"), push_to_hub=True,
            hub={"repo_id": "me/small"},
        )  # fmt: skip
    assert client.calls == []


def test_shards_of_an_ordinary_folder(tokenkit, words, tmp_path):
    code, _, _ = tokenkit(*words, "format=huggingface", "max_shard_bytes=20000")
    assert code == 0
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = {*index["weight_map"].values()}
    assert len(files) > 1
    assert all((tmp_path / "out" / name).stat().st_size < 80_000 for name in files)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
