"""A checkpoint under attack: killed at every operation inside a save, a full disk, another objective, another run."""

import multiprocessing
import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from test_checkpoint_files import trained

from tokenkit.config import UserError
from tokenkit.train import checkpoint as checkpoints
from tokenkit.train import shards
from tokenkit.train.checkpoint import Progress, StepFolders, find_damage, list_checkpoints
from tokenkit.train.checkpoint_files import BEST as BEST_FILE
from tokenkit.train.checkpoint_files import step_files


def at_step(step):
    """A run whose weights say which step it is."""
    training = trained()
    with torch.no_grad():
        for parameter in training.parameters.values():
            parameter.fill_(step)
    training.balance.state = {"loss": {"value": float(step)}}
    return training


class Killed(BaseException):
    """No handler of errors sees it: what comes after it does not happen, as after a kill."""


def save(folder):
    """Step 2 as the best and as the newest."""
    folders = StepFolders(folder)
    folders.measured(at_step(2), Progress(2), True)
    folders.save(at_step(2), Progress(2), 1, False)


def attack(patch, number, die):
    """Every operation of a save counts, writes twice: before, and half done. At the operation of a number, `die`."""
    count = 0

    def tick(operation, spoil=None):
        nonlocal count
        count += 1
        if count == number:
            if spoil is not None:
                content = Path(spoil).read_bytes()
                Path(spoil).write_bytes(content[: len(content) // 2])
            die(operation)

    def watch(owner, name, written=None):
        original = getattr(owner, name)

        def call(*arguments, **options):
            tick(f"before {name}")
            result = original(*arguments, **options)
            if written is not None:
                tick(f"inside {name}", arguments[written])
            return result

        patch(owner, name, call)

    watch(shards, "save_file", 1)
    watch(Path, "write_text", 0)
    watch(os, "fsync")
    watch(Path, "rename")
    watch(shutil, "rmtree")


def stopped(folder, number, monkeypatch):
    """The operation of that number, at which a save ended; None where it went through."""

    def die(operation):
        raise Killed(operation)

    with monkeypatch.context() as patch:
        attack(patch.setattr, number, die)
        try:
            save(folder)
        except Killed as killed:
            return str(killed)
    return None


def killed(folder, number, monkeypatch):
    """The same in a process of its own, which ends there and then."""

    def child(says):
        def die(operation):
            says.send(operation)
            os.kill(os.getpid(), signal.SIGKILL)

        attack(setattr, number, die)
        save(folder)

    context = multiprocessing.get_context("fork")
    hears, says = context.Pipe(False)
    process = context.Process(target=child, args=(says,))
    process.start()
    process.join(300)
    assert process.exitcode in (0, -signal.SIGKILL)
    return hears.recv() if process.exitcode else None


def whole_step(path):
    """The step that a whole checkpoint's weights are of."""
    assert find_damage(path) is None
    found = checkpoints.load_file(path / "model.safetensors")
    values = {value for tensor in found.values() for value in tensor.flatten().tolist()}
    assert len(values) == 1
    return values.pop()


@pytest.mark.parametrize("end", [stopped, pytest.param(killed, marks=pytest.mark.slow)])
def test_ended_at_any_operation_of_a_save_a_whole_checkpoint_is_left(tmp_path, monkeypatch, end):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # what a killed process wrote is not lost with it
    operations = []
    for number in range(1, 200):
        folder = tmp_path / str(number)
        folders = StepFolders(folder)
        folders.save(at_step(1), Progress(1), 1, False)
        folders.measured(at_step(1), Progress(1), True)
        operation = end(folder, number, monkeypatch)
        if operation is None:
            break
        operations.append(operation)
        other = trained(1)
        progress = StepFolders(folder).load(other)
        assert progress in (Progress(1), Progress(2))
        assert all((parameter == progress.step).all() for parameter in other.parameters.values())
        assert other.balance.state["loss"]["value"] == progress.step
        assert whole_step(folder / "best") in (1, 2)
        StepFolders(folder).save(at_step(3), Progress(3), 1, False)
        assert sorted(path.name for path in folder.iterdir()) == ["best", "step_00000003"]
    assert len(operations) >= 20
    kinds = {"before save_file", "inside save_file", "inside write_text", "before fsync", "before rename"}
    assert kinds | {"before rmtree"} <= set(operations)


def test_the_best_is_never_rotated_and_two_runs_in_one_folder_leave_each_other_alone(tmp_path):
    runs = {name: StepFolders(tmp_path / name / "checkpoints") for name in ("a", "b")}
    for step in range(1, 6):
        for offset, folders in zip((0, 100), runs.values(), strict=True):
            training = at_step(step + offset)
            if step == 2:
                folders.measured(training, Progress(step + offset), True)
            folders.save(training, Progress(step + offset), 1, False)
    for (name, folders), offset in zip(runs.items(), (0, 100), strict=True):
        other = trained(1)
        assert folders.load(other) == Progress(5 + offset)
        assert all((parameter == 5 + offset).all() for parameter in other.parameters.values())
        assert whole_step(tmp_path / name / "checkpoints/best") == 2 + offset
        assert len(list_checkpoints(tmp_path / name / "checkpoints")) == 1


Usage = namedtuple("Usage", "total used free")


def test_a_disk_without_room_is_told_before_the_run_and_before_a_save(tmp_path, monkeypatch):
    from test_checkpoint_files import files_of

    folders = StepFolders(tmp_path / "run")
    folders.save(at_step(1), Progress(1), 1, False)
    files_of(tmp_path / "files").save(trained(), Progress(1), keep=1, last=False)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    for attempt in (
        lambda: StepFolders(tmp_path / "new/run").load(trained()),
        lambda: folders.save(at_step(2), Progress(2), 1, False),
        lambda: files_of(tmp_path / "files").save(trained(), Progress(2), keep=1, last=False),
    ):
        with pytest.raises(UserError, match=r"a checkpoint takes 1\.\d MB and the disk has 0\.0 MB left") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step_00000001"]
    assert [*step_files(tmp_path / "files")] == [1]
    assert not (tmp_path / "files" / BEST_FILE).exists()


def test_another_objective_is_refused_with_what_differs(tmp_path):
    folders = StepFolders(tmp_path)
    training = trained()
    training.parameters["projectors.old"] = torch.nn.Parameter(torch.ones(2))
    folders.save(training, Progress(1), 1, False)
    other = trained()
    other.parameters["b"] = torch.nn.Parameter(torch.ones(7))
    added = {f"projectors.new{i}": torch.nn.Parameter(torch.ones(2)) for i in range(7)}
    other.parameters.update(added)
    with pytest.raises(UserError) as caught:
        folders.load(other)
    said = str(caught.value)
    assert "trained other parameters than this run does" in said
    assert "only in the checkpoint: projectors.old;" in said
    assert "only in this run: projectors.new0, projectors.new1" in said
    assert "and 2 more" in said
    assert "of other shapes: b [3] there and [7] here" in said
    assert "\n" not in said
