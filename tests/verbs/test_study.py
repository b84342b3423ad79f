"""`tokenkit study` and `tokenkit architectures`: whole ones, of tiny runs."""

import json

import pytest

from tokenkit.config import UserError, build
from tokenkit.eval.summary import spread
from tokenkit.report.sweep import Reading, RunFigures, sweep_table
from tokenkit.verbs.architectures import ArchitecturesRun, Measured, architectures, on_frontier
from tokenkit.verbs.study import StudyRun, differences, study


@pytest.fixture
def base(corpus, model_folder):
    source = {"path": str(corpus), "separator": "\n\n"}
    return {
        "model": {"source": str(model_folder)},
        "student": {"config": {"hidden_size": 16}, "start": "random"},
        "losses": {"forward_kl": {}},
        "data": {"source": source, "window_bytes": 60},
        "train": {"steps": 4, "batch_size": 2, "log_every": 2},
        "eval": {"source": {**source, "max_bytes": 300}, "context_tokens": 32},
    }


def study_run(tmp_path, base, **changes):
    values = {"output": tmp_path / "study", "base": base, "in_process": True, "budgets": [2]}
    return build(StudyRun, values | {"objectives": {"KL": {"forward_kl": {}}}} | changes)


@pytest.mark.slow
def test_a_study(tmp_path, base):
    printed = study(study_run(tmp_path, base, budgets=[2, 3]), quiet=True)
    assert (printed["done"], printed["failed"]) == (8, 0)
    assert {steps: set(rows) for steps, rows in printed["rows"].items()} == {
        "2 steps": {"cross-entropy", "KL"},
        "3 steps": {"cross-entropy", "KL"},
    }
    results = json.loads((tmp_path / "study/results.json").read_text("utf-8"))
    for steps, budget in results["budgets"].items():
        assert budget["equal_steps"] == int(steps)
        assert len({row["amount"] for row in budget["rows"]}) == 1  # the same text for all
        assert budget["differences"]
    page = (tmp_path / "study/table.md").read_text("utf-8")
    assert all(line in page for lines in printed["differences"].values() for line in lines)


def figures(name, values):
    return [
        RunFigures(f"{name}{n}", name, name, n, "done", "f", readings={"m": [Reading(1.0, 1.0, value)]})
        for n, value in enumerate(values)
    ]


def test_differences_that_count():
    runs = [*figures("a", [1.0, 1.2]), *figures("b", [2.0, 2.2]), *figures("c", [1.0, 1.5]), *figures("d", [9.0])]
    found = sweep_table(runs, {"m": "min"}, unit="tokens", references={}, ranked_by="final")
    assert spread([1.0, 1.2]).sd == pytest.approx(0.1414, abs=1e-4)
    lines = differences(found, 2.0)
    assert lines[0].startswith("m: a (1.100 ± 0.141) is better than b (2.100 ± 0.141)")
    assert not any("a " in line and " c " in line for line in lines[:-1])
    assert lines[-1].startswith("not decided")
    none = sweep_table(runs[:2], {"m": "min"}, unit="tokens", references={}, ranked_by="final")
    assert differences(none, 2.0) == ["no difference exceeds 2 standard deviations"]


def test_mistakes_of_a_study(tmp_path, base):
    with pytest.raises(UserError, match=r"seeds: .*at least 2"):
        study_run(tmp_path, base, seeds=[0])
    with pytest.raises(UserError, match="verb: a study is of objectives"):
        study_run(tmp_path, base, verb="pretrain")
    with pytest.raises(UserError, match=r"objectives.cross-entropy: is more than clm"):
        study(study_run(tmp_path, base, objectives={"cross-entropy": {"alm": {}}}), quiet=True)


SHAPES = {"parameters": 20_000, "layers": [1, 2], "hidden_size": [32], "heads": [2], "ffn_multiple": 4}


def test_architectures_are_distilled_and_compared(tmp_path, base):
    values = {"output": tmp_path / "shapes", "base": base, "in_process": True, "seeds": [0], "shapes": SHAPES}
    run = build(ArchitecturesRun, values)
    printed = architectures(run, quiet=True)
    assert (printed["done"], printed["failed"]) == (2, 0)
    again = architectures(run, quiet=True)
    assert again["rows"] == printed["rows"]
    shapes = json.loads((tmp_path / "shapes/frontier.json").read_text("utf-8"))["shapes"]
    assert all(abs(s["parameters"] - 20_000) <= 400 for s in shapes)
    assert all(s["bytes"] > 4 * s["parameters"] for s in shapes)  # float32, and a header
    assert all(s["kl"] > 0 for s in shapes)
    assert max(s["speed"] for s in shapes) == 1
    assert {s["name"] for s in shapes if s["frontier"]} == set(again["frontier"]) != set()
    assert all(name in (tmp_path / "shapes/frontier.md").read_text("utf-8") for name in again["frontier"])


def test_the_frontier():
    made = {"a": (1.0, 2.0), "b": (0.5, 1.0), "c": (0.5, 1.5), "d": (0.9, 2.5)}
    shapes = [Measured(name, 1, 1, speed, None, bits) for name, (speed, bits) in made.items()]
    assert [shape.name for shape in on_frontier(shapes) if shape.frontier] == ["a", "b"]
