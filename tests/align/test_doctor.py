"""The doctor finds what was built into small tokenizers, and what is known of real ones; its sums are right."""

import io
import json
from dataclasses import replace
from importlib.resources import files

import pytest
from rich.console import Console
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from tokenkit.align.doctor import diagnose
from tokenkit.align.doctor_advice import advise
from tokenkit.align.doctor_facts import ModelFacts
from tokenkit.align.doctor_measure import known_tokens, measure, total
from tokenkit.align.doctor_schemes import profile
from tokenkit.align.doctor_show import render
from tokenkit.align.doctor_texts import PROBES
from tokenkit.align.doctor_vocabulary import coverage, entries, piece_counts, script_of
from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.pieces import byte_alphabet
from tokenkit.transfer.plan import plan_transfer

NAMES = {"initializers": ("fvt", "mean"), "losses": ("alm", "clm", "forward_kl")}
DIGITS = "0123456789"
PAIRS = [(a, b) for a in DIGITS for b in DIGITS]
NUMBERS = [*PAIRS, *((a + b, c) for a, b in PAIRS for c in DIGITS), *((c, a + b) for a, b in PAIRS for c in DIGITS)]
SPACES = [("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("ĠĠĠĠ", "ĠĠĠĠ"), ("Ġ", "r"), ("Ġ", "c")]


def built(pattern, merges, name="built", config=None):
    """A byte-level BPE of these merges over pieces that the pattern cuts."""
    vocabulary = {character: index for index, character in enumerate(byte_alphabet())}
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    model = Tokenizer(models.BPE(vocabulary, merges))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    model.add_special_tokens(["<s>", "</s>"])
    return HFTokenizer(json.loads(model.to_str()), {"eos_token": "</s>", **(config or {"bos_token": "<s>"})}, name)


SINGLE, LEFT = built(r"\d", NUMBERS), built(r"\d{1,3}", NUMBERS)
RIGHT, FREE = built(r"\d{1,3}(?=(?:\d{3})*(?!\d))", NUMBERS), built(r"\d+", NUMBERS[:40])
APART = built(r" +", SPACES, "apart")  # runs merge, and no space joins a word
JOINED = built(r" ?[^ \n]+|\n|\s+(?!\S)|\s+", SPACES, "joined")  # runs merge, the last space is the word's
SPELLED = built(r" ?[^ \n]+|\n|\s+(?!\S)|\s+", SPACES[3:], "spelled")  # runs do not merge


@pytest.mark.parametrize(
    "tokenizer, kind, longest",
    [(SINGLE, "single", 1), (LEFT, "left", 3), (RIGHT, "right", 3), (FREE, "free", 2), (ByteTokenizer(), "single", 1)],
)
def test_digit_schemes_are_found_by_asking(tokenizer, kind, longest):
    found = profile(tokenizer).digits
    assert (found.kind, found.longest) == (kind, longest)
    whole = sum(len(tokenizer.encode(str(n))) == 1 for n in range(1000))
    assert found.numerals == whole


def test_a_digit_conflict_is_flagged_and_none_invented():
    for a, b in ((SINGLE, LEFT), (LEFT, RIGHT), (FREE, SINGLE)):
        assert diagnose(a, b).finding("digits").level == "warning"
    for a, b in ((SINGLE, ByteTokenizer()), (LEFT, LEFT)):
        assert diagnose(a, b).finding("digits").level == "ok"


def test_indentation_schemes_are_found_by_asking():
    apart, joined, spelled = (profile(one).white_space for one in (APART, JOINED, SPELLED))
    assert (apart.spaces, apart.indentation_tokens, apart.space_joins_word) == (8, 1, False)
    assert (joined.spaces, joined.space_joins_word) == (8, True)
    assert joined.indentation_tokens == 4  # 4 + 2 + 1 spaces, and the one in the word
    assert (spelled.spaces, spelled.indentation_tokens, spelled.space_joins_word) == (1, 8, True)
    assert (apart.word_space, joined.word_space) == ("alone", "before")


@pytest.mark.parametrize("a, b, words", [(APART, SPELLED, "apart merges"), (APART, JOINED, "only joined takes")])
def test_an_indentation_conflict_is_flagged(a, b, words):
    for pair in ((a, b), (b, a)):
        found = diagnose(*pair).finding("indentation")
        assert found.level == "warning"
        assert words in found.sentence
    assert diagnose(a, a).finding("indentation").level == "ok"


def test_one_tokenizer_on_both_sides_has_nothing_to_fear(bpe):
    found = diagnose(bpe, bpe, **NAMES)
    assert found.facts.same
    assert found.finding("same tokenizer").level == "note"
    assert found.finding("overlap").numbers["share_of_target"] == 1
    assert found.facts.running.ratio == found.facts.running.known_share == 1
    assert all(script.pieces in (1, None) for script in found.facts.scripts)
    assert found.facts.running.chunks == found.facts.running.single == found.facts.running.source_tokens
    assert [finding.topic for finding in found.findings if finding.level == "warning"] == []
    assert found.finding("loss").numbers["losses"] == "forward_kl"


def test_sums_over_text_against_plain_counting(bpe, unigram, documents):
    texts = [*documents[:5], *PROBES.values(), "", "é😀\r\n"]
    known = {spelling for spelling in bpe.token_bytes if spelling}
    sides = [(bpe.encode(text), unigram.encode(text)) for text in texts]
    known_ids = known_tokens(bpe, unigram)
    found = measure(bpe, unigram, known_ids, "all", texts)
    assert found.bytes == sum(len(text.encode()) for text in texts)
    assert found.source_tokens == sum(len(a) for a, _ in sides)
    assert found.target_tokens == sum(len(b) for _, b in sides)
    assert found.target_known == sum(unigram.token_bytes[i] in known for _, b in sides for i in b.ids.tolist())
    assert found.chunks == sum(len({*a.ends.tolist()} & {*b.ends.tolist()}) for a, b in sides)
    assert found == total("all", [measure(bpe, unigram, known_ids, "one", [text]) for text in texts])


def test_coverage_against_plain_counting(bpe, unigram):
    found = {script.script: script for script in coverage(bpe, unigram)}
    ordinary = {spelling for spelling in unigram.token_bytes if spelling}
    assert sum(script.tokens for script in found.values()) == len(ordinary)
    assert sum(script.same for script in found.values()) == sum(spelling in bpe.token_bytes for spelling in ordinary)
    latin = [s.decode() for s in ordinary if s.isascii() and any(map(str.isalpha, s.decode()))]
    wanted = sum(len(bpe.encode(text)) for text in latin) / len(latin)
    assert found["Latin"].tokens == len(latin) < 600  # so that all of them were looked up
    assert found["Latin"].pieces == pytest.approx(wanted)


def test_doubles_are_no_rows_to_copy():
    """What the doctor says will be copied and averaged is what the plan of a transfer copies and averages."""
    source, target = (
        load_tokenizer(str(files("tokenkit") / "assets" / name)) for name in ("demo_teacher", "demo_unigram")
    )
    found = diagnose(source, target, **NAMES)
    planned = plan_transfer(source, target, source_rows=source.vocab_size).describe()
    assert found.facts.target.entries.duplicates == planned["unreachable"] > 0
    numbers = found.finding("initialiser").numbers
    assert (numbers["copied"], numbers["averaged"]) == (planned["copied"], planned["averaged"])
    assert found.finding("overlap").numbers["share_of_target"] == planned["overlap"]


def test_pieces_do_not_count_a_dummy_space(shared):
    llama = load_tokenizer(str(shared / "data/tokenizers/llama2"))
    assert len(llama.encode("12")) == 3  # the space that the text does not hold, and the digits
    assert piece_counts(llama, ["12", " the", "(", "\n"]) == [2, 1, 1, 1]


def test_vocabulary_edges_by_hand():
    found = entries(ByteTokenizer())
    assert (found.ids, found.tokens, found.special, found.holes) == (259, 256, 3, 0)
    assert (found.duplicates, found.undecodable, found.longest_bytes, found.over_16_bytes) == (0, 128, 1, 0)


@pytest.mark.parametrize(
    "text, script",
    [
        *(("the", "Latin"), (" ñandú", "Latin"), ("привет", "Cyrillic"), ("東京", "Han"), ("カナ", "Kana")),
        *(("한", "Hangul"), ("ا", "Arabic"), ("नमस्ते", "Devanagari"), ("ไทย", "Thai"), ("א", "Hebrew"), ("λ", "Greek")),
        *(("ｆｕ", "Latin"), ("ა", "Georgian"), ("12", "digits"), ("٣", "digits"), (" \n", "white space")),
        *((text, "punctuation and symbols") for text in ("():\n", "😀", "\u0301")),
    ],
)
def test_scripts(text, script):
    assert script_of(text) == script


def test_begin_and_end_of_text():
    without = built(r"\d", [], "without", {"bos_token": None})
    found = diagnose(SINGLE, without)
    assert found.finding("begin of text").level == "warning"
    assert "<s>" in found.finding("begin of text").sentence
    assert diagnose(without, SINGLE).finding("begin of text").level == "note"
    endless = built(r"\d", [], "endless", {"bos_token": "<s>", "eos_token": None})
    assert diagnose(SINGLE, endless).finding("end of text").level == "warning"


def test_a_model_with_too_few_rows_and_one_with_too_many(bpe):
    byte = ByteTokenizer()
    few, many = (ModelFacts("m", bpe.vocab_size + more, 8, 2, 4, 10_000) for more in (-5, 5))
    assert diagnose(bpe, byte, model=few).finding("embedding").level == "warning"
    assert "5 rows" in diagnose(bpe, byte, model=many).finding("embedding").sentence
    memory = diagnose(bpe, byte, model=many).finding("memory").numbers
    assert memory["parameters_gained"] == (byte.vocab_size - many.rows) * 8 * 2
    assert memory["embedding_mib_after"] == byte.vocab_size * 8 * 2 * 4 / 2**20


def test_the_loss_follows_the_text_that_there_is(bpe, unigram, documents):
    subwords, to_bytes = (diagnose(bpe, target, corpus=documents[:1]).facts for target in (unigram, ByteTokenizer()))

    def chosen(facts, size, parameters):
        model = ModelFacts("m", bpe.vocab_size, 8, 1, 4, parameters)
        facts = replace(facts, corpus=replace(facts.corpus, bytes=size), model=model)
        return next(one for one in advise(facts, *NAMES.values()) if one.topic == "loss").numbers["losses"]

    assert chosen(subwords, 50_000, 10**6) == "alm"
    assert chosen(subwords, 900_000, 10**6) == "clm"
    assert chosen(subwords, 900_000, 10**9) == "alm"
    assert chosen(to_bytes, 10_000, 10**6) == "alm"
    assert chosen(to_bytes, 300_000, 10**9) == "clm + alm"


def test_only_names_that_exist_are_recommended(bpe):
    found = diagnose(bpe, ByteTokenizer(), initializers=("mean",), losses=("clm",))
    assert found.finding("initialiser").numbers["initializer"] == "mean"
    assert "loss" not in {finding.topic for finding in found.findings}


def test_json_and_terminal_hold_the_same_findings(bpe, unigram):
    found = diagnose(bpe, unigram, **NAMES)
    plain = json.loads(json.dumps(found.as_json()))
    assert [one["topic"] for one in plain["findings"]] == [finding.topic for finding in found.findings]
    assert {"source", "target", "scripts", "probes", "corpus", "model"} <= plain.keys()
    console = Console(file=io.StringIO(), width=1000)
    console.print(render(found))
    assert all(finding.sentence in console.file.getvalue() for finding in found.findings)


REAL = {  # source, target: what is known of the two, topic by topic
    ("gpt2", "smollm2"): {"digits": "warning", "indentation": "warning", "dummy space": "ok"},
    ("gpt2", "gpt_neox_20b"): {"digits": "note", "indentation": "warning", "normalisation": "note"},
    ("llama2", "gpt2"): {"digits": "warning", "indentation": "warning", "dummy space": "note"},
}
LARGE = {
    ("llama3", "qwen2"): {"digits": "warning", "indentation": "ok", "begin of text": "warning"},
    ("llama2", "qwen2"): {"digits": "ok", "dummy space": "note", "begin of text": "warning"},
    ("gpt2", "llama3"): {"digits": "warning", "indentation": "warning", "dummy space": "ok"},
    ("gemma3", "llama3"): {"digits": "warning", "indentation": "warning", "undecodable tokens": "ok"},
    ("cl100k_base", "llama3"): {"digits": "ok", "indentation": "ok", "white space": "ok"},
    ("gpt2", "bert_base_uncased"): {"normalisation": "warning", "any character": "warning", "indentation": "warning"},
    ("t5_small", "byte"): {"normalisation": "warning", "length": "warning", "digits": "warning"},
}


def real(shared, pair):
    return tuple(load_tokenizer(name if name == "byte" else str(shared / "data/tokenizers" / name)) for name in pair)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [*REAL, *LARGE], ids="-".join)
def test_real_pairs(shared, pair):
    found = diagnose(*real(shared, pair), **NAMES)
    wanted = {**REAL, **LARGE}[pair]
    assert {topic: found.finding(topic).level for topic in wanted} == wanted


@pytest.mark.slow
@pytest.mark.parametrize("source, target, shared_tokens", [("llama2", "qwen2", 26_342), ("llama2", "llama3", 26_599)])
def test_overlap_of_real_pairs_counted_independently(shared, source, target, shared_tokens):
    """The figures of a survey of transplanting tools, counted there by other code."""
    assert sum(script.same for script in coverage(*real(shared, (source, target)))) == shared_tokens
