"""Examples and edge corpora: learned figures say what the network can do, system figures stay perfect."""

import math

import pytest
import torch
from torch.nn import functional as F

from tokenkit.config import UserError
from tokenkit.data.source import SourceConfig
from tokenkit.eval import edges
from tokenkit.eval.edge_corpora import EdgesConfig, edge_corpora, emoji, unicode_rows
from tokenkit.eval.edges import edge_battery, try_strings
from tokenkit.eval.tokenizer_cost import STATM, resident_bytes
from tokenkit.eval.tokenizer_gates import Evidence, GatesConfig, decide
from tokenkit.eval.tokenizer_results import read_results, save_results
from tokenkit.eval.tokenizer_test import (
    EXAMPLES,
    MORE_EXAMPLES,
    Subject,
    diagnose,
    examine,
    held_out_figures,
    open_subject,
    pieces_of,
    spending,
)
from tokenkit.tokenizers.autoencoder.network import AutoEncoder, NetworkConfig, symbols_of
from tokenkit.tokenizers.autoencoder.pins import PinTable
from tokenkit.tokenizers.autoencoder.selection import select_pins
from tokenkit.tokenizers.autoencoder.tokenizer import AutoEncoderTokenizer, package_of

SMALL = EdgesConfig(random_strings=40, large_bytes=2000, text_bytes=5000)


def trained(texts, steps=120):
    """A network that knows the pieces of these texts by heart."""
    torch.manual_seed(0)
    network = AutoEncoder(NetworkConfig(hidden=96, byte_width=16, groups=2, min_groups=1, decoder_blocks=1))
    tokenizer = AutoEncoderTokenizer(package=package_of(network))
    pieces = sorted({piece for text in texts for piece in pieces_of(tokenizer, text, 8)})
    symbols = symbols_of(pieces, 8)
    network.train().requires_grad_(True)
    network.scale_latents(symbols)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    for _ in range(steps):
        loss = F.cross_entropy(network(symbols)[0].flatten(0, 1), symbols.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


@pytest.fixture(scope="module")
def network():
    return trained(EXAMPLES)


@pytest.fixture(scope="module")
def tokenizers(network):
    pins = select_pins({b" the": 9, b"hello": 5, b" fox": 4, b"  ": 3, "é".encode(): 2}, 5)
    torch.manual_seed(0)
    tiny = AutoEncoder(NetworkConfig(max_bytes=4, levels=(5, 5, 5), hidden=32, byte_width=8, groups=2))
    return {
        "compact": AutoEncoderTokenizer(package=package_of(None, pins)),
        "open": AutoEncoderTokenizer(package=package_of(network, pins)),
        "untrained open": AutoEncoderTokenizer(package=package_of(tiny.eval(), PinTable((), ()))),
    }


def test_untrained_the_network_knows_nothing_and_the_system_everything():
    results = examine(open_subject(None), "before", more=MORE_EXAMPLES)
    assert results.learned.char_accuracy_positional <= 0.2
    assert (results.learned.perfect, results.learned.examples) == (0, 10)
    assert results.learned.failures == EXAMPLES
    assert (results.system.perfect, results.system.mean_edit_distance) == (10, 0)
    assert results.system.tiers == {"byte": 1, "pin": 0, "open": 0}
    assert [e.standard for e in results.examples] == [True] * 10 + [False] * 2
    assert all(example.learned.diagnosis for example in results.examples)
    assert (results.model, results.fingerprint) == ("untrained", None)


def test_after_training_the_network_knows_what_it_was_taught(network):
    tokenizer = AutoEncoderTokenizer(package=package_of(network))
    results = examine(Subject.of(tokenizer), "after", EXAMPLES, ["Unheard-of wørds"])
    assert results.learned.perfect == 10
    assert results.learned.mean_edit_distance == 0
    assert 1 <= results.learned.reconstruction_perplexity < 2
    assert results.learned.failures == ()
    assert not results.examples[-1].learned.exact
    assert results.examples[-1].system.exact


def test_figures_by_hand(network):
    tokenizer = AutoEncoderTokenizer(package=package_of(network))
    texts = ["hello world", "zqx", ""]
    results = examine(Subject.of(tokenizer), "after", texts)
    outputs = [tokenizer.learned_bytes(text).decode("utf-8", "replace") for text in texts]
    by_place = [sum(a == b for a, b in zip(x, y)) / len(x) if x else float(not y) for x, y in zip(texts, outputs)]
    assert results.learned.char_accuracy_positional == pytest.approx(sum(by_place) / 3)
    pieces = [piece for text in texts for piece in pieces_of(tokenizer, text, 8)]
    nats = scored = 0
    for piece in pieces:
        symbols = symbols_of([piece], 8)
        logits = network(symbols)[0][0].log_softmax(-1)
        for place in range(min(len(piece) + 1, 8)):
            nats, scored = nats - float(logits[place, symbols[0, place]]), scored + 1
    assert results.learned.reconstruction_perplexity == pytest.approx(math.exp(nats / scored), rel=1e-4)
    assert [example.learned.output for example in results.examples] == outputs


def test_a_package_without_a_network_has_no_learned_side(tokenizers):
    results = examine(Subject.of(tokenizers["compact"]), "after")
    assert results.learned is None
    assert all(example.learned is None for example in results.examples)
    assert results.system.perfect == 10


def test_what_is_spent_counts_escapes(tokenizers):
    text = "hello the fox née"
    ids = tokenizers["compact"].encode(text, add_special_tokens=False)
    bytes_per_token, tiers = spending(tokenizers["compact"], [text])
    assert bytes_per_token == pytest.approx(len(text.encode()) / len(ids))
    assert sum(tiers.values()) == pytest.approx(1)
    layout = tokenizers["compact"].codec.layout
    assert tiers["pin"] == pytest.approx(sum(index >= layout.pin_base for index in ids) / len(ids))
    assert tiers["pin"] > 0


def test_held_out_figures_say_occurrences_and_types(network):
    tokenizer = AutoEncoderTokenizer(package=package_of(network))
    found = held_out_figures(tokenizer, ["hello world world world zzzqqq"])
    assert found["learned_chunk_exact"] > found["learned_chunk_exact_types"]
    assert not any("seen" in name for name in found)
    assert "learned_byte_accuracy" not in held_out_figures(AutoEncoderTokenizer(package=package_of(None)), ["a"])


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ([b"ab", b"c"], None),
        ([b"ab", b"d"], "1 of 2 chunks wrong; chunk 2, 'c' as 'd': 1 of 1 bytes wrong"),
        ([b"a", b"c"], "1 of 2 chunks wrong; chunk 1, 'ab' as 'a': ends 1 bytes early"),
        ([b"abc", b"x"], "2 of 2 chunks wrong; the first is chunk 1, 'ab' as 'abc': ends 1 bytes late"),
    ],
)
def test_a_diagnosis_is_one_line(said, words):
    assert diagnose([b"ab", b"c"], said) == words


@pytest.mark.parametrize(("kind", "most"), [("compact", 400), ("open", 6), ("untrained open", 6)])
def test_edge_strings_come_back(tokenizers, kind, most):
    tokenizer = tokenizers[kind]
    for name, strings in edge_corpora(SMALL, 20, tokenizer.codec.layout.special_names).items():
        every = [*strings]
        some = [string[: 8 * most] for string in every[:: max(1, len(every) // most)]]
        found = try_strings(tokenizer, name, some)
        assert (found.tried, found.wrong, found.first_wrong) == (len(some), 0, None)


@pytest.mark.slow
def test_every_edge_string_comes_back(tokenizers):
    results = edge_battery(tokenizers["compact"], SMALL)
    assert [(result.corpus, result.first_wrong) for result in results if result.wrong] == []
    assert {result.corpus: result.tried for result in results}["every pair of bytes"] == 65536


def test_a_tokenizer_that_loses_something_is_found_out(tokenizers, monkeypatch):
    tokenizer = tokenizers["compact"]
    monkeypatch.setattr(tokenizer, "decode_bytes", lambda ids: tokenizer.codec.decode_bytes(ids).replace(b"\r", b""))
    found = try_strings(tokenizer, "ends", [b"a", b"b\r\n", "\r"])
    assert (found.tried, found.wrong, found.bytes) == (3, 2, 5)
    assert found.first_wrong == r"b'b\r\n' came back as b'b\n'"


def test_edge_corpora_are_the_same_every_time_and_complete():
    first, second = ({n: [*s] for n, s in edge_corpora(SMALL, 30, ["<|pad|>"]).items()} for _ in range(2))
    assert first == second
    assert len(set(first["every byte"])) == 256
    assert len(set(first["every pair of bytes"])) == 65536
    assert {len(string) for string in first["random bytes"]} <= set(range(65))
    assert {"👩‍🔬", "👨‍👩‍👧‍👦", "👩🏽‍🚀", "🏴‍☠️", "🇩🇪"} <= set(emoji())
    blocks = "".join(unicode_rows())
    assert all(any(start <= ord(c) < start + 256 for c in blocks) for start in (0x0, 0x370, 0xE00, 0x1F300, 0x20000))
    assert "<|pad|>" in first["special-token literals"]
    assert len(first["a long text"][0]) == SMALL.text_bytes


def test_texts_of_a_folder_are_tried_too(tokenizers, tmp_path, monkeypatch):
    monkeypatch.setattr(edges, "edge_corpora", lambda config, count, literals: {"empty": iter([b""])})
    (tmp_path / "a.txt").write_text("Ünïcode 🙂\r\n", "utf-8", newline="")
    (tmp_path / "b.txt").write_text("plain", "utf-8")
    config = SMALL.model_copy(update={"texts": SourceConfig(path=str(tmp_path))})
    lines = []
    assert [result.tried for result in edge_battery(tokenizers["compact"], config, lines.append)] == [1, 2]
    assert lines[0] == "empty: 0 wrong of 1 strings, 0 bytes, 0.0 s"


def test_results_come_back_from_their_file(tokenizers, tmp_path):
    results = examine(Subject.of(tokenizers["open"]), "after", ["ab", "half \ud83d pair", 'quote " and \\ud83d'])
    save_results(results, tmp_path / "r.json")
    assert read_results(tmp_path / "r.json") == results


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("[]", "holds a list; write one JSON object; give a file that `tokenizer test` wrote"),
        ('{"format": 2}', "format"),
        ('{"phase": "before", "colour": 1}', "colour: unknown key"),
    ],
)
def test_a_foreign_file_is_one_line(tmp_path, content, words):
    path = tmp_path / "x.json"
    path.write_text(content, "utf-8")
    with pytest.raises(UserError, match=words) as caught:
        read_results(path)
    assert "\n" not in str(caught.value)
    assert "x.json" in str(caught.value)
    with pytest.raises(UserError, match="no configuration"):
        read_results(tmp_path / "none.json")


def test_bad_models_are_one_line(tmp_path):
    for path, words in ((tmp_path / "none", "does not exist"), (tmp_path, "no fsq_config.json")):
        with pytest.raises(UserError, match=words):
            open_subject(path)
    (tmp_path / "x.bin").write_bytes(b"foreign")
    with pytest.raises(UserError, match="not a whole checkpoint"):
        open_subject(tmp_path / "x.bin")
    with pytest.raises(UserError, match="leave one out"):
        open_subject(tmp_path, tmp_path / "config.json")
    with pytest.raises(UserError, match="at least one text"):
        examine(open_subject(None), "before", [])


def test_the_gates_pass_what_works_and_fail_what_does_not(network, tmp_path):
    easy = GatesConfig(max_over_word_tokenizer=1e6, max_encode_ms=1e6, max_decode_ms=1e6, max_megabytes=1e6)
    easy = easy.model_copy(update={"min_characters_per_second": 1.0, "min_ids_per_second": 1.0})
    tokenizer = AutoEncoderTokenizer(package=package_of(network, kind="compact"))
    tokenizer.save(tmp_path / "t")
    subject = open_subject(tmp_path / "t")
    results = examine(subject, "final")
    tried = (try_strings(tokenizer, "one", ["a"]),)
    gates = decide(Evidence(subject, results, tried, ["some text " * 50], tmp_path / "t"), easy)
    assert [(gate.name, gate.verdict) for gate in gates] == [
        ("G1", "PASS"),
        ("G2", "PASS"),
        ("G3", "NOT RUN"),
        ("G4", "PASS"),
    ]
    lost = tried[0].model_copy(update={"wrong": 1})
    hard = easy.model_copy(update={"min_char_accuracy": 1.1, "max_megabytes": 1e-6})
    gates = decide(Evidence(subject, results, (lost,), ["some text " * 50], tmp_path / "t"), hard)
    assert [gate.verdict for gate in gates] == ["FAIL", "FAIL", "NOT RUN", "FAIL"]
    empty = examine(Subject.of(AutoEncoderTokenizer(package=package_of(None))), "final")
    assert decide(Evidence(subject, empty, tried, ["text"], None), easy)[1].verdict == "NOT RUN"


def test_memory_is_that_of_the_tokenizer_alone(tokenizers, tmp_path):
    if not STATM.is_file():
        pytest.skip("this system does not say how much memory a process has")
    tokenizers["compact"].save(tmp_path / "t")
    assert 0 <= resident_bytes(tmp_path / "t", "compact") < 40e6


def test_coherence_is_asked_of_a_language_model_on_this_very_tokenizer(model_folder):
    documents = ["the cat sat on a mat and then ran home. " * 5]
    subject = Subject.of(AutoEncoderTokenizer(package=package_of(None)))
    config = GatesConfig(language_model=model_folder, max_bits_per_byte=0.5)
    evidence = Evidence(subject, examine(subject, "final"), (), documents, None)
    gate = decide(evidence, config)[2]
    checks = {check.what: check.passed for check in gate.checks}
    assert gate.verdict == "FAIL"
    assert checks["any sequence of ids decodes"]
    assert checks["logits of (batch, length, vocabulary)"]
    assert not checks["the language model has this tokenizer"]
    assert not checks["bits per byte of the corpus"]
