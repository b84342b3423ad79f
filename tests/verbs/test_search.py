"""`tokenkit search`: points are functions of a seed, trials go on where they were, and the best one is reproduced."""

import csv
import json
import math
import sys

import pytest

from tokenkit.config import UserError, build, load, read_run_file
from tokenkit.verbs import search_optuna
from tokenkit.verbs.pretrain import PretrainRun, pretrain
from tokenkit.verbs.runner import Runner
from tokenkit.verbs.search import SearchRun, search
from tokenkit.verbs.space import check_space, random_point

RATE = {"kind": "float", "low": 1e-4, "high": 3e-2, "log": True}
SPACE = {"train.optimizer.learning_rate": RATE, "train.batch_size": {"kind": "choice", "choices": [2, 4]}}


@pytest.fixture
def make(tmp_path, corpus, model_folder):
    source = {"path": str(corpus), "separator": "\n\n"}
    base = {
        "tokenizer": {"load": str(model_folder)},
        "model": {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        "data": {"source": source, "window_bytes": 60},
        "train": {"steps": 6, "batch_size": 4},
        "eval": {"source": {**source, "max_bytes": 300}, "context_tokens": 32},
    }

    def make(**changes):
        values = {"output": tmp_path / "search", "verb": "pretrain", "base": base, "in_process": True, "space": SPACE}
        return build(SearchRun, values | {"trials": 3, "rungs": [2]} | changes)

    return make


@pytest.fixture
def cut_short(monkeypatch):
    """Makes the n-th run that is started die as a kill would: nothing after it is done."""

    def cut(count):
        whole, started = Runner.run_one, []

        def run_one(self, point, **options):
            started.append(point)
            if len(started) == count:
                raise KeyboardInterrupt
            return whole(self, point, **options)

        monkeypatch.setattr(Runner, "run_one", run_one)
        return started

    return cut


def results(folder):
    return json.loads((folder / "results.json").read_text("utf-8"))


def test_points_are_functions_of_seed_and_number():
    space = make_space(
        a={"kind": "float", "low": 0.5, "high": 2.0},
        b={"kind": "float", "low": 1e-5, "high": 1e-1, "log": True},
        c={"kind": "int", "low": 3, "high": 11, "step": 4},
        d={"kind": "int", "low": 1, "high": 8, "log": True},
        e={"kind": "choice", "choices": ["x", {"y": 1}]},
    )
    drawn = [random_point(space, 7, number) for number in range(150)]
    assert drawn == [random_point(space, 7, number) for number in range(150)]
    assert drawn != [random_point(space, 8, number) for number in range(150)]
    assert all(0.5 <= one["a"] <= 2 and 1e-5 <= one["b"] <= 1e-1 for one in drawn)
    assert {one["c"] for one in drawn} == {3, 7, 11}
    assert {one["d"] for one in drawn} == set(range(1, 9))
    assert sum(one["b"] < 1e-3 for one in drawn) / 150 == pytest.approx(0.5, abs=0.12)
    assert sum(one["e"] == "x" for one in drawn) / 150 == pytest.approx(0.5, abs=0.12)


def make_space(**dimensions):
    values = {"output": "-", "base": "-", "trials": 1, "method": "random", "space": dimensions}
    return build(SearchRun, values).space


def test_a_condition_decides_whether_a_key_exists():
    space = make_space(
        kind={"kind": "choice", "choices": ["sgd", "adam"]},
        beta={"kind": "float", "low": 0.8, "high": 0.99, "when": {"kind": "adam"}},
        eps={"kind": "float", "low": 0.0, "high": 1.0, "when": {"beta": [0.0], "kind": "adam"}},
    )
    drawn = [random_point(space, 0, number) for number in range(60)]
    assert all(("beta" in one) == (one["kind"] == "adam") for one in drawn)
    assert {len(one) for one in drawn} == {1, 2}
    with pytest.raises(UserError, match=r"space.a.when: 'b' does not stand before it"):
        check_space({"a": space["beta"].model_copy(update={"when": {"b": 1}})})


@pytest.mark.parametrize("method", ["random", pytest.param("tpe", marks=pytest.mark.slow)])
def test_an_interrupted_search_is_the_undisturbed_one(make, cut_short, tmp_path, method):
    """Trials: the same numbers, values and scores; no run is begun again."""
    undisturbed = search(make(method=method, startup=1, output=tmp_path / "whole"), quiet=True)
    assert undisturbed["done"] + undisturbed["pruned"] == 3
    started = cut_short(4)
    with pytest.raises(KeyboardInterrupt):
        search(make(method=method, startup=1), quiet=True)
    before = {path.name for path in (tmp_path / "search/runs").iterdir()}
    assert 1 <= len(before) <= 3
    again = search(make(method=method, startup=1), quiet=True)
    assert again["best"] == undisturbed["best"]
    assert len(started) <= 4 + 4  # what was cut off, and what was never begun
    pairs = [{t["number"]: t for t in results(tmp_path / name)["trials"]} for name in ("whole", "search")]
    assert pairs[0] == pairs[1]
    assert search(make(method=method, startup=1, trials=4), quiet=True)["best"]["score"] >= again["best"]["score"]
    assert len(results(tmp_path / "search")["trials"]) == 4


def test_pruned_trials_stop_at_their_rung(make, tmp_path):
    run = make(method="random", startup=1, trials=5, seed=3)
    printed = search(run, quiet=True)
    assert printed["pruned"] >= 1
    for trial in results(tmp_path / "search")["trials"]:
        steps = [int(step) for step in trial["scores"]]
        assert steps == ([2] if trial["status"] == "pruned" else [2, 6])
        lines = (tmp_path / "search/runs" / trial["runs"][0] / "metrics.jsonl").read_text("utf-8").splitlines()
        assert max(json.loads(line)["step"] for line in lines) == steps[-1]
        if trial["status"] == "pruned":  # below the median of those before it
            everyone = results(tmp_path / "search")["trials"]
            earlier = [t["scores"]["2"] for t in everyone if t["number"] < trial["number"]]
            assert trial["scores"]["2"] < sorted(earlier)[len(earlier) // 2]


def test_successive_halving_keeps_the_best(make, tmp_path):
    printed = search(make(method="halving", trials=4, eta=2, rungs=[1, 3]), quiet=True)
    trials = results(tmp_path / "search")["trials"]
    assert (printed["done"], printed["pruned"]) == (1, 3)
    assert sorted(len(t["scores"]) for t in trials) == [1, 1, 2, 3]
    firsts = sorted((t["scores"]["1"] for t in trials), reverse=True)
    assert sorted(t["scores"]["1"] for t in trials if len(t["scores"]) > 1) == sorted(firsts[:2])
    rows = list(csv.DictReader((tmp_path / "search/table.csv").open(encoding="utf-8")))
    assert rows[0]["status"] == "done"
    assert float(rows[0]["score"]) == pytest.approx(1 / float(rows[0]["bits_per_byte"]))


def test_the_best_run_trains_again_to_the_reported_value(make, tmp_path):
    printed = search(make(method="random", trials=2), quiet=True)
    run = load(PretrainRun, [printed["best_run"], f"output={tmp_path / 'again'}"])
    assert pretrain(run, quiet=True)["bits_per_byte"] == printed["best"]["bits_per_byte"]
    assert math.isclose(printed["best"]["score"], 1 / printed["best"]["bits_per_byte"])


@pytest.mark.parametrize("method", ["halving", *(pytest.param(m, marks=pytest.mark.slow) for m in ("random", "tpe"))])
def test_invalid_combinations_are_skipped(make, tmp_path, method):
    """One that the schema refuses, and one that the run refuses before its first step."""
    space = {
        "train.accumulation": {"kind": "choice", "choices": [1, 9]},
        "data.window_bytes": {"kind": "int", "low": 40, "high": 60},
        "tokenizer.load": {"kind": "choice", "choices": [str(tmp_path / "none"), make().base["tokenizer"]["load"]]},
    }
    printed = search(make(method=method, space=space, trials=4, pruner="none", seed=1), quiet=True)
    trials = results(tmp_path / "search")["trials"]
    reasons = " ".join(t["error"] for t in trials if t["status"] == "invalid")
    assert "9 microbatches cannot be cut from a batch of 4" in reasons
    assert str(tmp_path / "none") in reasons
    assert printed["failed"] == 0
    if method != "halving":
        assert printed["done"] == 4


def test_without_optuna(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match="tpe needs optuna, which is not installed; pip install"):
        search_optuna.import_optuna()


def test_mistakes_are_one_line(make, tmp_path):
    with pytest.raises(UserError, match="pruner: hyperband comes with method=tpe"):
        make(method="random", pruner="hyperband")
    with pytest.raises(UserError, match="rungs: empty; method=halving needs"):
        make(method="halving", rungs=[])
    search(make(method="random", trials=1, rungs=[]), quiet=True)
    with pytest.raises(UserError, match="cannot resume with another config: seed differ"):
        search(make(method="random", trials=1, rungs=[], seed=5), quiet=True)
    with pytest.raises(UserError, match=r"metrics.accuracy: not measured at step 2 .*only at no step"):
        search(make(method="random", metrics={"accuracy": "max"}, output=tmp_path / "other"), quiet=True)
    assert read_run_file(tmp_path / "search/run.yaml")["seed"] == 0


@pytest.mark.slow
def test_eight_trials_of_tpe_with_hyperband(make, tmp_path):
    printed = search(make(method="tpe", pruner="hyperband", eta=2, trials=8, startup=3), quiet=True)
    assert printed["done"] + printed["pruned"] == 8
    assert (tmp_path / "search/study.db").is_file()


@pytest.mark.slow
def test_trials_side_by_side_in_processes(make):
    options = {"method": "tpe", "pruner": "none", "trials": 2, "rungs": [], "startup": 2}
    here = search(make(**options), quiet=True)
    there = search(make(**options, in_process=False, jobs=2, output=make().output.with_name("other")), quiet=True)
    assert there["best"] == here["best"]
