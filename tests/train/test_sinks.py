"""Sinks get every line of metrics.jsonl once, however often a run is continued, and never stop a run."""

import json
import sqlite3
import sys
import time

import pytest

from tokenkit.config import UserError
from tokenkit.train import sinks as module
from tokenkit.train.folder import RunFolder
from tokenkit.train.sinks import Sinks

RUN = {"train": {"steps": 9}}


def log(folder, *steps):
    for step in steps:
        folder.log({"step": step, "loss": 1.0 / step, "device": "cpu", "whole": True})


def points(path):
    """(step, value) of every scalar of TensorBoard's files, by its name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(path))
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_every_step_once_after_a_kill(tmp_path):
    pytest.importorskip("tensorboard")
    path = tmp_path / "run"
    first = RunFolder(path, Sinks(["tensorboard"]))
    first.claim(RUN, resume=False)
    log(first, 1, 2, 3)
    first.sinks.close()
    for last in (2, 1):  # twice back, the second time further than the first
        again = RunFolder(path, Sinks(["tensorboard"]))
        again.claim(RUN, resume=True)
        again.truncate_metrics(last)
        log(again, *range(last + 1, 4 if last == 1 else 3))
        again.sinks.close()
    log(again, 4)  # after the end nothing is sent
    found = points(path / "tensorboard")
    assert found == {"loss": [(step, pytest.approx(1 / step)) for step in (1, 2, 3)]}
    steps = [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert steps == [1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_sink_that_comes_later_gets_what_it_missed(tmp_path):
    pytest.importorskip("tensorboard")
    first = RunFolder(tmp_path / "run")
    first.claim(RUN, resume=False)
    log(first, 1, 2)
    with first.metrics.open("a") as file:
        file.write('{"step": 3, "lo')  # cut short by a kill
    again = RunFolder(tmp_path / "run", Sinks(["tensorboard"]))
    again.claim(RUN | {"train": {"steps": 9, "sinks": ["tensorboard"]}}, resume=True)
    log(again, 3)
    again.sinks.close()
    assert [step for step, _ in points(tmp_path / "run/tensorboard")["loss"]] == [1, 2, 3]


@pytest.mark.filterwarnings("ignore")
def test_trackio_writes_to_this_machine_alone(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    rows = []
    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    for resume in (False, True):
        folder = RunFolder(tmp_path / "run", Sinks(["trackio"], "mine"))
        folder.claim(RUN, resume=resume)
        folder.truncate_metrics(1)
        log(folder, *((2, 3) if resume else (1, 2)))
        folder.sinks.close()
    name = (tmp_path / "run/sinks/id").read_text("utf-8")
    rows = SQLiteStorage.get_logs("mine", name)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert list((tmp_path / "trackio").glob("*.db"))
    assert sqlite3.connect(next((tmp_path / "trackio").glob("*.db")))


@pytest.mark.filterwarnings("ignore")
def test_wandb_is_offline_without_a_key(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    folder = RunFolder(tmp_path / "run", Sinks(["wandb"], "mine"))
    folder.claim(RUN, resume=False)
    log(folder, 1, 2)
    folder.sinks.close()
    found = list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert len(found) == 1
    assert (tmp_path / "run/sinks/id").read_text("utf-8") in found[0].name
    for _ in range(100):  # a process of wandb's own writes it, a little later
        if b"loss" in found[0].read_bytes():
            break
        time.sleep(0.1)
    assert b"loss" in found[0].read_bytes()


def test_a_missing_package_is_one_line_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"train\.sinks: wandb is not installed; pip install 'tokenkit-torch\[track\]'"):
        RunFolder(tmp_path / "run", Sinks(["wandb"]))
    assert not (tmp_path / "run").exists()


class Broken:
    def __init__(self, folder, project, name, run):
        self.calls = 0

    def send(self, step, values):
        raise OSError("disk full")

    def close(self):
        raise AssertionError("was dropped")


def test_a_sink_that_fails_is_left_out_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(module.KINDS, "tensorboard", Broken)
    monkeypatch.setattr(module, "find_spec", lambda name: sys)
    folder = RunFolder(tmp_path / "run", Sinks(["tensorboard"]))
    folder.claim(RUN, resume=False)
    log(folder, 1, 2)
    folder.sinks.close()
    assert folder.logged("loss") == {1: 1.0, 2: 0.5}
    assert [record.getMessage() for record in caplog.records] == [
        "train.sinks: tensorboard left out from here on (OSError: disk full)"
    ]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: sys)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    folder = RunFolder(tmp_path / "run", Sinks(["tensorboard"]))
    folder.claim(RUN, resume=False)
    log(folder, 1)
    assert not (tmp_path / "run/sinks").exists()
