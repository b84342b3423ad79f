"""The card: what the hub reads of it comes back unchanged, what is better is bold, what is private is not there."""

import re
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard

from tokenkit.eval.harness import EvalRow
from tokenkit.export.private import found_private, plain_names, redacted
from tokenkit.report.card import NO_LICENSE, eval_results, render_card
from tokenkit.report.card_facts import CardConfig, CardFacts, Measured, Place, best, curve_of, direction_of, retention
from tokenkit.report.provenance import PACKAGE_LICENSE, package_commit, provenance

ROOT = Path(__file__).parents[2]


def row(task, metric, value, direction="max", **more):
    return EvalRow(task, metric, value, direction, "hf", "lm_eval 0.4", "2.0", 5, 100, f"data/{task}", **more)


@pytest.fixture
def facts():
    return CardFacts(
        name="small",
        summary="A small one.",
        verb="distill",
        run_file="output: out\n",
        command="OMP_NUM_THREADS=1 tokenkit distill run.yaml",
        license="mit",
        language=["en"],
        base_models=["owner/teacher"],
        relation="finetune",
        datasets=["owner/text"],
        tags=["tokenkit", "distillation"],
        made_with=[provenance()],
        evaluation=[
            Measured("teacher", {"ppl": 10.0}, is_teacher=True),
            Measured("before training", {"ppl": 90.0, "top1_agreement": 0.5}),
            Measured("this model", {"ppl": 20.0, "top1_agreement": 0.4}),
        ],
        place=Place("owner/held", "held", "test"),
        benchmarks=[
            row("arc", "acc", 0.25, config="easy", split="test", revision="abc"),
            row("wiki", "word_perplexity", 30.0, "min"),
            row("same", "acc", 0.0),
        ],
        teacher_benchmarks=[
            row("arc", "acc", 0.5),
            row("wiki", "word_perplexity", 15.0, "min"),
            row("same", "acc", 0.1),
        ],
        over_tasks={"tasks": 3, "mean": 0.33, "geometric_mean": 0.01},
    )


def test_the_hub_reads_the_metadata_back_unchanged(facts):
    data = ModelCard(render_card(facts)).data
    assert (data.library_name, data.license, data.base_model) == ("tokenkit", "mit", "owner/teacher")
    assert (data.base_model_relation, data.datasets, data.tags) == (
        "finetune",
        ["owner/text"],
        ["tokenkit", "distillation"],
    )
    assert data.tokenkit_version == provenance()["version"]
    found = {(r.task_name, r.dataset_type, r.metric_type): r for r in data.eval_results}
    assert all(isinstance(result, EvalResult) for result in data.eval_results)
    expected = eval_results(facts)
    assert len(found) == len(expected) == 5
    for result in expected:
        assert found[result.task_name, result.dataset_type, result.metric_type] == result
    arc = found["arc", "data/arc", "acc"]
    assert (arc.dataset_config, arc.dataset_split, arc.dataset_revision) == ("easy", "test", "abc")
    assert (arc.metric_value, arc.metric_name) == (0.25, "arc: acc")
    assert arc.dataset_args == {"backend": "hf lm_eval 0.4", "task_version": "2.0", "num_fewshot": 5, "limit": 100}


def test_without_a_licence_there_is_none_and_a_warning(facts):
    assert CardConfig().license is None
    text = render_card(replace(facts, license=None))
    assert ModelCard(text).data.license is None
    assert NO_LICENSE in text
    assert NO_LICENSE not in render_card(facts)


def test_what_is_better_is_bold(facts):
    text = render_card(facts)
    assert "| this model | **20.0000** | 0.4000 |" in text  # a perplexity: lower
    assert "| before training | 90.0000 | **0.5000** |" in text  # an agreement: higher
    assert "| teacher | 10.0000 | – |" in text
    assert "| retention | 50.0 % | – |" in text
    assert "| arc | acc ↑ | 5 | 100 | 0.2500 | **0.5000** | 50.0 % |" in text
    assert "| wiki | word perplexity ↓ | 5 | 100 | 30.0000 | **15.0000** | 50.0 % |" in text
    assert "geometric mean 1.0 %" in text
    assert {direction_of(name) for name in ("ppl", "loss", "kl", "bits_per_byte", "wer")} == {"min"}
    assert best([3.0, 1.0, None, 1.0], "min") == {1, 3}
    assert best([3.0, 1.0], None) == best([3.0, None], "max") == set()
    assert retention(0.0, 0.5, "max") == "0.0 %"
    assert retention(0.1, 0.0, "max") != "–"  # zero is a number


def test_sections_without_facts_are_left_out(facts):
    bare = replace(facts, evaluation=(), benchmarks=(), teacher_benchmarks=(), over_tasks={}, made_with=())
    text = render_card(bare)
    assert "## Benchmarks" in render_card(facts)
    assert "## Evaluation" in render_card(facts)
    for title in ("Benchmarks", "Evaluation", "Objective", "Student and teacher", "Training", "Resources", "Limits"):
        assert f"## {title}" not in text
    assert ModelCard(text).data.eval_results is None
    not_run = replace(bare, benchmarks=[row("arc", "", None, None, note="not run: lm-eval is missing")])
    assert "not run: lm-eval is missing" in render_card(not_run)
    assert ModelCard(render_card(not_run)).data.eval_results is None


@pytest.mark.parametrize(
    ("text", "private"),
    [
        ("see /home/ann/secret/run.yaml now", ["ann", "secret", "/home"]),
        ("/home/ann", ["ann", "/home"]),
        ("under /root", ["/root"]),
        ("path: /data/corpora/ann/x.txt", ["/data", "ann"]),
        (r"C:\Users\ann\model", ["Users", "ann"]),
        ("~/ann/things/x", ["~", "ann"]),
        ("token hf_abcdefghijklmnopqrstuvwx", ["hf_"]),
        ("ghp_" + "a1" * 18, ["ghp_"]),
        ("https://ann:secret@host/x", ["ann", "secret"]),
    ],
)
def test_private_things_are_taken_out(text, private):
    assert found_private(text)
    clean = redacted(text)
    assert not [word for word in private if word in clean]
    assert not found_private(clean)
    assert redacted(clean) == clean


@pytest.mark.parametrize(
    "text",
    [
        "outputs/run/model",
        "../shared/data/x.txt",
        "https://example.org/a/b/c",
        "1/2 and/or 3/4/5",
        "</div></p>",
        "a.b/c.d/e",
    ],
)
def test_other_things_are_left(text):
    assert redacted(text) == text
    assert not found_private(text)


def test_a_run_with_plain_names_reads_the_same_file_wherever_it_is_named():
    run = {
        "output": "/home/ann/out",
        "data": {"source": {"path": "/data/a/text.txt", "separator": "/a/b/"}},
        "eval": {"source": {"path": "/data/b/text.txt"}},
        "model": {"source": "/data/runs/small/model"},
        "again": ["/data/a/text.txt", "relative/x.txt", 3, None],
    }
    values, names = plain_names(run)
    assert values["output"] == "out"
    assert values["data"]["source"] == {"path": "text.txt", "separator": "/a/b/"}
    assert values["eval"]["source"]["path"] == "text-2.txt"
    assert values["model"]["source"] == "small"
    assert values["again"] == ["text.txt", "relative/x.txt", 3, None]
    assert len({*names.values()}) == len(names) == 4


def test_the_course_of_a_loss():
    curve = curve_of({step: 10.0 - step for step in range(1, 9)} | {9: float("nan")})
    assert (curve.first, curve.lowest, curve.last, curve.steps) == (9.0, 2.0, 2.0, 8)
    assert curve.course == "█▇▆▅▄▃▂▁"
    assert len(curve_of(dict.fromkeys(range(1000), 1.0)).course) == 40
    assert curve_of({}) is None


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


def test_the_commit_is_that_of_the_package_and_never_of_a_repository_around_it(tmp_path, monkeypatch):
    ours = tmp_path / "ours"
    (ours / "tokenkit").mkdir(parents=True)
    assert package_commit(ours).commit == "unknown"  # no repository at all
    (ours / "pyproject.toml").write_text('[project]\nname = "tokenkit-torch"\n', "utf-8")
    git(ours, "init", "-q")
    git(ours, "add", ".")
    git(ours, "commit", "-qm", "one")
    found = package_commit(ours)
    assert re.fullmatch("[0-9a-f]{40}", found.commit)
    assert found.dirty is False
    (ours / "new.txt").write_text("x", "utf-8")
    assert package_commit(ours).dirty is True
    around = tmp_path / "around"
    (around / "site-packages").mkdir(parents=True)
    git(around, "init", "-q")
    git(around, "commit", "-qm", "theirs", "--allow-empty")
    monkeypatch.setenv("GIT_DIR", str(ours / ".git"))  # as inside a git hook
    assert package_commit(around / "site-packages").commit == "unknown"
    assert package_commit(around).commit == "unknown"  # the top of a repository, of another project
    monkeypatch.setenv("PATH", "")
    assert package_commit(ours).commit == "unknown"  # no git


def test_one_licence_everywhere():
    license_text = (ROOT / "LICENSE").read_text("utf-8")
    assert "Apache License" in license_text
    assert "Version 2.0" in license_text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["license"] == PACKAGE_LICENSE == "Apache-2.0"
    assert project["license-files"] == ["LICENSE"]


def test_the_card_says_what_made_it(facts):
    text = render_card(facts)
    made = facts.made_with[0]
    assert f"({PACKAGE_LICENSE}), commit {made['commit']}" in text
    assert f"torch {made['libraries']['torch']}" in text
    dirty = replace(facts, made_with=[{**made, "dirty": True}])
    assert "with changes that are not committed" in render_card(dirty)
    twice = render_card(replace(facts, made_with=[made, {**made, "commit": "f" * 40}]))
    assert "The run began with" in twice
    assert f"It went on with tokenkit-torch {made['version']} ({PACKAGE_LICENSE}), commit {'f' * 40}" in twice


def test_the_documentation_says_what_leaves_the_machine():
    page = (ROOT / "docs" / "cards.md").read_text("utf-8")
    privacy = page.partition("\n## Privacy\n")[2].partition("\n## ")[0]
    for word in ("push_to_hub", "private", "redacted", "HF_HUB_OFFLINE"):
        assert word in privacy
