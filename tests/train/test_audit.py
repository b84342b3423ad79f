"""Where time and memory go: parts add up to a step, phases are told apart, and nothing grows from cycle to cycle."""

import gc
import json
import time

import pytest
import torch
from test_checkpoint import run_file

from tokenkit.config import UserError, build
from tokenkit.train import audit
from tokenkit.train.audit import PARTS, Audit, Clock, memory
from tokenkit.train.schema import TrainConfig
from tokenkit.verbs.distill import distill

CPU = torch.device("cpu")


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_a_part_inside_another_counts_for_itself_alone(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(audit.time, "perf_counter", lambda: float(next(now)))  # every look at it is a second
    clock = Clock()
    with clock("backward"):
        with clock("teacher"):
            pass
        with clock("student_forward"), clock("losses"):
            pass
    found = clock.read()
    assert found == {**dict.fromkeys(PARTS, 0.0), "teacher": 1, "student_forward": 2, "losses": 1, "backward": 3}
    assert clock.read() == dict.fromkeys(PARTS, 0.0)


def test_a_part_that_fails_ends_all_the_same():
    clock = Clock()

    def fail():
        with clock("teacher"):
            time.sleep(0.01)
            raise ZeroDivisionError

    with clock("data"):
        with pytest.raises(ZeroDivisionError):
            fail()
        time.sleep(0.02)
    found = clock.read()
    assert 0.01 <= found["teacher"] < found["data"]


def test_averages_are_over_the_steps_since_the_last_line():
    watch = Audit(CPU, None)
    for _ in range(4):
        with watch.step(), watch.clock("backward"):
            time.sleep(0.01)
        watch.count(100)
    found = watch.values()
    assert 0.01 <= found["time/backward"] <= found["time/step"] < 0.1
    assert found["tokens_per_second"] == pytest.approx(100 / found["time/step"], rel=1e-3)
    assert watch.values()["time/step"] == 0


def test_memory_is_that_of_the_phase_and_what_is_not_there_is_left_out():
    watch = Audit(CPU, 1)
    before = memory(CPU, "memory")
    with watch.evaluation():
        block = torch.ones(50_000_000)  # 200 MB
        del block
    found = watch.evaluation_values()
    assert found["memory/eval/cpu_peak"] >= before["memory/cpu_rss"] + 150e6
    assert memory(CPU, "memory")["memory/cpu_peak"] < found["memory/eval/cpu_peak"]  # the next phase begins anew
    assert not [name for name in found if "cuda" in name]
    assert found["time/garbage"] > 0


@pytest.mark.parametrize(
    ("every", "expected"),
    [(1, [True] * 4), (2, [True, False] * 2), (None, [False] * 4)],
    ids=str,
)
def test_garbage_is_collected_as_often_as_it_says(monkeypatch, every, expected):
    calls = []
    monkeypatch.setattr(audit.gc, "collect", lambda: calls.append(1))
    watch = Audit(CPU, every)
    collected = []
    for _ in range(4):
        with watch.evaluation():
            pass
        collected.append("time/garbage" in watch.evaluation_values())
    assert collected == expected
    assert len(calls) == 2 * sum(expected)  # before and after


def test_cycles_of_a_run_are_freed_and_the_collector_is_left_as_it_was():
    class Node:
        pass

    frozen = gc.get_freeze_count()
    watch = Audit(CPU, 1)
    freed = []
    with watch.run():
        with watch.evaluation():
            node = Node()
            node.itself = node
            import weakref

            weakref.finalize(node, freed.append, True)
            del node
        assert freed == [True]
    assert gc.get_freeze_count() == frozen


def test_every_line_says_where_the_time_went(tmp_path, model_folder, corpus):
    from tokenkit.verbs.distill import DistillRun

    made = run_file(tmp_path, model_folder, corpus, "run", steps=12, eval_at=[0, 6, 12], log_every=3, save_every=12)
    distill(build(DistillRun, made.model_dump(mode="json")), quiet=True)
    rows = rows_of(tmp_path / "run")
    lines = [row for row in rows if "loss" in row]
    assert len(lines) == 4
    for row in lines:
        parts = sum(row[f"time/{part}"] for part in PARTS)
        assert parts == pytest.approx(row["time/step"], rel=0.1)
        assert min(row[f"time/{part}"] for part in PARTS) > 0
        assert {"tokens_per_second", "memory/cpu_rss", "memory/cpu_peak"} <= row.keys()
        assert not [name for name in row if "cuda" in name]
    measured = [row for row in rows if "bits_per_byte" in row]
    assert [row["step"] for row in measured] == [0, 6, 12]
    wanted = {"time/eval", "time/garbage", "memory/eval/cpu_rss", "memory/eval/cpu_peak"}
    assert all(wanted <= row.keys() for row in measured)


def test_memory_does_not_grow_over_cycles_of_training_and_measuring(tmp_path, model_folder, corpus):
    options = {"steps": 30, "eval_at": [], "eval_every": 5, "log_every": 5, "save_every": 30}
    distill(run_file(tmp_path, model_folder, corpus, "run", **options), quiet=True)
    resident = [row["memory/eval/cpu_rss"] for row in rows_of(tmp_path / "run") if "memory/eval/cpu_rss" in row]
    assert len(resident) == 6
    assert resident[-1] <= 1.02 * resident[0]  # five cycles after the first


@pytest.mark.slow
def test_a_profile_is_a_trace_and_a_table(tmp_path, model_folder, corpus):
    options = {"steps": 6, "profile": {"wait": 1, "warmup": 1, "active": 2, "top": 5}}
    distill(run_file(tmp_path, model_folder, corpus, "run", **options), quiet=True)
    check_profile(tmp_path / "run" / "profile")


def check_profile(folder):
    events = json.loads((folder / "trace.json").read_text("utf-8"))["traceEvents"]
    names = {event["name"] for event in events if "name" in event}
    assert {"teacher", "student_forward", "backward", "optimizer"} <= names
    assert any(name.startswith("aten::") for name in names)
    steps = [name for name in names if name.startswith("ProfilerStep")]
    assert len(steps) == 2
    table = (folder / "top.txt").read_text("utf-8")
    assert "Self CPU" in table
    assert len([line for line in table.splitlines() if line.strip() and not set(line.strip()) <= {"-", " "}]) <= 5 + 4
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_a_profile_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match=r"train.profile: wait, warmup and active are 5 steps, train.steps is 4"):
        build(TrainConfig, {"steps": 4, "profile": {}})
