"""Testing, comparing and managing learned tokenizers: files, pages, gates, and none of the old defects."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from tokenkit.config import UserError, build, resolved
from tokenkit.eval import tokenizer_gates as deciding
from tokenkit.eval.tokenizer_results import Check, EdgeResult, Gate, read_results
from tokenkit.tokenizers.autoencoder.bundle import write_bundle
from tokenkit.tokenizers.autoencoder.network import AutoEncoder, NetworkConfig
from tokenkit.tokenizers.autoencoder.selection import select_pins
from tokenkit.tokenizers.autoencoder.tokenizer import AutoEncoderTokenizer, package_of
from tokenkit.verbs.tokenizer import gates as gates_verb
from tokenkit.verbs.tokenizer import test as test_verb
from tokenkit.verbs.tokenizer.compare import TokenizerCompareRun, compare_tests
from tokenkit.verbs.tokenizer.gates import TokenizerGatesRun, failed_gates, gate_lines, tokenizer_gates
from tokenkit.verbs.tokenizer.test import TokenizerTestRun, result_lines, run_tokenizer_test
from tokenkit.verbs.tokenizer.tester import TokenizerReconstructionTester

SCRIPTS = Path(__file__).parents[2] / "scripts"
SHAPE = NetworkConfig(hidden=32, byte_width=8, groups=2, min_groups=1)


def network(seed=0):
    torch.manual_seed(seed)
    return AutoEncoder(SHAPE).eval()


def checkpoint(folder, name, step, value=None, best=None, metric="learned_byte_accuracy", **state):
    """A file as training writes it; its averaged weights are those of `network(step)`."""
    folder.mkdir(exist_ok=True)
    weights, average = network(step + 1).state_dict(), network(step).state_dict()
    best_value, best_step = best or (value, step)
    values = {
        "step": step,
        "epoch": 0,
        "loss": 1 / step,
        "value": value,
        "best_value": best_value,
        "best_step": best_step,
        "metric": metric,
        "network": resolved(SHAPE),
        "chunker": "word",
        "config_hash": "c",
        "data_fingerprint": "d",
        "timestamp": "2026-01-01T00:00:00+00:00",
        **state,
    }
    tensors = {"model": weights, "state": {f"task.ema.{key}": tensor for key, tensor in average.items()}}
    write_bundle(folder / name, tensors, values)
    return folder / name


def step(folder, number, value=None, **state):
    return checkpoint(folder, f"checkpoint_step_{number}.bin", number, value, **state)


def cheap(monkeypatch):
    """No strings that tokenizers stumble over, little text, and no process to measure memory in."""
    monkeypatch.setattr(deciding, "resident_bytes", lambda model, kind: 1)
    monkeypatch.setattr(gates_verb, "edge_battery", lambda tokenizer, config, tell: ())
    monkeypatch.setattr(gates_verb, "read_documents", lambda source: ["hello world hello"])


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs a script with words: exit code, standard output, standard error."""

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        source = compile((SCRIPTS / f"{name}.py").read_text("utf-8"), name, "exec")
        code = 0
        try:
            exec(source, {"__name__": "__main__"})
        except SystemExit as left:
            code = left.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def tests(tmp_path_factory):
    """A baseline, and a test of a package that has learnt a little."""
    folder = tmp_path_factory.mktemp("tests")
    run_tokenizer_test(TokenizerTestRun(phase="before", output=folder / "before.json"))
    package = package_of(network(), select_pins({b"hello": 3, b" world": 2}, 2))
    AutoEncoderTokenizer(package=package).save(folder / "tokenizer")
    run_tokenizer_test(TokenizerTestRun(phase="after", model=folder / "tokenizer", output=folder / "after.json"))
    return folder


def test_the_baseline(tests):
    results = read_results(tests / "before.json")
    assert (results.phase, results.model, results.learned.perfect, results.system.perfect) == (
        "before",
        "untrained",
        0,
        10,
    )
    assert results.learned.char_accuracy_positional <= 0.2
    lines = "\n".join(result_lines(results))
    assert re.search(r"perfect +0/10 +10/10", lines)
    assert "fails: 'hello world'" in lines


def test_a_package_is_tested_with_its_network_even_where_it_is_compact(tmp_path, tests):
    AutoEncoderTokenizer(package=package_of(network(), kind="compact")).save(tmp_path / "compact")
    results = run_tokenizer_test(TokenizerTestRun(phase="after", model=tmp_path / "compact"))
    assert results.learned is not None
    assert results.system.tiers["open"] == 0
    assert results.fingerprint == (tmp_path / "compact/fingerprint.txt").read_text().strip()
    opened = run_tokenizer_test(TokenizerTestRun(phase="after", model=tmp_path / "compact", kind="open"))
    assert opened.learned == results.learned


def test_a_checkpoint_keeps_its_chunks_and_its_averaged_weights(tmp_path):
    path = step(tmp_path, 7, 0.5)
    results = run_tokenizer_test(TokenizerTestRun(phase="after", model=path))
    assert (results.step, results.config_hash) == (7, "c")
    own = AutoEncoderTokenizer(package=package_of(network(7), chunker="word"))
    assert (
        results.examples[1].learned.output == own.test_reconstruction(results.examples[1].text).learned_reconstruction
    )


def test_final_and_comprehensive_decides_the_gates(tmp_path, tests, monkeypatch):
    cheap(monkeypatch)
    run = TokenizerTestRun(phase="final", model=tests / "tokenizer", comprehensive=True, output=tmp_path / "final.json")
    results = run_tokenizer_test(run)
    assert results == read_results(tmp_path / "final.json")
    assert [gate.verdict for gate in results.gates][:3] == ["PASS", "FAIL", "NOT RUN"]
    lines = "\n".join(result_lines(results))
    assert "FAIL  G2" in lines
    assert any(line.startswith("gate G2 failed: learned character accuracy") for line in failed_gates(results.gates))
    assert [result.corpus for result in results.edges] == ["examples", "corpus"]


def test_gates_that_could_not_be_decided_do_not_fail():
    checks = (Check(what="bytes", value="3", target="at most 2", passed=False),)
    gates = tuple(
        Gate(name=name, title="t", passed=passed, checks=checks if passed is False else ())
        for name, passed in (("G1", True), ("G2", None), ("G3", False))
    )
    assert failed_gates(gates) == ["gate G3 failed: bytes 3, at most 2"]
    assert [line.split("  ")[0] for line in gate_lines(gates) if line[0] != " "] == ["PASS", "NOT RUN", "FAIL"]


def test_gates_by_themselves(tests, monkeypatch, tmp_path):
    cheap(monkeypatch)
    gates = tokenizer_gates(TokenizerGatesRun(model=tests / "tokenizer", output=tmp_path / "g.json"))
    assert [gate.name for gate in gates] == ["G1", "G2", "G3", "G4"]
    assert read_results(tmp_path / "g.json").gates == gates


class Page(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_a_comparison_says_before_after_and_what_still_fails(tests, tmp_path):
    found = compare_tests(
        TokenizerCompareRun(before=tests / "before.json", after=tests / "after.json", report=tmp_path / "p/page.html")
    )
    before, after = (read_results(tests / f"{name}.json") for name in ("before", "after"))
    values = found.as_json()["learned"]["char_accuracy_aligned"]
    old, new = before.learned.char_accuracy_aligned, after.learned.char_accuracy_aligned
    assert values == {"before": old, "after": new, "change": pytest.approx(100 * (new - old))}
    assert found.as_json()["system"]["mean_edit_distance"]["change"] == 0
    page = Page(tmp_path / "p/page.html")
    for failure in found.failing:
        assert failure.text in page.text
        assert failure.side == "learned"
    assert f"{new:.1%}" in page.text
    assert "points" in page.text
    bars = [attrs for tag, attrs in page.elements if tag == "rect"]
    assert len(bars) == 2 * sum(delta.is_share for deltas in found.deltas.values() for delta in deltas)
    assert all(0 <= float(bar["width"]) <= 240 for bar in bars)
    assert not [t for t, attrs in page.elements if t == "script" or ("href" in attrs and t != "link")]
    assert not [attrs for _, attrs in page.elements if "src" in attrs]
    assert "http" not in (tmp_path / "p/page.html").read_text("utf-8").replace("http-equiv", "")
    assert "still fails (learned)" in "\n".join(found.lines())


def test_a_page_escapes_what_a_network_says(tests, tmp_path):
    values = json.loads((tests / "after.json").read_text("utf-8"))
    evil = '</td><script>alert(1)</script>{{ 7 * 7 }}\x00\u202e"'
    values["model"] = evil
    for example in values["examples"]:
        example["learned"] |= {"output": evil, "diagnosis": evil}
    (tmp_path / "after.json").write_text(json.dumps(values), "utf-8")
    run = TokenizerCompareRun(
        before=tests / "before.json", after=tmp_path / "after.json", report=tmp_path / "page.html"
    )
    compare_tests(run)
    page = Page(tmp_path / "page.html")
    assert not [tag for tag, _ in page.elements if tag == "script"]
    assert "{{ 7 * 7 }}" in page.text
    assert "\x00" not in page.text
    assert r"\u202e" in page.text


def test_different_examples_are_not_compared(tests, tmp_path):
    tester = TokenizerReconstructionTester(AutoEncoderTokenizer(package=package_of(None)))
    tester.run_test_suite(["another text"])
    tester.save_results(tmp_path / "other.json")
    with pytest.raises(UserError, match="measured on different examples"):
        compare_tests(TokenizerCompareRun(before=tests / "before.json", after=tmp_path / "other.json"))


def test_the_tester_of_the_checklist(tests, tmp_path):
    tester = TokenizerReconstructionTester(AutoEncoderTokenizer())
    for act in (tester.generate_report, tester.save_results):
        with pytest.raises(UserError):
            act(tmp_path / "x")
    cases = ["hello world", "The quick brown fox", "123 test"]
    assert tester.run_test_suite(cases).learned.examples == 3
    assert tester.test_before_training().phase == "before"
    assert tester.test_after_training().phase == "after"
    assert len(tester.history) == 3
    tester.save_results(tmp_path / "r.json")
    assert read_results(tmp_path / "r.json") == tester.history[-1]
    tester.compare_results(tests / "before.json", tests / "after.json")
    tester.generate_report(tmp_path / "page.html")
    assert "before and after" in (tmp_path / "page.html").read_text("utf-8")


def test_a_phase_after_training_needs_a_model():
    with pytest.raises(UserError, match="model: missing in phase after"):
        build(TokenizerTestRun, {"phase": "after"})


def test_the_scripts(script, tmp_path, tests):
    folder = tmp_path / "c"
    step(folder, 1000, 0.2)
    assert script("test_tokenizer_pretrain", "--phase", "before", "--output", tmp_path / "b.json")[0] == 0
    model = ("--model", folder / "checkpoint_step_1000.bin")
    assert script("test_tokenizer_pretrain", "--phase", "after", *model, "--output", tmp_path / "a.json")[0] == 0
    words = ("--compare", tmp_path / "b.json", tmp_path / "a.json", "--report", tmp_path / "r.html")
    code, out, _ = script("test_tokenizer_pretrain", *words)
    assert code == 0
    assert "character accuracy, by position" in out
    assert (tmp_path / "r.html").is_file()
    code, out, _ = script("manage_checkpoints", "--dir", folder, "--list")
    assert (code, "checkpoint_step_1000.bin" in out) == (0, True)
    code, out, _ = script("manage_checkpoints", "--compare", *[folder / "checkpoint_step_1000.bin"] * 2)
    assert json.loads(out)["change"]["step"] == 0
    code, out, _ = script("manage_checkpoints", "--dir", folder, "--select-best", "--output", tmp_path / "m")
    assert json.loads(out)["step"] == 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("test_tokenizer_pretrain", "--phase", "after"), "model: missing"),
        (("test_tokenizer_pretrain", "--phase", "before", "--report", "x.html"), "belongs to --compare"),
        (("test_tokenizer_pretrain", "--compare", "no.json", "no.json"), "no configuration"),
        (("manage_checkpoints", "--dir", "none", "--list"), "does not exist"),
        (("tokenizer_gates", "--model", "none"), "does not exist"),
    ],
)
def test_a_mistake_in_a_script_is_one_line_and_exit_2(script, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = script(*words)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_failed_gate_is_exit_2(script, tests, monkeypatch):
    cheap(monkeypatch)
    for words in (("test_tokenizer_pretrain", "--phase", "final", "--comprehensive"), ("tokenizer_gates",)):
        code, out, err = script(*words, "--model", tests / "tokenizer")
        assert code == 2
        assert "FAIL  G2" in out
        assert "gate G2 failed" in err


def test_a_lost_string_is_exit_2(script, monkeypatch):
    lost = EdgeResult(corpus="x", tried=1, bytes=1, wrong=1, first_wrong="a came back as b", seconds=0.0)
    monkeypatch.setattr(test_verb, "edge_battery", lambda tokenizer, config, tell: (lost,))
    code, out, _ = script("test_tokenizer_pretrain", "--phase", "before", "--comprehensive")
    assert (code, "1 wrong of 1 strings" in out) == (2, True)
