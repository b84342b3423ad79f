"""A checkpoint is whole or not there; resumed equals never stopped, bit for bit."""

import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenkit.config import UserError, build
from tokenkit.train import shards
from tokenkit.train.checkpoint import Progress, StepFolders, Training, find_damage, list_checkpoints
from tokenkit.train.folder import RunFolder
from tokenkit.train.loop import Interrupted
from tokenkit.train.optimizer import build_optimizer, learning_rate_factor
from tokenkit.train.passes import Balance
from tokenkit.train.schema import OptimizerConfig
from tokenkit.verbs.distill import distill
from tokenkit.verbs.distill_run import DistillRun

MEASURED = ("tokens_per_second", "time/", "memory/")  # what no two runs have in common


def trained(seed=0):
    torch.manual_seed(seed)
    parameters = {"w": torch.nn.Parameter(torch.randn(4, 3)), "b": torch.nn.Parameter(torch.randn(3))}
    optimizer = build_optimizer(parameters, OptimizerConfig(weight_decay=0.1))
    for _ in range(3):
        sum((p**2).sum() for p in parameters.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters, optimizer


def saved(folder, parameters, optimizer, progress):
    StepFolders(folder).save(Training(parameters, optimizer, Balance(), {}), progress, keep=2, last=False)
    return folder / f"step_{progress.step:08d}"


def loaded(folder, parameters, optimizer):
    return StepFolders(folder).load(Training(parameters, optimizer, Balance(), {}))


def test_everything_comes_back(tmp_path):
    parameters, optimizer = trained()
    saved(tmp_path, parameters, optimizer, Progress(3, 30, 300))
    others, other_optimizer = trained(1)
    assert loaded(tmp_path, others, other_optimizer) == Progress(3, 30, 300)
    for name, parameter in parameters.items():
        assert torch.equal(others[name], parameter)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(other_optimizer.state[others[name]][key], optimizer.state[parameter][key])


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "progress.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, caplog, file, damage):
    parameters, optimizer = trained()
    saved(tmp_path, parameters, optimizer, Progress(1))
    newest = saved(tmp_path, parameters, optimizer, Progress(2)) / file
    content = newest.read_bytes()
    if damage == "remove":
        newest.unlink()
    elif damage == "truncate":
        newest.write_bytes(content[: len(content) // 2])
    else:
        newest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with caplog.at_level("WARNING"):
        assert loaded(tmp_path, *trained(1)) == Progress(1)
    assert "going back to the checkpoint before" in caplog.text


def test_only_the_newest_are_kept_and_leftovers_are_cleared(tmp_path):
    parameters, optimizer = trained()
    (tmp_path / ".step_00000001.77.tmp").mkdir()
    for step in (1, 2, 3):
        saved(tmp_path, parameters, optimizer, Progress(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]
    assert all(find_damage(path) is None for path in list_checkpoints(tmp_path))


def test_a_full_disk_is_one_line_and_keeps_the_one_before(tmp_path, monkeypatch):
    parameters, optimizer = trained()
    saved(tmp_path, parameters, optimizer, Progress(1))

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(
        UserError, match=r"step 2 could not be written .No space left on device.; the one before is kept"
    ):
        saved(tmp_path, parameters, optimizer, Progress(2))
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    assert loaded(tmp_path, *trained(1)) == Progress(1)


def test_other_parameters_are_refused(tmp_path):
    parameters, optimizer = trained()
    saved(tmp_path, parameters, optimizer, Progress(1))
    with pytest.raises(UserError, match="trained other parameters than this run does, w for one"):
        loaded(tmp_path, {"b": parameters["b"]}, optimizer)


def test_another_optimizers_state_is_refused_in_one_line(tmp_path):
    parameters, optimizer = trained()
    folder = saved(tmp_path, parameters, optimizer, Progress(1))
    file, manifest = folder / "optimizer.safetensors", json.loads((folder / "manifest.json").read_text("utf-8"))
    save_file({f"{name}[": tensor for name, tensor in load_file(file).items()}, file)
    manifest[file.name] = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(UserError, match=r"trained with an optimizer state called .*; use a new output"):
        loaded(tmp_path, *trained(1))


def test_the_learning_rate_by_hand():
    config = OptimizerConfig(schedule="linear", warmup_steps=4, lr_min_ratio=0.1)
    rates = [learning_rate_factor(s, steps=14, config=config) for s in range(14)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[9] == pytest.approx(0.1 + 0.9 * 0.5)
    cosine = OptimizerConfig(schedule="cosine")
    assert learning_rate_factor(5, steps=10, config=cosine) == pytest.approx(0.5)
    assert learning_rate_factor(10, steps=10, config=cosine) == pytest.approx(0.0)
    assert learning_rate_factor(9, steps=10, config=OptimizerConfig(schedule="constant")) == 1.0


def factors(steps, **options):
    config = OptimizerConfig(**options)
    return [learning_rate_factor(step, steps=steps, config=config) for step in range(steps)]


def test_more_courses_of_the_learning_rate_by_hand():
    line = factors(14, schedule="polynomial", warmup_steps=4, lr_min_ratio=0.1)
    assert line == pytest.approx(factors(14, schedule="linear", warmup_steps=4, lr_min_ratio=0.1))
    assert factors(10, schedule="polynomial", power=0.7, lr_min_ratio=0.2)[5] == pytest.approx(0.2 + 0.8 * 0.5**0.7)
    stable = factors(20, schedule="wsd", warmup_ratio=0.1, decay_share=0.25)
    assert stable[:2] == [0.5, 1.0]
    assert stable[2:16] == [1.0] * 14
    assert stable[16:] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    root = factors(40, schedule="inverse_sqrt", warmup_steps=4)
    assert root[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [root[16], root[36]] == pytest.approx([0.5, 1 / 3])
    with pytest.raises(UserError, match=r"train.optimizer.warmup_ratio: 0.1 beside warmup_steps 3; give one"):
        build(OptimizerConfig, {"warmup_ratio": 0.1, "warmup_steps": 3})


@pytest.mark.parametrize(("steps", "options"), [(50, {}), (30, {"warmup_steps": 12}), (40, {"warmup_ratio": 0.1})])
def test_one_cycle_is_torchs(steps, options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    rise = options.get("warmup_steps", options.get("warmup_ratio", 0.3) * steps) / steps
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=steps, pct_start=rise, cycle_momentum=False, final_div_factor=2.0
    )
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step() if len(expected) < steps else None
    assert factors(steps, schedule="one_cycle", lr_min_ratio=0.02, **options) == pytest.approx(expected)


def run_file(tmp_path, model_folder, corpus, name, **train):
    source = {"path": str(corpus), "separator": "\n\n"}
    return build(
        DistillRun,
        {
            "output": tmp_path / name,
            "model": {"source": str(model_folder)},
            "target_tokenizer": "byte",
            "losses": {"alm": {}, "clm": {"weight": 0.3}},
            "data": {"source": source, "window_bytes": 60},
            "train": {
                "steps": 7,
                "batch_size": 4,
                "accumulation": 2,
                "save_every": 2,
                "log_every": 1,
                "device": "cpu",
                "eval_at": [0, 4],
                "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
                **train,
            },
            "eval": {"source": {**source, "max_bytes": 400}, "context_tokens": 64},
        },
    )


def final(folder):
    return load_file(list_checkpoints(folder / "checkpoints")[0] / "model.safetensors")


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in rows]


@pytest.mark.parametrize("mode", [{"mode": "full"}, {"mode": "lora", "lora": {"rank": 4, "dropout": 0.2}}])
def test_stopped_and_resumed_equals_never_stopped(tmp_path, model_folder, corpus, mode):
    distill(run_file(tmp_path, model_folder, corpus, "whole", **mode), quiet=True)
    with pytest.raises(Interrupted):
        distill(run_file(tmp_path, model_folder, corpus, "cut", stop_after=3, **mode), quiet=True)
    distill(run_file(tmp_path, model_folder, corpus, "cut", **mode), resume=True, quiet=True)
    whole, cut = final(tmp_path / "whole"), final(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")


def test_the_best_of_a_run_is_kept_beside_the_newest(tmp_path, model_folder, corpus):
    best = {"eval_every": 3, "best": {"metric": "bits_per_byte", "direction": "min"}, "eval_at": []}
    distill(run_file(tmp_path, model_folder, corpus, "whole", **best), quiet=True)
    with pytest.raises(Interrupted):
        distill(run_file(tmp_path, model_folder, corpus, "cut", stop_after=5, **best), quiet=True)
    distill(run_file(tmp_path, model_folder, corpus, "cut", **best), resume=True, quiet=True)
    measured = {row["step"]: row["bits_per_byte"] for row in metrics(tmp_path / "cut") if "bits_per_byte" in row}
    assert [*measured] == [3, 6, 7]
    for name in ("whole", "cut"):
        folder = tmp_path / name / "checkpoints"
        assert find_damage(folder / "best") is None
        assert sorted(path.name for path in folder.iterdir()) == ["best", "step_00000006", "step_00000007"]
        progress = json.loads((folder / "best/progress.json").read_text("utf-8"))
        assert progress["best_value"] == measured[progress["step"]] == min(measured.values())
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    enough = {"early_stopping": {"target": 100.0}}
    distill(run_file(tmp_path, model_folder, corpus, "short", **best, **enough), quiet=True)
    assert metrics(tmp_path / "short")[-1]["step"] == 3


def test_a_folder_belongs_to_one_run(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim({"train": {"steps": 3}}, resume=False)
    with pytest.raises(UserError, match=r"holds another run; add --resume .* or write output="):
        folder.claim({"train": {"steps": 3}}, resume=False)
    with pytest.raises(UserError, match=r"train.steps differ .train.steps was 3, is 4"):
        folder.claim({"train": {"steps": 4}}, resume=True)
    folder.claim({"train": {"steps": 3}}, resume=True)
    with pytest.raises(UserError, match="no run to resume here"):
        RunFolder(tmp_path / "new").claim({}, resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear", "utf-8")
    with pytest.raises(UserError, match="holds files, but no run; nothing is overwritten"):
        RunFolder(tmp_path / "mine").claim({}, resume=False)
    assert (tmp_path / "mine" / "thesis.txt").read_text("utf-8") == "dear"


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_checkpoint import run_file
from tokenkit.verbs.distill import distill
out, model, corpus, name, resume = sys.argv[2:]
mode = {"mode": "lora", "lora": {"rank": 4, "dropout": 0.2}, "steps": 400, "save_every": 1}
distill(run_file(Path(out), model, corpus, name, **mode), resume=resume == "yes", quiet=True)
"""


def child(tmp_path, model_folder, corpus, name, resume):
    here = os.path.dirname(__file__)
    arguments = [sys.executable, "-c", CHILD, here, str(tmp_path), str(model_folder), str(corpus), name, resume]
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_at_ten_random_moments_the_weights_are_the_same_in_the_end(tmp_path, model_folder, corpus):
    whole = child(tmp_path, model_folder, corpus, "whole", "no")
    assert whole.wait(timeout=300) == 0, whole.stderr.read()
    moments = torch.rand(10, generator=torch.Generator().manual_seed(0)).tolist()
    kills = during_save = 0
    for moment in moments:
        started = (tmp_path / "cut" / "run.yaml").exists()
        process = child(tmp_path, model_folder, corpus, "cut", "yes" if started else "no")
        during_save += kill_while_it_trains(process, tmp_path / "cut", moment)
        kills += process.returncode == -signal.SIGKILL
    last = child(tmp_path, model_folder, corpus, "cut", "yes")
    assert last.wait(timeout=300) == 0, last.stderr.read()
    assert kills == 10
    assert during_save >= 3
    expected, found = final(tmp_path / "whole"), final(tmp_path / "cut")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")


def kill_while_it_trains(process, folder, moment):
    """SIGKILL some steps after training went on; at every third moment, in the middle of writing a checkpoint."""
    import time

    checkpoint_folder = folder / "checkpoints"
    before = len_steps(checkpoint_folder)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and len_steps(checkpoint_folder) <= before:
        time.sleep(0.002)
    time.sleep(moment * 0.3)
    saving = False
    if moment > 0.5:
        while process.poll() is None and not (saving := any(checkpoint_folder.glob(".step_*.tmp"))):
            pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    return saving


def len_steps(folder):
    """Number of the newest checkpoint's step."""
    newest = list_checkpoints(folder)
    return int(newest[0].name.removeprefix("step_")) if newest else 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves(tmp_path, model_folder, corpus, monkeypatch, number):
    from tokenkit.train import loop

    original = loop.accumulate_gradients

    def interrupting(*arguments):
        if not interrupting.sent:
            interrupting.sent = True
            os.kill(os.getpid(), number)
        return original(*arguments)

    interrupting.sent = False
    monkeypatch.setattr(loop, "accumulate_gradients", interrupting)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="stopped after step 1; continue with --resume") as caught:
        distill(run_file(tmp_path, model_folder, corpus, "run"), quiet=True)
    assert caught.value.signal_number == number
    assert signal.getsignal(number) == before
    assert [p.name for p in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000001"]


def test_a_loss_that_is_not_finite_names_the_batch_and_keeps_the_checkpoint(
    tmp_path, model_folder, corpus, monkeypatch
):
    from tokenkit.train import loop
    from tokenkit.train.step import StepResult

    original = loop.accumulate_gradients

    def broken(*arguments):
        result = original(*arguments)
        broken.calls += 1
        return StepResult(float("nan"), {}, {}, 1, 1) if broken.calls == 4 else result

    broken.calls = 0
    monkeypatch.setattr(loop, "accumulate_gradients", broken)
    with pytest.raises(
        UserError, match=r"step 4: the loss is nan in the batch of rows \[.*document \d+ byte \d+"
    ) as caught:
        distill(run_file(tmp_path, model_folder, corpus, "run"), quiet=True)
    assert "step_00000002" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert find_damage(tmp_path / "run" / "checkpoints" / "step_00000002") is None
