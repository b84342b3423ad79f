"""`tokenkit sweep`: fair tables, runs that are told apart, found again, continued, and recorded when they fail."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokenkit.config import UserError, build, dump_yaml, parse_yaml, read_run_file
from tokenkit.verbs.pretrain import PretrainRun, pretrain
from tokenkit.verbs.sweep import SweepRun, sweep


@pytest.fixture
def base(corpus, model_folder):
    source = {"path": str(corpus), "separator": "\n\n"}
    return {
        "tokenizer": {"load": str(model_folder)},
        "model": {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        "data": {"source": source, "window_bytes": 60},
        "train": {"steps": 6, "batch_size": 4, "log_every": 2, "optimizer": {"learning_rate": 1e-2}},
        "eval": {"source": {**source, "max_bytes": 300}, "context_tokens": 32},
    }


@pytest.fixture
def make(tmp_path, base):
    def make(**changes):
        values = {"output": tmp_path / "sweep", "verb": "pretrain", "base": base, "in_process": True, "seeds": [0, 1]}
        return build(SweepRun, values | changes)

    return make


GRID = {"train.batch_size": [2, 4], "train.optimizer.learning_rate": [1e-2, 1e-3]}


def test_a_grid_becomes_tables(make, tmp_path):
    printed = sweep(make(grid=GRID), quiet=True)
    assert (printed["done"], printed["failed"]) == (8, 0)
    folder = tmp_path / "sweep"
    table = json.loads((folder / "results.json").read_text("utf-8"))
    rows = list(csv.DictReader((folder / "table.csv").open(encoding="utf-8")))
    assert len(rows) == len(table["rows"]) == 4
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"]
    scores = [float(row["geometric_mean@tokens"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert all(float(row["bits_per_byte_sd"]) > 0 for row in rows)
    page = (folder / "table.md").read_text("utf-8")
    assert "±" in page
    assert all(row["run"] in page for row in rows)
    # every run was measured where all have read as much, and where all have stepped as often
    by_size = {run["name"].partition(",")[0]: run for run in table["runs"] if run["seed"] == 0}
    large = {r["step"] for r in by_size["batch_size=4"]["readings"]["bits_per_byte"]}
    small = {r["step"] for r in by_size["batch_size=2"]["readings"]["bits_per_byte"]}
    assert (large, small) == ({3, 6}, {6})
    assert table["equal_steps"] == 6


def test_the_numbers_are_those_of_the_runs(make, tmp_path, base):
    sweep(make(seeds=[3]), quiet=True)
    (run,) = json.loads((tmp_path / "sweep/results.json").read_text("utf-8"))["runs"]
    alone = {**base, "train": {**base["train"], "seed": 3, "eval_at": [6]}, "output": tmp_path / "alone"}
    results = pretrain(build(PretrainRun, alone), quiet=True)
    assert run["readings"]["bits_per_byte"][-1] == {
        "step": results["steps"],
        "amount": results["tokens"],
        "value": results["bits_per_byte"],
    }


def test_only_missing_runs_are_done_again(make, tmp_path):
    sweep(make(list=[{"train.steps": 2}]), quiet=True)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep/runs").glob("*/results.json")}
    assert len(kept) == 2
    gone = sorted(kept)[0]
    gone.unlink()
    sweep(make(list=[{"train.steps": 2}, {"train.steps": 3}]), quiet=True)
    found = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep/runs").glob("*/results.json")}
    assert len(found) == 4
    assert [path for path in kept if found[path] != kept[path]] == [gone]


def test_a_failed_run_is_recorded_and_the_others_are_done(make, tmp_path):
    broken = {"name": "broken", "model.num_attention_heads": 3}  # transformers divides 16 by it
    run = make(list=[broken, {"name": "whole"}], seeds=[0])
    printed = sweep(run, quiet=True)
    assert (printed["done"], printed["failed"]) == (1, 1)
    (failed,) = printed["failures"].values()
    assert failed["error"] in Path(failed["traceback"]).read_text("utf-8")
    page = (tmp_path / "sweep/table.md").read_text("utf-8")
    assert failed["traceback"] in page
    assert "1 failed" in page
    names = [row["name"] for row in json.loads((tmp_path / "sweep/results.json").read_text("utf-8"))["rows"]]
    assert names == ["whole", "broken"]


def test_ids_survive_long_names_and_the_order_of_keys(make, tmp_path):
    long = "x" * 300
    entries = [{"name": long, "train.steps": 1}, {"name": long, "train.steps": 2}, {"name": "again", "train.steps": 2}]
    sweep(make(list=entries, seeds=[0]), quiet=True)
    folders = [path.name for path in (tmp_path / "sweep/runs").iterdir()]
    assert len(folders) == 2  # the third is the second by another name
    assert all(len(name) < 80 for name in folders)


def test_mistakes_are_one_line_and_nothing_is_written(make, tmp_path, base):
    with pytest.raises(UserError, match=r"step=3: train.step: unknown key; did you mean 'steps'"):
        sweep(make(grid={"train.step": [3]}), quiet=True)
    with pytest.raises(UserError, match=r"output: .*'='"):
        sweep(make(output=tmp_path / "a=b"), quiet=True)
    with pytest.raises(UserError, match="jobs: 2 runs at once need processes"):
        sweep(make(jobs=2), quiet=True)
    with pytest.raises(UserError, match=r"low=2.0 is above high=1.0"):
        make(random={"n": 1, "space": {"train.steps": {"kind": "float", "low": 2, "high": 1}}})
    with pytest.raises(UserError, match=r"base: train.steps: missing"):
        sweep(make(base={k: v for k, v in base.items() if k not in ("train", "model")}, seeds=[0]), quiet=True)
    assert not (tmp_path / "sweep").exists()


def test_invalid_combinations_can_be_skipped(make):
    grid = {"train.batch_size": [2, 4], "train.accumulation": [1, 3], "train.steps": [1]}
    printed = sweep(make(grid=grid, skip_invalid=True, seeds=[0]), quiet=True)
    assert printed["done"] == 3
    assert len(printed["skipped"]) == 1
    assert "3 microbatches cannot be cut from a batch of 2" in printed["skipped"][0]


def test_random_draws_are_the_same_every_time(make):
    space = {
        "train.optimizer.learning_rate": {"kind": "float", "low": 1e-4, "high": 1e-2, "log": True},
        "train.steps": {"kind": "int", "low": 1, "high": 2},
    }
    run = make(random={"n": 2, "space": space}, seeds=[0])
    first = sweep(run, quiet=True)
    assert first["done"] == 2
    assert sweep(run, quiet=True) == first


def test_a_foreign_folder_is_left_alone(make, tmp_path, base):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/precious.txt").write_text("x", "utf-8")
    with pytest.raises(UserError, match="holds files, but no run"):
        sweep(make(), quiet=True)
    pretrain(build(PretrainRun, {**base, "output": tmp_path / "one"}), quiet=True)
    with pytest.raises(UserError, match="holds a single run, not a sweep"):
        sweep(make(output=tmp_path / "one"), quiet=True)
    assert "tokenizer" in read_run_file(tmp_path / "one/run.yaml")


@pytest.mark.slow
def test_killed_and_done_again_in_processes(make, tmp_path):
    """Two kinds of kill; afterwards the runs are those of an undisturbed sweep, and exit codes tell failures."""
    values = {"train.steps": 40, "train.save_every": 5, "name": "long"}
    whole = make(list=[values], seeds=[0, 1], output=tmp_path / "whole")
    sweep(whole, quiet=True)
    file = tmp_path / "sweep.yaml"
    plain = {**whole.model_dump(mode="json"), "output": str(tmp_path / "cut"), "in_process": False}
    file.write_text(dump_yaml(plain), "utf-8")
    command = [sys.executable, "-m", "tokenkit.cli", "sweep", str(file), "--quiet"]
    for number in (signal.SIGTERM, signal.SIGKILL):
        with subprocess.Popen(command, stderr=subprocess.PIPE) as running:
            try:
                _wait(running, lambda: list((tmp_path / "cut").glob("runs/*/checkpoints/*")))
            finally:
                running.send_signal(number)
            _, error = running.communicate(timeout=300)
        assert running.returncode in (128 + number, -number, 0), error
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    while "is at work here" in done.stderr:  # the run that SIGKILL left behind holds the folder
        assert done.returncode == 2
        time.sleep(1)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert parse_yaml(done.stdout)["done"] == 2
    both = [json.loads((tmp_path / name / "results.json").read_text("utf-8"))["rows"] for name in ("whole", "cut")]
    assert both[0][0]["values"] == both[1][0]["values"]
    broken = [*command, f"output={tmp_path / 'broken'}", "seeds=[0]", "list=[{model.num_attention_heads: 3}]"]
    for words, code in (([], 1), (["--keep-going"], 0)):
        done = subprocess.run([*broken, *words], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        (failed,) = parse_yaml(done.stdout)["failures"].values()
        assert "Traceback" in Path(failed["traceback"]).read_text("utf-8")


def _wait(running, until):
    for _ in range(3000):
        if until() or running.poll() is not None:
            return
        time.sleep(0.1)
    raise TimeoutError(os.getpid())
