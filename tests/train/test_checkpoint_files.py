"""One file a checkpoint: whole or not there, compared by number, the best and the final one for ever."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import nullcontext

import pytest
import torch

from tokenkit.config import UserError
from tokenkit.tokenizers.autoencoder import bundle
from tokenkit.tokenizers.autoencoder.bundle import MEMBERS, STATE, read_bundle, read_network, read_state, write_bundle
from tokenkit.train.balance import Balance
from tokenkit.train.checkpoint import Progress, Training
from tokenkit.train.checkpoint_files import BEST, FINAL, Identity, StepFiles, step_files
from tokenkit.train.loop import Interrupted, is_enough, judged
from tokenkit.train.optimizer import build_optimizer
from tokenkit.train.schema import BestConfig, EarlyStoppingConfig, LoopConfig, OptimizerConfig

IDENTITY = Identity("config", "data", {"network": {}}, "accuracy")


def files_of(folder, identity=IDENTITY, **options):
    return StepFiles(folder, identity, lambda name: {}, **options)


def trained(seed=0):
    torch.manual_seed(seed)
    parameters = {"w": torch.nn.Parameter(torch.randn(4, 3)), "b": torch.nn.Parameter(torch.randn(3))}
    optimizer = build_optimizer(parameters, OptimizerConfig())
    sum((p**2).sum() for p in parameters.values()).backward()
    optimizer.step()
    return Training(parameters, optimizer, Balance(), {})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def state_of(folder):
    return json.loads((folder / "training_state.json").read_text("utf-8"))


def test_everything_comes_back(tmp_path):
    training, other = trained(), trained(1)
    training.balance.state = {"loss": {"value": 1 / 3}}
    progress = Progress(7, 70, 700, 0.5, 0.8, 0.9, 5, 2)
    files_of(tmp_path).save(training, progress, keep=5, last=False)
    assert files_of(tmp_path).load(other) == progress
    assert other.balance.state == training.balance.state
    for part, tensors in training.tensors().items():
        assert all(torch.equal(other.tensors()[part][name], tensor) for name, tensor in tensors.items())
    state = read_state(tmp_path / "checkpoint_step_7.bin")
    assert (state["best_value"], state["best_step"], state["config_hash"]) == (0.9, 5, "config")
    assert {"epoch", "timestamp", "versions", "learning_rate", "data_fingerprint"} <= state.keys()


def test_steps_are_sorted_as_numbers_and_the_newest_five_stay(tmp_path):
    files = files_of(tmp_path)
    files.measured(trained(), Progress(1), True)
    for step in (999, 1000, 2000, 9000, 10000, 11000, 100000):
        files.save(trained(), Progress(step), keep=5, last=step == 100000)
    assert [*step_files(tmp_path)] == [100000, 11000, 10000, 9000, 2000]
    assert {BEST, FINAL, "training_state.json"} <= set(names(tmp_path))
    assert len(names(tmp_path)) == 8  # best and final are not among the five
    assert files.newest().name == "checkpoint_step_100000.bin"
    assert files_of(tmp_path).load(trained()).step == 100000


def test_best_is_never_lost_over_a_resume(pretrain, tmp_path):
    with pytest.raises(Interrupted):
        pretrain("run", stop_after=7)
    folder = tmp_path / "run/checkpoints"
    before = read_state(folder / "checkpoint_step_7.bin")
    assert (before["best_step"], before["value"]) == (5, before["best_value"])
    pretrain("run", resume=True)
    best, states = read_state(folder / BEST), state_of(folder)
    accuracies = dict(states["accuracy_curve"])
    assert best["best_value"] == max(accuracies.values()) == states["best_value"]
    assert accuracies[best["step"]] == best["best_value"]


def test_a_worse_measurement_leaves_the_best_alone():
    best = BestConfig(metric="accuracy")
    progress, improved = judged(Progress(5), {"accuracy": 0.9}, best)
    assert improved
    worse, improved = judged(Progress(6, best_value=0.9, best_step=5), {"accuracy": 0.8}, best)
    assert not improved
    assert (worse.best_value, worse.best_step, worse.value, worse.since_best) == (0.9, 5, 0.8, 1)
    assert not judged(progress, {"accuracy": float("nan")}, best)[1]
    assert judged(progress, {"accuracy": 0.1}, BestConfig(metric="accuracy", direction="min"))[1]
    with pytest.raises(UserError, match=r"train.best.metric: 'accuracy' is not measured; write one of loss"):
        judged(progress, {"loss": 1.0}, best)


def test_nothing_is_measured_or_saved_at_step_0_and_the_last_step_is(pretrain, tmp_path):
    pretrain("run", eval_every=6, save_every=8)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows if "learned_byte_accuracy" in row] == [6, 12, 18, 20]
    assert sorted(step_files(tmp_path / "run/checkpoints")) == [8, 16, 20]


def test_the_final_file_is_called_final_and_is_the_last_step(pretrain, tmp_path):
    pretrain("run")
    folder = tmp_path / "run/checkpoints"
    assert read_state(folder / FINAL)["step"] == state_of(folder)["step"] == 20
    assert [*step_files(folder)] == [20, 18, 16, 14, 12]
    assert [path.name for path in folder.iterdir() if path.name.endswith(".tmp")] == []


def test_a_stop_does_not_write_a_final_file(pretrain, tmp_path):
    with pytest.raises(Interrupted, match="stopped after step 3"):
        pretrain("run", stop_after=3)
    assert FINAL not in names(tmp_path / "run/checkpoints")


def test_the_first_step_after_a_resume_is_the_next_one(pretrain, tmp_path):
    pretrain("run", steps=10, schedule_steps=20)
    seen = len((tmp_path / "run/metrics.jsonl").read_text("utf-8").splitlines())
    pretrain("run", resume_from=tmp_path / "run/checkpoints/checkpoint_step_10.bin", schedule_steps=20)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text("utf-8").splitlines()]
    assert rows[seen]["step"] == 11
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 21))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("truncated", lambda whole: whole[: len(whole) // 2]),
        ("tail", lambda whole: whole[:-30]),
        ("empty", lambda whole: b""),
        ("foreign", lambda whole: b"\x80\x05not ours"),
        ("flipped", lambda whole: whole[:-1200] + bytes([whole[-1200] ^ 1]) + whole[-1199:]),
    ],
)
def test_a_damaged_or_foreign_file_is_one_line(tmp_path, caplog, name, content):
    files = files_of(tmp_path)
    for step in (1, 2):
        files.save(trained(), Progress(step), keep=5, last=False)
    path = tmp_path / "checkpoint_step_2.bin"
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(UserError, match="not a whole checkpoint") as caught:
        read_bundle(path)
    assert "\n" not in str(caught.value)
    assert files_of(tmp_path).load(trained()).step == 1
    assert "going back to the checkpoint before" in caplog.text
    with pytest.raises(UserError, match="not a whole checkpoint"):
        files_of(tmp_path, resume=path).load(trained())
    (tmp_path / "checkpoint_step_1.bin").write_bytes(b"")
    with pytest.raises(UserError, match="none of 2 checkpoints can be read"):
        files_of(tmp_path).load(trained())


@pytest.mark.parametrize("trick", ["path", "compressed", "extra", "missing", "twice"])
def test_members_are_what_they_should_be(tmp_path, trick):
    training = trained()
    write_bundle(tmp_path / "good.bin", training.tensors(), {"step": 1})
    with zipfile.ZipFile(tmp_path / "good.bin") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    kind = zipfile.ZIP_DEFLATED if trick == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(tmp_path / "bad.bin", "w", kind) as archive:
        for name, data in content.items():
            if trick == "missing" and name == STATE:
                continue
            archive.writestr(f"../{name}" if trick == "path" else name, data)
        if trick in ("extra", "twice"):
            expected = pytest.warns(UserWarning, match="Duplicate name") if trick == "twice" else nullcontext()
            with expected:
                archive.writestr("run.py" if trick == "extra" else STATE, b"{}")
    with pytest.raises(UserError, match=r"bad.bin: not a whole checkpoint of a tokenizer"):
        read_bundle(tmp_path / "bad.bin")
    assert set(content) == {STATE, *MEMBERS.values()}


def test_a_full_disk_is_one_line_and_keeps_the_files(tmp_path, monkeypatch):
    files = files_of(tmp_path)
    files.save(trained(), Progress(1), keep=5, last=True)
    before = names(tmp_path)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle.os, "fsync", full)
    with pytest.raises(UserError, match=r"step 2 could not be written .No space left on device.; those before"):
        files.save(trained(), Progress(2), keep=5, last=True)
    monkeypatch.undo()
    assert names(tmp_path) == before
    assert files_of(tmp_path).load(trained()).step == 1


def test_another_configuration_or_text_is_refused(pretrain, tmp_path, corpus):
    with pytest.raises(Interrupted):
        pretrain("run", stop_after=4)
    with pytest.raises(UserError, match=r"cannot resume with another config: train.seed differ"):
        pretrain("run", resume=True, seed=1)
    path = tmp_path / "run/checkpoints/checkpoint_step_4.bin"
    with pytest.raises(UserError, match=r"written under another configuration .* add --allow-config-change"):
        pretrain("new", resume_from=path, seed=1)
    other = tmp_path / "other.txt"
    other.write_text(corpus.read_text("utf-8").replace("cat", "dog"), "utf-8")
    with pytest.raises(UserError, match=r"was trained on other text .* with --fine-tune"):
        pretrain("newer", resume_from=path, text=other)
    assert pretrain("run", resume=True, seed=1, allow_config_change=True)["steps"] == 20


def test_an_older_checkpoint_is_not_resumed_among_newer_ones(tmp_path):
    files = files_of(tmp_path)
    for step in (1, 2):
        files.save(trained(), Progress(step), keep=5, last=False)
    with pytest.raises(UserError, match=r"is of step 1, and .* has checkpoint_step_2.bin"):
        files_of(tmp_path, resume=tmp_path / "checkpoint_step_1.bin").load(trained())


@pytest.mark.parametrize(
    ("stopping", "best", "since", "enough"),
    [
        ({"patience": 2}, 0.5, 1, False),
        ({"patience": 2}, 0.5, 2, True),
        ({"target": 0.9}, 0.8, 0, False),
        ({"target": 0.9}, 0.9, 0, True),
        ({"target": 0.9}, None, 0, False),
        ({"patience": 1, "target": 0.9}, 0.95, 0, True),
    ],
)
def test_when_a_run_has_had_enough(stopping, best, since, enough):
    config = LoopConfig(
        steps=10, best=BestConfig(metric="accuracy"), early_stopping=EarlyStoppingConfig.model_validate(stopping)
    )
    assert is_enough(Progress(best_value=best, since_best=since), config) == enough
    assert not is_enough(Progress(best_value=best, since_best=since), LoopConfig(steps=10))


def test_a_run_that_is_good_enough_ends_and_stays_ended(pretrain, tmp_path):
    for _ in range(2):
        resume = (tmp_path / "run").exists()
        assert pretrain("run", resume=resume, early_stopping={"target": 0.01})["steps"] == 5
    folder = tmp_path / "run/checkpoints"
    assert read_state(folder / FINAL)["step"] == read_state(folder / BEST)["step"] == 5
    assert (
        pretrain("patient", eval_every=1, best={"metric": "seen_share"}, early_stopping={"patience": 3})["steps"] == 4
    )


def test_the_network_of_a_checkpoint_is_the_averaged_one(pretrain, tmp_path):
    pretrain("run")
    path = tmp_path / "run/checkpoints" / FINAL
    network, tensors = read_network(path), read_bundle(path)[0]
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, tensors["state"][f"task.ema.{name}"])
        assert not torch.equal(tensor, tensors["model"][name])
    assert not network.training


CHILD = """
import sys
from pathlib import Path
import torch
from tokenkit.tokenizers.autoencoder.bundle import write_bundle
folder = Path(sys.argv[1])
tensors = {"model": {"w": torch.zeros(1 << 20)}}
for step in range(1, 1000):
    write_bundle(folder / "checkpoint_best.bin", tensors, {"step": step})
    print(step, flush=True)
"""


def test_killed_in_the_middle_of_a_write_the_file_is_whole(tmp_path):
    for moment in (0.0, 0.003, 0.011):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        child.stdout.readline()
        deadline = time.monotonic() + 20
        while not any(tmp_path.glob(".*.tmp")) and time.monotonic() < deadline:
            pass
        time.sleep(moment)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert read_bundle(tmp_path / BEST)[1]["step"] >= 1
    files_of(tmp_path).save(trained(), Progress(1), keep=5, last=False)
    assert not any(tmp_path.glob(".checkpoint_*.tmp"))
