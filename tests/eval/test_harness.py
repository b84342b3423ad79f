"""Benchmarks: what is handed to other packages, results that are measured once, and figures of the user's own."""

import importlib
import json
import logging
import sys
from dataclasses import replace
from types import ModuleType

import pytest

from tokenkit.config import UserError, build
from tokenkit.data.source import read_documents
from tokenkit.eval.harness import EvalRow, HarnessConfig, Subject, benchmark, over_tasks
from tokenkit.eval.metrics import OwnMetric, load_metrics
from tokenkit.models.load import load_model
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.verbs.benchmarks import counting, subject_of
from tokenkit.verbs.distill import distill
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.model import ModelChoice


class Counting:
    """A backend that counts how often it measures what."""

    name = "counting"

    def __init__(self, inside="a"):
        self.inside, self.asked, self.fail = inside, [], False

    def version(self):
        return "1"

    def depends_on(self, task):
        return {"inside": self.inside}

    def members(self, task):
        return [task, f"{task}_inside"]

    def evaluate(self, subject, tasks, *, limit, num_fewshot):
        self.asked += [(subject.source, task, limit) for task in tasks]
        if self.fail:
            raise RuntimeError("no luck\nat all")
        return [EvalRow(task, "acc", 0.5, "max", self.name, "1", "1", num_fewshot, limit, "d") for task in tasks]


def test_what_was_measured_once_is_not_measured_again(tmp_path):
    backend, cache = Counting(), tmp_path / "kept"
    teacher = Subject("teacher", None, "weights-1")

    def ask(subject=teacher, tasks=("a", "b"), limit=10, num_fewshot=0, using=backend):
        return benchmark(using, subject, tasks, limit=limit, num_fewshot=num_fewshot, cache=cache)

    first = ask()
    assert ask() == first
    assert ask(Subject("the same in another folder", None, "weights-1")) == first
    assert len(backend.asked) == 2
    ask(tasks=("b", "c"))
    assert [task for _, task, _ in backend.asked] == ["a", "b", "c"]
    for changed in ({"limit": 11}, {"num_fewshot": 1}, {"subject": replace(teacher, identity="weights-2")}):
        before = len(backend.asked)
        ask(**changed)
        assert len(backend.asked) == before + 2
    other = Counting("b")
    ask(using=other)
    assert len(other.asked) == 2
    ask(Subject("unknown"), using=other)
    ask(Subject("unknown"), using=other)
    assert len(other.asked) == 6  # without a fingerprint nothing is kept


def test_a_benchmark_that_fails_is_a_row(tmp_path, caplog):
    backend = Counting()
    backend.fail = True
    with caplog.at_level(logging.WARNING):
        (found,) = benchmark(backend, Subject("x", None, "w"), ["a"], limit=None, num_fewshot=None, cache=tmp_path)
    assert (found.value, found.note) == (None, "not run: failed: RuntimeError: no luck at all")
    backend.fail = False
    (found,) = benchmark(backend, Subject("x", None, "w"), ["a"], limit=None, num_fewshot=None, cache=tmp_path)
    assert found.value == 0.5  # a failure is not kept


def test_a_subject_is_its_weights_and_its_tokenizer(tmp_path, model_folder):
    one = subject_of(ModelChoice(source=str(model_folder)))
    model = load_model(str(model_folder))
    model.save_pretrained(tmp_path / "b")
    load_tokenizer(str(model_folder)).save(tmp_path / "b")
    moved = subject_of(ModelChoice(source=str(tmp_path / "b")))
    model.get_input_embeddings().weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "c")
    load_tokenizer(str(model_folder)).save(tmp_path / "c")
    assert subject_of(ModelChoice(source=str(tmp_path / "c"))).identity != moved.identity
    load_tokenizer("byte").save(tmp_path / "b")
    assert subject_of(ModelChoice(source=str(tmp_path / "b"))).identity != moved.identity
    assert one.identity is not None


def test_the_mean_over_tasks_turns_ratios_and_bears_zero():
    def row(task, metric, value, direction):
        return EvalRow(task, metric, value, direction, "b", "", "", None, None, "d")

    own = [row("a", "acc", 0.25, "max"), row("p", "ppl", 20.0, "min"), row("p", "more", 1.0, "max")]
    teacher = [row("a", "acc", 0.5, "max"), row("p", "ppl", 40.0, "min"), row("p", "more", 9.0, "max")]
    assert over_tasks(own, teacher) == {"tasks": 2, "mean": 1.25, "geometric_mean": 1.0}
    zero = over_tasks([row("a", "acc", 0.0, "max"), own[1]], teacher)
    assert 0 < zero["geometric_mean"] < 0.01
    assert over_tasks(own, []) == {}
    assert over_tasks([row("m", "x", 1.0, None)], [row("m", "x", 2.0, None)]) == {}


@pytest.fixture
def run(tmp_path, model_folder, corpus):
    def make(**changes):
        source = {"path": str(corpus), "separator": "\n\n"}
        asked = {"source": {**source, "max_bytes": 200}, "context_tokens": 64} | changes.pop("eval", {})
        values = {
            "output": tmp_path / "out",
            "model": {"source": str(model_folder)},
            "losses": {"clm": {}},
            "data": {"source": source, "window_bytes": 80},
            "train": {"steps": 2, "batch_size": 2, "optimizer": {"learning_rate": 1e-2}},
            "eval": asked,
        }
        return build(DistillRun, values | changes)

    return make


@pytest.fixture
def arc(tmp_path):
    """A folder with one task of four questions, and what a run has to say of it."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": f"the {word}", "choices": [" sat", " mat"], "label": 0} for word in ("cat", "dog", "fish", "eye")
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "arc.yaml").write_text(ARC, "utf-8")
    return {"tasks": ["arc"], "include_path": [str(folder)], "placeholders": {"data": str(folder)}}


ARC = """
task: arc
dataset_path: json
dataset_kwargs: {data_files: {test: "${data}/rows.jsonl"}}
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_target: label
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 3.0}
"""


@pytest.fixture
def lm_eval(monkeypatch):
    """Its model classes replaced by one that looks at the folder it is handed, and finds the first choice likelier."""
    pytest.importorskip("lm_eval")
    from lm_eval.api import registry
    from lm_eval.api.model import LM

    class Looking(LM):
        calls = []

        @classmethod
        def create_from_arg_obj(cls, arg_dict, additional_config=None):
            folder = arg_dict["pretrained"]
            model, tokenizer = load_model(folder), load_tokenizer(folder)  # refuses incomplete weights
            cls.calls.append({**arg_dict, "parameters": model.num_parameters(), "ids": tokenizer.vocab_size})
            return cls()

        def loglikelihood(self, requests):
            return [(0.0 if " sat" in request.args[1] else -1.0, True) for request in requests]

        def loglikelihood_rolling(self, requests):
            raise AssertionError

        generate_until = loglikelihood_rolling

    asked = []
    monkeypatch.setattr(registry, "get_model", lambda name: asked.append(name) or Looking)
    Looking.calls, Looking.names = [], asked
    return Looking


@pytest.mark.parametrize("backend", ["hf", "vllm"])
def test_other_packages_get_a_whole_folder_after_the_memory_is_free(run, monkeypatch, lm_eval, arc, backend):
    freed = []
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    from tokenkit.verbs import benchmarks as module

    real = module._free
    monkeypatch.setattr(module, "_free", lambda sides: (freed.append((len(lm_eval.calls), sides)), real(sides)))
    results = distill(run(eval={"harness": arc | {"backend": backend, "limit": 3, "num_fewshot": 0}}), quiet=True)
    ((before, sides),) = freed
    assert before == 0  # saved, freed, and only then measured
    assert sides.student.model.device.type == "meta"
    assert lm_eval.names == [backend, backend]
    student, teacher = lm_eval.calls
    assert student["pretrained"] == str(run().output / "model")
    assert teacher["pretrained"] == run().model.source
    assert student["parameters"] == teacher["parameters"] > 0
    assert student["dtype"] == "float32"
    first, second = results["benchmarks"]["trained"]  # what stands beside the metrics is no figure
    assert (first["metric"], second["metric"]) == ("acc_norm", "acc")
    assert (first["value"], first["direction"], first["task_version"], first["num_fewshot"]) == (1.0, "max", "3.0", 0)
    assert "lm_eval 0.4" in first["version"]
    assert ("vllm" in first["version"]) == (backend == "vllm")
    assert (first["dataset"], first["split"], first["limit"]) == ("rows.jsonl", "test", 3)
    assert results["benchmarks"]["beside_teacher"] == {"tasks": 1, "mean": 1.0, "geometric_mean": 1.0}
    assert "| arc | acc norm ↑ | 0 | 3 |" in (run().output / "model/README.md").read_text("utf-8")


def test_a_teacher_is_measured_once_for_several_students(run, tmp_path, lm_eval, arc):
    asked = {"harness": arc | {"backend": "hf", "cache": str(tmp_path / "kept")}}
    for number in range(2):
        train = {"steps": 1 + number, "batch_size": 2, "optimizer": {"learning_rate": 1e-2}}
        distill(run(eval=asked, output=tmp_path / str(number), train=train), quiet=True)
    sources = [call["pretrained"] for call in lm_eval.calls]
    assert sources.count(run().model.source) == 1
    assert len(sources) == 3


def test_an_unknown_task_is_told_before_training(run, arc, monkeypatch):
    from tokenkit.eval import lm_eval_tasks

    pytest.importorskip("lm_eval")
    monkeypatch.setattr(lm_eval_tasks, "_stock", lambda: lm_eval_tasks.TaskFolders([]).manager([]))  # quick
    for name, near in (("ark", "arc"), ("perplexty", "perplexity")):
        with pytest.raises(UserError, match=f"did you mean .*{near}") as told:
            distill(run(eval={"harness": arc | {"tasks": [name]}}), quiet=True)
        assert "\n" not in str(told.value)
        assert not run().output.exists()


def test_a_group_counts_once(tmp_path):
    class Group(Counting):
        def evaluate(self, subject, tasks, *, limit, num_fewshot):
            names = [name for task in tasks for name in self.members(task)]
            return super().evaluate(subject, names, limit=limit, num_fewshot=num_fewshot)

    backend = Group()
    asked = {"limit": None, "num_fewshot": None, "cache": tmp_path}
    found = benchmark(backend, Subject("x", None, "w"), ["a"], **asked)
    assert [row.task for row in found] == ["a", "a_inside"]
    assert benchmark(backend, Subject("x", None, "w"), ["a"], **asked) == found  # with its members, from the cache
    assert [row.task for row in counting(found, backend, ["a"])] == ["a"]
    assert [row.task for row in counting(found[1:], backend, ["a"])] == ["a_inside"]
    assert counting(found, backend, ["a", "a_inside"]) == found


@pytest.mark.parametrize(("backend", "missing"), [("hf", "lm-eval"), ("vllm", "vllm")])
def test_without_the_package_a_run_warns_once_and_ends_well(run, monkeypatch, caplog, arc, backend, missing):
    absent = {"hf": "lm_eval", "vllm": "vllm"}[backend]
    monkeypatch.setitem(sys.modules, absent, None)  # an import of it fails
    with caplog.at_level(logging.WARNING):
        results = distill(run(eval={"harness": arc | {"backend": backend}}), quiet=True)
    found = results["benchmarks"]["trained"]
    assert [(row["task"], row["value"]) for row in found] == [("arc", None)]
    assert all(f"not run: the package {missing} is not installed" in row["note"] for row in found)
    warned = [record for record in caplog.records if "not installed" in record.getMessage()]
    assert len(warned) == 1
    assert (run().output / "results.json").is_file()
    assert "not run: the package" in (run().output / "model/README.md").read_text("utf-8")


METRICS = """
def longest(model, tokenizer, documents):
    return max(len(tokenizer.encode(text)) for text in documents)

def heads(model, tokenizer, documents):
    return model.config.num_attention_heads

def text(model, tokenizer, documents):
    return "much"

def narrow(model):
    return 1.0
"""


def test_functions_of_the_user_are_figures(run, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(METRICS, "utf-8")
    asked = {"metrics": [f"{file}:longest", {"function": f"{file}:heads", "direction": "max"}, f"{file}:text"]}
    results = distill(run(eval=asked), quiet=True)
    found = {row["task"]: row for row in results["benchmarks"]["trained"]}
    documents = read_documents(run().eval.source)
    tokenizer = load_tokenizer(run().model.source)
    assert found["longest"]["value"] == max(len(tokenizer.encode(text)) for text in documents)
    assert (found["heads"]["value"], found["heads"]["direction"]) == (2, "max")
    assert "return one number" in found["text"]["note"]
    assert found["longest"]["backend"] == "own"
    assert results["benchmarks"]["beside_teacher"]["tasks"] == 1


def test_functions_of_an_installed_module(tmp_path, monkeypatch):
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "figures.py").write_text(METRICS, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    (metric,) = load_metrics([OwnMetric(function="my_package.figures:heads")])
    assert metric.name == "heads"
    assert len(metric.sha256) == 64


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("mine.py", "write FILE.py:FUNCTION"),
        ("gone.py:x", "cannot be read"),
        ("mine.py:gone", "holds no function 'gone'"),
        ("mine.py:narrow", "it is called as narrow"),
        ("broken.py:x", "SyntaxError"),
        ("no.such.module:x", "ModuleNotFoundError"),
    ],
)
def test_a_function_that_is_not_there_is_told_before_training(run, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(METRICS, "utf-8")
    (tmp_path / "broken.py").write_text("def x(:\n", "utf-8")
    with pytest.raises(UserError, match=message) as told:
        distill(run(eval={"metrics": [words]}), quiet=True)
    assert "\n" not in str(told.value)
    assert not run().output.exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tasks": ["perplexty"], "backend": "builtin"}, "did you mean 'perplexity'"),
        ({"tasks": ["hellaswag"], "backend": "builtin"}, "need backend=tokenkit"),
        ({"tasks": ["cloze"]}, "cloze: missing"),
        ({"tasks": []}, "tasks"),
    ],
)
def test_tasks_that_are_not_there(keys, message):
    with pytest.raises(UserError, match=message):
        build(HarnessConfig, keys)
