"""Programs of torch.export answer as the model does, hold nothing pickled, and need none of our code."""

import json
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch

from tokenkit.config import UserError, build
from tokenkit.export import torch_export
from tokenkit.export.torch_export import export_torch
from tokenkit.export.verify import ExportError
from tokenkit.verbs.export import ExportRun, export


@pytest.fixture
def no_pickles(monkeypatch):
    """Nothing is unpickled inside."""

    def refuse(*given: object, **options: object) -> None:
        raise AssertionError("unpickled")

    for owner, name in ((torch, "load"), (pickle, "loads"), (pickle, "load"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, refuse)


def test_a_program_answers_and_nothing_is_unpickled(dense_model, bpe, tmp_path, no_pickles):
    model, path = dense_model(num_hidden_layers=1), tmp_path / "new/x.pt2"
    figures = export_torch(model, bpe, path)
    assert figures["logit_difference"] < figures["tolerance"] / 10
    assert (figures["bytes"], figures["dtype"]) == (path.stat().st_size, "float32")
    assert [file.name for file in path.parent.iterdir()] == ["x.pt2"]
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    assert not any(b".py" in part for name, part in parts.items() if name.endswith(".json"))
    program = torch.export.load(path).module()
    ids, mask = torch.arange(12).reshape(2, 6), torch.ones(2, 6, dtype=torch.long)
    with torch.no_grad():
        wanted = model(ids).logits[:, 4:]
        _, past = program(ids[:, :4], mask[:, :4], torch.arange(4).repeat(2, 1), [(torch.zeros(2, 2, 0, 8),) * 2])
        logits, past = program(ids[:, 4:], mask, torch.arange(4, 6).repeat(2, 1), past)
    assert past[0][0].shape == (2, 2, 6, 8)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="exists already"):
        export_torch(model, bpe, path)


def test_a_fixed_shape_and_failures_that_leave_nothing(dense_model, bpe, model_folder, tmp_path, monkeypatch):
    model, traced, programs = dense_model(num_hidden_layers=1), torch_export.trace, []
    monkeypatch.setattr(torch_export, "trace", lambda *given: programs.append(traced(*given)) or programs[-1])
    export_torch(model, bpe, tmp_path / "fixed.pt2", length=16)
    program = torch.export.load(tmp_path / "fixed.pt2").module()
    row = torch.arange(16).unsqueeze(0)
    logits, past = program(row, torch.ones_like(row), row, [])
    torch.testing.assert_close(logits, model(row).logits, rtol=1e-4, atol=1e-4)
    assert past == []
    (tmp_path / "fixed.pt2").unlink()
    monkeypatch.setattr(torch_export, "trace", lambda *given: programs[0])
    with pytest.raises(ExportError, match=r"x\.pt2: logits differ by .* padded"):
        export_torch(dense_model(num_hidden_layers=1, rms_norm_eps=0.1), bpe, tmp_path / "x.pt2", length=16)
    monkeypatch.setattr(torch_export, "_refuse_pickles", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_torch(model, bpe, tmp_path / "x.pt2", length=16)
    keys = {"model": {"source": str(model_folder)}, "format": "torch_export", "output": str(tmp_path / "x.pt")}
    with pytest.raises(UserError, match=r"write a file name that ends in \.pt2"):
        export(build(ExportRun, keys))
    assert list(tmp_path.iterdir()) == []


def interrupted(*given: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x/data/sample_inputs/model.pt", "anything"),
        (
            "x/data/weights/model_weights_config.json",
            '{"config": {"a": {"use_pickle": false}, "b": {"use_pickle": true}}}',
        ),
    ],
)
def test_what_would_be_unpickled_is_refused(tmp_path, name, content):
    with zipfile.ZipFile(tmp_path / "x.pt2", "w") as archive:
        archive.writestr(name, content)
    with pytest.raises(ExportError, match=f"{name} holds pickled objects"):
        torch_export._refuse_pickles(tmp_path / "x.pt2")


READER = """
import sys
sys.modules["tokenkit"] = sys.modules["transformers"] = None  # neither can be imported
import torch
program, row = torch.export.load(sys.argv[1]).module(), torch.arange(6).unsqueeze(0)
past = [(torch.zeros(1, 2, 0, 8),) * 2] * 2
with torch.no_grad():
    print(program(row, torch.ones_like(row), row, past)[0].argmax(-1).flatten().tolist())
"""


@pytest.mark.slow
def test_a_process_without_transformers_reads_it(dense_model, bpe, tmp_path):
    model = dense_model("qwen2")
    export_torch(model, bpe, tmp_path / "x.pt2")
    command = [sys.executable, "-c", READER, tmp_path / "x.pt2"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert json.loads(found) == model(torch.arange(6).unsqueeze(0)).logits[0].argmax(-1).tolist()


@pytest.mark.slow
def test_float16(dense_model, bpe, tmp_path):
    figures = export_torch(dense_model(), bpe, tmp_path / "x.pt2", dtype=torch.float16)
    assert (figures["dtype"], figures["generated_tokens"]) == ("float16", 80)
