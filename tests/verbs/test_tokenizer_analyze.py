"""`tokenkit tokenizer analyze` and `prune`: files that stand alone, gates that fail loudly, ids that go on meaning what
they meant.
"""

import csv
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from tokenkit.config import UserError, build
from tokenkit.tokenizers.autoencoder.chunkers import make_chunker
from tokenkit.tokenizers.autoencoder.network import AutoEncoder, NetworkConfig
from tokenkit.tokenizers.autoencoder.package import Package, load_network
from tokenkit.tokenizers.autoencoder.selection import select_pins
from tokenkit.tokenizers.autoencoder.tokenizer import AutoEncoderTokenizer, package_of, save_with_fast
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.verbs.tokenizer.analyze import TokenizerAnalyzeRun, analyze_tokenizer, training_history
from tokenkit.verbs.tokenizer.prune import TokenizerPruneRun, prune_tokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "analyze_codebook.py"
PINS = 40


@pytest.fixture(scope="module")
def network() -> AutoEncoder:
    torch.manual_seed(0)
    config = NetworkConfig(max_bytes=4, levels=(5, 5, 5), hidden=32, byte_width=8, groups=2, min_groups=1)
    return AutoEncoder(config).eval()


@pytest.fixture(scope="module")
def packages(tmp_path_factory, documents, network) -> dict[str, Path]:
    """A table alone, a table with a network beside it, and an open tokenizer without pins."""
    folder = tmp_path_factory.mktemp("packages")
    chunker = make_chunker("word")
    counts: dict[bytes, int] = {}
    for text in documents:
        for chunk in chunker.split(text):
            counts[chunk.encode()] = counts.get(chunk.encode(), 0) + 1
    pins = select_pins(counts, PINS)
    made = {
        "table": package_of(None, pins, chunker="word"),
        "compact": package_of(network, pins, kind="compact", chunker="word"),
        "open": package_of(network, chunker="word"),
    }
    for name, package in made.items():
        save_with_fast(package, folder / name)
    return {name: folder / name for name in made}


@pytest.fixture
def analyze(packages, corpus, tmp_path):
    def run(name="compact", **more):
        values = {"model": packages[name], "corpora": {"path": str(corpus)}, "output": tmp_path / "analysis", **more}
        return analyze_tokenizer(build(TokenizerAnalyzeRun, values))

    return run


@pytest.fixture
def prune(packages, corpus, tmp_path):
    def run(name="compact", **more):
        values = {"model": packages[name], "output": tmp_path / "pruned", **more}
        values["corpus"] = {"path": str(corpus), "max_bytes": 3000}
        return prune_tokenizer(build(TokenizerPruneRun, values))

    return run


@pytest.mark.parametrize("name", ["table", "compact", "open"])
def test_all_four_files_stand_alone(analyze, tmp_path, name, packages):
    figures = analyze(name)
    folder = tmp_path / "analysis"
    assert sorted(path.name for path in folder.iterdir()) == [
        "analysis.json",
        "codebook.csv",
        "report.html",
        "vocab.json",
    ]
    values = json.loads((folder / "analysis.json").read_text("utf-8"))
    assert values["figures"] == {key: value for key, value in figures.items() if key != "output"}
    assert ("learned" in values) == (name != "table")
    page = (folder / "report.html").read_text("utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)|https?://|@import|<script|url\(""", page)
    assert "nan" not in re.sub(r"<title>.*?</title>|<bdi>.*?</bdi>", "", page)
    assert page.count("<figure>") == page.count("<svg ") >= 3
    rows = list(csv.DictReader((folder / "codebook.csv").open(encoding="utf-8", newline="")))
    tokens = sum(int(row["count"]) * len(row["ids"].split()) for row in rows)
    assert tokens == values["usage"]["tokens"]
    vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
    codec = AutoEncoderTokenizer.load(packages[name]).codec
    assert {e["id"]: bytes.fromhex(e["hex"]) for e in vocabulary["entries"]} == {
        index: codec.fixed_bytes[index] for index in range(64, codec.layout.open_base)
    }


def test_named_corpora_other_tokenizers_and_an_earlier_analysis(analyze, corpus, tmp_path, model_folder, packages):
    analyze("table", output=tmp_path / "earlier")
    corpora = {"a": {"path": str(corpus), "max_bytes": 500}, "b": {"path": str(corpus)}}
    training = {"source": {"path": str(corpus), "separator": "\n\n"}, "validation_split": 0.3}
    analyze(
        corpora=corpora,
        tokenizers={"bpe": str(model_folder)},
        baseline=tmp_path / "earlier",
        training=training,
        top_k=7,
    )
    values = json.loads((tmp_path / "analysis" / "analysis.json").read_text("utf-8"))
    text = corpus.read_text("utf-8")
    tokens = len(load_tokenizer(str(model_folder)).encode(text))
    assert values["others"]["bpe"]["b"] == pytest.approx(len(text.encode()) / tokens)
    assert {*values["corpora"]} == {"a", "b"}
    assert values["learned"]["frequency_in"] == "training"
    assert values["baseline"]["figures"]["u1"] > 0
    assert "Before and after" in (tmp_path / "analysis" / "report.html").read_text("utf-8")
    assert len((tmp_path / "analysis" / "codebook.csv").read_text("utf-8").splitlines()) == 8


def test_the_course_of_training_is_drawn(tmp_path, packages):
    state = {"loss_curve": [[1, 2.0], [2, 1.0]], "metric": "learned_byte_accuracy", "accuracy_curve": [[2, 0.5]]}
    path = tmp_path / "training_state.json"
    path.write_text(json.dumps(state), "utf-8")
    assert training_history(path, packages["table"]) == {
        "loss": [[1.0, 2.0], [2.0, 1.0]],
        "learned_byte_accuracy": [[2.0, 0.5]],
    }
    assert training_history(None, tmp_path / "model.bin")["loss"] == [[1.0, 2.0], [2.0, 1.0]]
    path.write_text("{}", "utf-8")
    with pytest.raises(UserError, match="no training_state"):
        training_history(path, packages["table"])


def test_a_gate_fails_after_everything_is_written(analyze, tmp_path):
    with pytest.raises(UserError, match=r"^gates: u1 is 0\.\d+; at least 0.9 is asked"):
        analyze(gates={"u1": 0.9, "collisions": 1.0})
    gates = json.loads((tmp_path / "analysis" / "analysis.json").read_text("utf-8"))["gates"]
    assert [gate["passed"] for gate in gates] == [False, True]
    assert "FAIL" in (tmp_path / "analysis" / "report.html").read_text("utf-8")
    analyze(gates={"u1": 0.0})
    with pytest.raises(UserError, match="u3 has no value without codes"):
        analyze("table", gates={"u3": 0.1})


@pytest.mark.parametrize(
    "change, says",
    [
        ({"model": "nowhere"}, "model: nowhere does not exist"),
        ({"corpora": {}}, "corpora: none"),
        ({"baseline": "nowhere.json"}, "baseline: nowhere.json is no analysis.json"),
        ({"corpora": {"a": {"path": "nowhere.txt"}}}, "nowhere.txt: no such file"),
    ],
)
def test_mistakes_are_one_line(analyze, tmp_path, change, says):
    with pytest.raises(UserError, match=says):
        analyze(**change)
    assert not (tmp_path / "analysis").exists()


def test_other_files_are_not_overwritten(analyze, tmp_path):
    (tmp_path / "analysis").mkdir()
    (tmp_path / "analysis" / "mine.txt").write_text("mine", "utf-8")
    with pytest.raises(UserError, match="nothing is overwritten"):
        analyze()


@pytest.mark.parametrize("name, kind", [("table", "compact"), ("compact", "compact"), ("open", "open")])
@pytest.mark.parametrize("by", ["saving", "frequency"])
def test_a_pruned_tokenizer_is_lossless_and_its_mapping_right(prune, packages, tmp_path, documents, name, kind, by):
    summary = prune(name, top_k=12, by=by)
    old = AutoEncoderTokenizer.load(packages[name])
    new = AutoEncoderTokenizer.load(tmp_path / "pruned")
    assert new.kind == kind
    assert summary["pins_after"] == len(new.package.pins) <= 12
    for text in [*documents[:4], "", "\x00\udc80 ünseen 漢字 !?", "".join(map(chr, range(300)))]:
        assert new.decode_bytes(new.encode_bytes(text.encode("utf-8", "surrogatepass"))) == text.encode(
            "utf-8", "surrogatepass"
        )
    mapping = json.loads((tmp_path / "pruned" / "pruning.json").read_text("utf-8"))
    assert (mapping["old_vocab_size"], mapping["new_vocab_size"]) == (old.vocab_size, new.vocab_size)
    for index in range(old.codec.layout.open_base):
        spelled = mapping["spelled"].get(str(index)) or [mapping["kept"][str(index)]]
        assert new.codec.decode_bytes(spelled) == old.codec.decode_bytes([index])
    assert all(mapping["kept"][str(index)] == index for index in range(64 + 256))
    if kind == "open":
        assert mapping["open"] == [old.codec.layout.open_base, new.codec.layout.open_base]
    assert summary["tokens_per_byte_after"] <= 1
    assert load_tokenizer(str(tmp_path / "pruned")).decode(new.encode("the cat", False)) == "the cat"


def test_a_pruned_tokenizer_has_codes_for_its_pins_and_warm_chunks(prune, tmp_path, network, documents):
    prune(top_k=20, warm=30)
    package = Package.load(tmp_path / "pruned")
    assert len({*package.pins.digits}) == len(package.pins)
    assert len(package.warm) == 30
    cold = AutoEncoderTokenizer(package=Package(package.config, package.pins)).codec
    assert all(cold.spell(chunk) == ids for chunk, ids in package.warm.items())
    read = load_network(tmp_path / "pruned", package.config).state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in network.state_dict().items())


def test_pruning_overwrites_nothing_and_leaves_nothing_behind(prune, tmp_path, monkeypatch):
    prune(top_k=5)
    with pytest.raises(UserError, match="exists; nothing is overwritten"):
        prune(top_k=5)
    monkeypatch.setattr("tokenkit.verbs.tokenizer.prune._verify", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune(top_k=5, output=tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


def test_the_script_analyses_and_prunes(packages, corpus, tmp_path, monkeypatch, capsys):
    words = ["--model", packages["compact"], "--corpus", corpus, "--output", tmp_path / "book", "--top-k", "8"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    found = json.loads(capsys.readouterr().out)
    assert found["pruned"]["pins_after"] == 8
    assert (tmp_path / "book" / "pruned" / "pruning.json").is_file()
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert left.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
