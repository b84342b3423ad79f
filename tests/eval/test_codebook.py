"""Every quantity of the codebook analysis against a slow and obvious count."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from rapidfuzz.distance import Levenshtein

from tokenkit.data.chunks import ChunkTable
from tokenkit.eval.code_statistics import code_numbers, collisions, digit_masses, entropy_bits, mutual_information
from tokenkit.eval.codebook import analyse
from tokenkit.eval.codebook_table import codebook_rows, vocabulary
from tokenkit.eval.id_usage import (
    by_corpus,
    by_script,
    count_corpus,
    coverage,
    script_of,
    spell_corpora,
    unused_pins,
    usage_of,
)
from tokenkit.eval.learned import buckets, by_label, histogram, look, overall
from tokenkit.eval.neighbours import neighbourhood, replaced
from tokenkit.eval.pruning import compact_coverage, id_mapping, only, prune_pins
from tokenkit.tokenizers.autoencoder.chunkers import make_chunker, to_bytes
from tokenkit.tokenizers.autoencoder.network import AutoEncoder, NetworkConfig, symbols_of
from tokenkit.tokenizers.autoencoder.pins import PinTable
from tokenkit.tokenizers.autoencoder.placement import place_pins
from tokenkit.tokenizers.autoencoder.tokenizer import package_of

TEXTS = {"english": ["the cat sat on the mat", "the Cat is 12 and a half"], "russian": ["кот и мат, кот"]}
PINS = (b"the", b" the", b" cat", b" mat", b" on", b"at", "кот".encode(), b"zzz")
LEVELS = (5, 4, 3)


@pytest.fixture(scope="module")
def network() -> AutoEncoder:
    torch.manual_seed(3)
    config = NetworkConfig(max_bytes=4, levels=LEVELS, hidden=32, byte_width=8, groups=2, min_groups=1)
    return AutoEncoder(config).eval()


@pytest.fixture(scope="module")
def compact():
    return package_of(None, PinTable(PINS, tuple(range(len(PINS), 0, -1))), chunker="word")


@pytest.fixture(scope="module")
def corpora():
    return [count_corpus(name, texts, make_chunker("word")) for name, texts in TEXTS.items()]


def entropy(counts):
    total = sum(counts)
    return -sum(n / total * math.log2(n / total) for n in counts if n)


def test_ids_are_counted_as_encoding_the_texts_counts_them(compact, corpora):
    codec = compact.codec()
    ids = [i for texts in TEXTS.values() for text in texts for i in codec.encode(text)]
    slow = Counter(ids)
    spelled = spell_corpora(codec, corpora)
    usage = usage_of(spelled)
    assert dict(zip(usage.ids.tolist(), usage.counts.tolist())) == slow
    assert usage.counts.tolist() == sorted(slow.values(), reverse=True)
    assert usage.exposed == 256 + len(PINS)
    assert usage.u1 == pytest.approx(len(slow) / usage.exposed)
    assert usage.entropy_bits == pytest.approx(entropy(slow.values()))
    assert usage.u2 == pytest.approx(2 ** entropy(slow.values()) / usage.exposed)
    assert [codec.fixed_bytes[i] for i in unused_pins(usage, codec.layout)] == [
        pin for place, pin in enumerate(PINS) if codec.layout.pin_base + place not in slow
    ]
    shares = coverage(usage.counts, (1, 3, 10_000))
    assert shares == pytest.approx({1: max(slow.values()) / len(ids), 3: sum(usage.counts[:3]) / len(ids), 10_000: 1})


def test_figures_of_corpora_and_scripts(compact, corpora):
    codec = compact.codec()
    spelled = spell_corpora(codec, corpora)
    found = by_corpus(spelled)
    for name, texts in TEXTS.items():
        ids = [i for text in texts for i in codec.encode(text)]
        size = sum(len(text.encode()) for text in texts)
        assert found[name].bytes == size
        assert found[name].tokens == len(ids)
        assert found[name].bytes_per_token == pytest.approx(size / len(ids))
        assert found[name].characters_per_token == pytest.approx(sum(map(len, texts)) / len(ids))
        assert found[name].tokens_per_word == pytest.approx(len(ids) / sum(len(text.split()) for text in texts))
        tiers = Counter(map(codec.layout.tier, ids))
        assert found[name].tiers == pytest.approx({t: tiers[t] / len(ids) for t in ("special", "byte", "pin", "open")})
        chunks = [chunk for text in texts for chunk in codec.split(text)]
        assert found[name].whole == pytest.approx(sum(len(codec.spell(c)) == 1 for c in chunks) / len(chunks))
    scripts = by_script(spelled)
    assert {*scripts} == {"Latin", "Cyrillic", "digits", "marks"}
    assert sum(figures.bytes for figures in scripts.values()) == sum(figures.bytes for figures in found.values())
    assert sum(figures.tokens for figures in scripts.values()) == usage_of(spelled).tokens


@pytest.mark.parametrize(
    "chunk, script",
    [
        (" die", "Latin"),
        ("漢字", "CJK"),
        ("한국", "Hangul"),
        (" 12", "digits"),
        ("\n\n", "white space"),
        ("ªº", "other"),
    ],
)
def test_scripts(chunk, script):
    assert script_of(chunk.encode()) == script
    assert script_of(b"\xff") == "bytes"
    assert script_of(b"?!") == "marks"


def random_digits(rows=40, groups=2):
    rng = np.random.default_rng(0)
    digits = np.stack([rng.integers(0, level, (rows, groups)) for level in LEVELS], -1)
    return digits, rng.integers(1, 9, rows).astype(np.float64)


def test_masses_entropies_and_information():
    digits, weights = random_digits()
    flat, levels = digits.reshape(len(digits), -1), [*LEVELS] * 2

    def counted(*columns):
        found = Counter()
        for row, weight in zip(flat.tolist(), weights):
            found[tuple(row[column] for column in columns)] += weight
        return found

    masses = digit_masses(digits, LEVELS, weights)
    for column in range(6):
        total = weights.sum()
        slow = [counted(column)[(level,)] / total for level in range(levels[column])]
        assert masses[column // 3][column % 3] == pytest.approx(slow)
    information = mutual_information(flat, levels, weights)
    for a, b in itertools.product(range(6), repeat=2):
        joint = entropy(counted(a, b).values())
        slow = entropy(counted(a).values()) + entropy(counted(b).values()) - joint
        assert information[a, b] == pytest.approx(slow if a != b else entropy(counted(a).values()))
    numbers = code_numbers(digits, LEVELS)
    assert numbers[:, 0].tolist() == [(row[0][0] * 4 + row[0][1]) * 3 + row[0][2] for row in digits.tolist()]
    assert entropy_bits(numbers, weights) == pytest.approx(entropy(counted(*range(6)).values()))
    assert entropy_bits(numbers[:, :1], weights) == pytest.approx(entropy(counted(0, 1, 2).values()))


def test_collisions():
    numbers = np.array([[7, 1], [5, 1], [7, 1], [5, 2], [7, 3], [5, 1], [7, 1], [9, 9]])
    first, both = collisions(numbers[:, :1]), collisions(numbers, worst=1)
    assert (first.strings, first.codes, first.share) == (8, 3, 1 - 3 / 8)
    assert first.histogram == {1: 1, 3: 1, 4: 1}
    assert first.worst == [((7,), [0, 2, 4, 6]), ((5,), [1, 3, 5])]
    assert both.histogram == {1: 3, 2: 1, 3: 1}
    assert both.worst == [((7, 1), [0, 2, 6])]


def test_what_the_network_makes_of_strings(network):
    counts = {b"the": 9, b" cat": 4, b"at": 2, b"\xff": 1}
    found = look(network, ChunkTable.of(counts), 100)
    assert dict(zip(found.strings, found.counts.tolist())) == counts
    symbols = symbols_of(found.strings, 4)
    with torch.no_grad():
        latents = network.latents(symbols)
        for column, kept in enumerate(found.groups):
            logits = network.logits(network.quantizer.dequantize(network.digits(symbols)), torch.full((4,), kept))
            said = logits.argmax(-1)
            exact = [
                said[r, : len(s) + 1].tolist() == symbols[r, : len(s) + 1].tolist() for r, s in enumerate(found.strings)
            ]
            assert found.exact[:, column].tolist() == exact
        leads = (logits.topk(2, -1).values[..., 0] - logits.topk(2, -1).values[..., 1]).tolist()
    slow = [min(leads[row][: len(string) + 1]) for row, string in enumerate(found.strings)]
    assert found.logit_margins.tolist() == pytest.approx(slow, rel=1e-4, abs=1e-5)
    assert np.allclose(found.cell_margins, network.quantizer.margin(latents)[0].numpy(), atol=1e-5)
    labels = by_label(found, [str(len(string)) for string in found.strings])
    assert labels["4"]["occurrences"] == 4
    assert labels["4"]["types"] == 1
    shares = overall(found)
    weights = np.array([counts[string] for string in found.strings])
    assert shares["exact"]["2"] == pytest.approx((found.exact[:, 1] * weights).sum() / weights.sum())
    assert shares["exact_types"]["1"] == pytest.approx(found.exact[:, 0].mean())


def test_a_sample_stands_for_all(network):
    table = ChunkTable.of({bytes([65 + i, 65 + j]): 1 + i for i in range(20) for j in range(20)})
    found = look(network, table, 100)
    assert len(found.strings) == 100
    assert found.weights.sum() == pytest.approx(400)


def test_buckets_and_histograms():
    assert buckets([b"a", b"b", b"c", b"d"], {b"a": 100, b"b": 99, b"c": 9}) == [
        "100 or more",
        "10–99",
        "1–9",
        "unseen",
    ]
    shares = histogram(np.array([0.1, 0.9, 7.0]), np.array([1.0, 2.0, 4.0]), np.array([0.0, 0.5, 1.0]))
    assert shares == [1, 6]


def test_neighbours():
    rng = np.random.default_rng(1)
    strings = [bytes(rng.integers(97, 101, rng.integers(1, 5)).tolist()) for _ in range(60)]
    strings = list(dict.fromkeys(strings))
    digits = np.stack([rng.integers(0, level, len(strings)) for level in LEVELS], 1)

    def away(a, b):
        return sum(abs(x - y) / (level - 1) for x, y, level in zip(digits[a].tolist(), digits[b].tolist(), LEVELS)) / 3

    found = neighbourhood(strings, digits, LEVELS, size=1000)
    for row, one in enumerate(found.sample):
        others = sorted((away(row, other), other) for other in range(len(strings)) if other != row)
        assert [d for _, d in one.nearest] == pytest.approx([d for d, _ in others[:5]], abs=1e-6)
    pairs = list(itertools.combinations(range(len(strings)), 2))
    codes = [away(a, b) for a, b in pairs]
    edits = [Levenshtein.distance(strings[a], strings[b]) for a, b in pairs]
    assert found.random_pairs == pytest.approx(np.mean(codes), abs=1e-6)
    assert found.correlation == pytest.approx(np.corrcoef(codes, edits)[0, 1], abs=1e-5)
    assert sum(number for _, _, number in found.bands) == len(pairs)
    assert found.one_edit is None
    constant = neighbourhood(strings, digits, LEVELS, encode=lambda some: np.zeros((len(some), 3), np.int64))
    assert constant.one_edit == 0


def test_one_letter_is_replaced():
    rng = np.random.default_rng(0)
    for string in (b" the", "aя".encode(), b"x1"):
        other = replaced(string, rng)
        assert other is not None
        assert sum(a != b for a, b in zip(string, other, strict=True)) == 1
    assert replaced(b"12", rng) is None


def test_rows_cover_every_byte_and_pin_and_add_up(compact, corpora, network):
    analysis = analyse(compact, corpora)
    rows = list(codebook_rows(analysis.codec, analysis.usage, analysis.spelled))
    assert len(rows) == 256 + len(PINS)
    assert sum(row.count for row in rows) == analysis.usage.tokens
    assert [row.count for row in rows] == sorted((row.count for row in rows), reverse=True)
    assert rows[-1].cumulative_share == pytest.approx(1)
    assert {row.string for row in rows} == {*PINS, *(bytes([b]) for b in range(256))}
    entries = vocabulary(analysis.codec)
    assert [entry["id"] for entry in entries] == [*range(64, 64 + 256 + len(PINS))]
    assert all(bytes.fromhex(e["hex"]) == analysis.codec.fixed_bytes[e["id"]] for e in entries)
    assert "learned" not in analysis.values
    assert "codes" not in analysis.values


def test_runs_of_codes_are_rows_too(compact, corpora):
    """Codes that say nothing true but claim to: rows depend on what was spelled, not on the network being right."""
    torch.manual_seed(0)
    config = NetworkConfig(max_bytes=8, levels=(8, 8, 8), hidden=32, byte_width=8, groups=2, min_groups=2)
    package = package_of(AutoEncoder(config), compact.pins, chunker="word")
    codec = package.codec("open")
    spell = {b" half": (1, 2), "кот".encode(): (5, 6)}
    codec.open_codes.spell = lambda strings: [spell.get(string) for string in strings]
    codec.open_codes.read = lambda runs: [next((s for s, r in spell.items() if r == run), b"?") for run in runs]
    spelled = spell_corpora(codec, corpora)
    rows = list(codebook_rows(codec, usage_of(spelled), spelled))
    run = next(row for row in rows if row.tier == "open")
    assert (run.string, run.count, len(run.ids)) == (b" half", 1, 2)
    assert run.codes == ((0, 0, 1), (0, 0, 2))
    assert sum(row.count * len(row.ids) for row in rows) == usage_of(spelled).tokens


def test_analysis_with_a_network_and_with_placed_pins(compact, corpora, network):
    placed = place_pins(network, compact.pins)
    package = package_of(network, placed, kind="compact", chunker="word")
    values = analyse(package, corpora, training={b"the": 200}).values
    assert values["codes"]["source"] == "text"
    assert values["learned"]["frequency_in"] == "training"
    assert values["learned"]["by_frequency"]["100 or more"]["types"] == 1
    assert len(values["codes"]["mutual_information_bits"]) == 6
    assert values["codes"]["usable"] == 60
    assert sum(values["learned"]["logit_margins"]["exact"]) + sum(
        values["learned"]["logit_margins"]["wrong"]
    ) == pytest.approx(1)
    assert sum(values["learned"]["cell_margins"]["share"]) == pytest.approx(1)
    bare = analyse(replace(package, network=None), corpora).values
    assert "learned" not in bare
    assert bare["codes"]["source"] == "pins"
    assert bare["codes"]["collisions"]["all_codes"]["share"] == 0
    unknown = package_of(None, placed, kind="compact", chunker="word")  # no levels
    assert "codes" not in analyse(unknown, corpora).values


@pytest.mark.parametrize("by", ["saving", "frequency"])
def test_pruning_lets_go_of_what_is_worth_the_least(compact, corpora, by):
    chunks = Counter()
    for corpus in corpora:
        chunks.update(corpus.chunks)
    pruned = prune_pins(compact, chunks, 3, by=by, min_count=1)
    assert len(pruned) == 3
    assert {*pruned.pieces} <= {*PINS}
    assert b"the" in pruned.pieces
    assert b"zzz" not in prune_pins(compact, chunks, 8, by=by, min_count=1).pieces
    assert b"zzz" in prune_pins(compact, chunks, 8, by=by, min_count=0).pieces
    every = [only(compact.pins, some) for some in itertools.combinations(PINS, 3)]
    costs = [compact_coverage(package_of(None, pins, chunker="word"), chunks).tokens_per_byte for pins in every]
    left = compact_coverage(package_of(None, pruned, chunker="word"), chunks).tokens_per_byte
    assert left <= 1.05 * min(costs)  # in rounds, so near the best choice of all and not always it


def test_the_mapping_says_what_became_of_every_id(compact):
    old = compact.codec()
    new = package_of(None, only(compact.pins, PINS[3:]), chunker="word").codec()
    mapping = id_mapping(old, new)
    for index in range(old.layout.vocab_size):
        if str(index) in mapping["kept"]:
            assert new.decode_bytes([mapping["kept"][str(index)]]) == old.decode_bytes([index])
        else:
            assert new.decode_bytes(mapping["spelled"][str(index)]) == old.decode_bytes([index])
    assert len(mapping["spelled"]) == 3
    assert to_bytes("the") in [old.decode_bytes([int(index)]) for index in mapping["spelled"]]
