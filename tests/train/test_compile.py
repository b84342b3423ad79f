"""Compiled in place: the same losses, the same checkpoints, and a run that goes on where it does not work."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import torch._dynamo
from safetensors.torch import load_file
from test_checkpoint import final, run_file

from tokenkit.config import UserError, build
from tokenkit.train.checkpoint import list_checkpoints
from tokenkit.train.compile import Compiled
from tokenkit.train.loop import Interrupted
from tokenkit.train.schema import TrainConfig
from tokenkit.verbs.distill import distill

LOSSES = {"alm": {}, "clm": {"weight": 0.3}}
OPTIONS = {"steps": 5, "eval_at": [0, 5], "mode": "full", "accumulation": 1}


@pytest.fixture(autouse=True)
def _fresh():
    yield
    torch._dynamo.reset()


def run(tmp_path, model_folder, corpus, name, losses=LOSSES, **train):
    made = run_file(tmp_path, model_folder, corpus, name, **{**OPTIONS, **train})
    made = build(type(made), made.model_dump(mode="json") | {"losses": losses})
    distill(made, quiet=True)
    return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text("utf-8").splitlines()]


def losses_of(rows):
    return [row["loss"] for row in rows if "loss" in row]


def check_same(tmp_path, model_folder, corpus, compile, **options):
    eager = run(tmp_path, model_folder, corpus, "eager", **options)
    found = run(tmp_path, model_folder, corpus, "compiled", compile=compile, **options)
    assert losses_of(found) == pytest.approx(losses_of(eager), abs=1e-4)
    assert len(losses_of(found)) == 5
    lines = [row for row in found if "loss" in row]
    assert all(row["compile/graphs"] > 0 and row["compile/graph_breaks"] >= 0 for row in lines)
    assert not any("compile/graphs" in row for row in eager)
    one, other = final(tmp_path / "eager"), final(tmp_path / "compiled")
    assert one.keys() == other.keys()
    exported = [load_file(tmp_path / name / "model/model.safetensors") for name in ("eager", "compiled")]
    assert exported[0].keys() == exported[1].keys()
    assert not any("_orig_mod" in name for name in [*other, *exported[1]])
    return found


@pytest.mark.parametrize("regional", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_five_steps_are_the_same_compiled(tmp_path, model_folder, corpus, regional):
    check_same(tmp_path, model_folder, corpus, {"backend": "eager", "regional": regional, "teacher": True})


@pytest.mark.slow
def test_losses_that_look_into_layers_are_the_same_compiled(tmp_path, model_folder, corpus):
    losses = {"hidden_states": {"states": "qkv", "normalization": "l2"}, "clm": {}}
    check_same(tmp_path, model_folder, corpus, {"backend": "eager"}, losses=losses)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_five_steps_are_the_same_with_inductor(tmp_path, model_folder, corpus):
    check_same(tmp_path, model_folder, corpus, {"backend": "inductor"})


def test_a_run_begun_compiled_goes_on_without(tmp_path, model_folder, corpus):
    made = run_file(tmp_path, model_folder, corpus, "run", **OPTIONS, compile={"backend": "eager"}, stop_after=3)
    with pytest.raises(Interrupted):
        distill(made, quiet=True)
    eager = run_file(tmp_path, model_folder, corpus, "eager", **OPTIONS, stop_after=3)
    with pytest.raises(Interrupted):
        distill(eager, quiet=True)
    checkpoint = list_checkpoints(tmp_path / "run/checkpoints")[0]
    target = list_checkpoints(tmp_path / "eager/checkpoints")[0]
    shutil.rmtree(target)
    shutil.copytree(checkpoint, target)
    values = eager.model_dump(mode="json")
    values["train"]["stop_after"] = None
    assert distill(build(type(eager), values), resume=True, quiet=True)["steps"] == 5


def failing(graph, inputs):
    raise RuntimeError("this backend has no bits left")


def test_where_the_compiler_fails_the_run_goes_on_without(tmp_path, model_folder, corpus, caplog):
    torch._dynamo.register_backend(failing, name="failing")
    eager = run(tmp_path, model_folder, corpus, "eager")
    found = run(tmp_path, model_folder, corpus, "failing", compile={"backend": "failing"})
    assert losses_of(found) == losses_of(eager)
    assert caplog.text.count("train.compile: does not work here") == 1
    assert "this backend has no bits left" in caplog.text


def test_other_failures_are_not_the_compilers():
    run = Compiled([torch.nn.Linear(2, 2)])

    def broken():
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        run.attempt(broken)
    assert run.modules


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"compile": {}}, r"train.compile: is for language models; leave it out here"),
        ({"liger": True}, r"train.liger: is for language models; write false here"),
    ],
)
def test_what_an_auto_encoder_has_not_is_one_line(pretrain, train, words):
    with pytest.raises(UserError, match=words) as caught:
        pretrain("run", **train)
    assert "\n" not in str(caught.value)


def test_a_backend_that_torch_does_not_know_is_one_line(tmp_path, model_folder, corpus):
    with pytest.raises(UserError, match=r"'inducter' is not known here; write one of .*inductor") as caught:
        run(tmp_path, model_folder, corpus, "run", compile={"backend": "inducter"})
    assert "\n" not in str(caught.value)


def test_neftune_needs_the_embedding_outside_of_what_is_compiled():
    with pytest.raises(UserError, match=r"train.noise.neftune: needs train.compile.regional=true"):
        build(TrainConfig, {"steps": 1, "compile": {"regional": False}, "noise": {"neftune": 5.0}})


def test_liger_is_refused_in_one_line_where_it_cannot_be(tmp_path, model_folder, corpus, monkeypatch):
    with pytest.raises(UserError, match=r"train.liger: liger-kernel is not installed; take the extra `gpu`"):
        run(tmp_path, model_folder, corpus, "none", liger=True)
    assert not (tmp_path / "none/checkpoints").exists()
    monkeypatch.setattr("tokenkit.train.compile.installed", lambda: frozenset({"liger_kernel"}))
    with pytest.raises(UserError, match=r"train.liger: its kernels run on CUDA, not on cpu"):
        run(tmp_path, model_folder, corpus, "cpu", liger=True)


BLOCKED = """
import sys
sys.modules.update(dict.fromkeys(("liger_kernel", "triton", "cut_cross_entropy")))
import tokenkit.train.loop, tokenkit.verbs.distill
from tokenkit.fused import installed
assert installed() == frozenset()
"""


@pytest.mark.slow  # a second process imports everything anew
def test_the_package_is_imported_where_liger_and_triton_are_blocked():
    found = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
