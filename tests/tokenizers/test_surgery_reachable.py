"""Tokens that no text becomes: each reason for itself, and the verdicts against what texts do become."""

import pytest

from tokenkit.config import UserError
from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.surgery.reachable import AROUND, Reach, reachability

BPE_AND_UNIGRAM = ["bpe", "unigram", "unigram-byte-level", "unigram-none", "sp-prepend", "sp-first", "sp-never"]


def changed(tokenizer, pieces=(), merges=(), **parts):
    """The tokenizer with further pieces and merges, and other steps; the first id that is new."""
    definition, size = tokenizer.definition, tokenizer.vocab_size
    vocabulary = definition["model"]["vocab"] | {piece: size + place for place, piece in enumerate(pieces)}
    kept = [tuple(pair) for pair in definition["model"]["merges"]]
    every = [*kept, *(tuple(merge.split(" ")) for merge in merges)]
    model = {**definition["model"], "vocab": vocabulary, "merges": [list(pair) for pair in every]}
    model |= parts.pop("model", {})
    return HFTokenizer({**definition, **parts, "model": model}, tokenizer.config, "changed"), size


def becomes(tokenizer, text, index):
    try:
        return index in tokenizer.encode(text).ids
    except UserError:  # a vocabulary of few characters spells few texts
        return False


@pytest.mark.parametrize("kind", BPE_AND_UNIGRAM)
def test_every_verdict_is_what_texts_become(make_tokenizer, kind):
    tokenizer = make_tokenizer(kind)
    found = reachability(tokenizer)
    assert len(found.kinds) == tokenizer.vocab_size
    seen = set()
    for i, spelling in enumerate(tokenizer.token_bytes):
        if found.kinds[i] == Reach.REACHED or i in found.unreachable:
            text = spelling.decode(errors="ignore")
            if text.encode() != spelling:
                continue
            given = (before + text + behind for before in AROUND for behind in AROUND)
            assert any(becomes(tokenizer, one, i) for one in given) == (found.kinds[i] == Reach.REACHED), spelling
            seen.add(int(found.kinds[i]))
    assert Reach.REACHED in seen
    assert set(found.ids(Reach.SPECIAL)) >= tokenizer.special_ids


def test_a_token_without_merges_and_one_whose_parts_are_taken(make_tokenizer):
    bpe = make_tokenizer("bpe")
    tokenizer, size = changed(bpe, ["ĠKater", "xyz", "yz", "xy"], ["x y", "y z", "x yz"])
    kinds = reachability(tokenizer).kinds[size:].tolist()
    # `x` takes the `y` before `z` can: so `xyz` has a merge, and never happens
    assert kinds == [Reach.MERGES, Reach.MERGES, Reach.REACHED, Reach.REACHED]


def test_a_whole_word_is_taken_without_merges_and_a_part_of_one_is_not(make_tokenizer):
    tokenizer, size = changed(make_tokenizer("bpe"), ["ĠKater", "Kater.X", "Ġ+Kat"], model={"ignore_merges": True})
    assert tokenizer.encode("ein Kater").ids.tolist()[-1] == size
    assert reachability(tokenizer).kinds[size:].tolist() == [Reach.WHOLE_WORD, Reach.MERGES, Reach.MERGES]


def test_a_pre_tokenizer_cuts_what_merges_would_make(make_tokenizer):
    tokenizer, size = changed(make_tokenizer("bpe"), ["qĠ", "qĠq", "!q"], ["q Ġ", "qĠ q", "! q"])
    assert reachability(tokenizer).kinds[size:].tolist() == [Reach.PRETOKENS, Reach.PRETOKENS, Reach.REACHED]


def test_a_normalizer_changes_the_text(make_tokenizer):
    bpe = make_tokenizer("bpe")
    tokenizer, size = changed(bpe, ["XY", "xy"], ["X Y", "x y"], normalizer={"type": "Lowercase"})
    assert reachability(tokenizer).kinds[size:].tolist() == [Reach.NORMALISED, Reach.REACHED]


def test_the_second_token_of_the_same_bytes_is_shadowed(make_tokenizer):
    tokenizer = make_tokenizer("sp-replace")
    index = tokenizer.definition["model"]["vocab"]["<0x61>"]
    assert reachability(tokenizer).kinds[index] == Reach.BYTE  # spells what has no token: here never needed
    plain, size = changed(tokenizer, ["th e", "t h"], model={"byte_fallback": False})
    double = reachability(plain).kinds[size]
    assert double == Reach.MERGES
    marked, size = changed(tokenizer, ["the cat"])  # spelled like `the▁cat` would be, in spaces that never come
    assert reachability(marked).kinds[size] == Reach.MERGES


def test_unigram_scores_decide(make_tokenizer):
    tokenizer = make_tokenizer("unigram")
    definition = tokenizer.definition
    dear = [["tttt", -1e3], ["thecat", -0.5]]
    definition["model"]["vocab"] = [*definition["model"]["vocab"], *dear]
    found = reachability(HFTokenizer(definition, tokenizer.config))
    size = len(definition["model"]["vocab"]) - 2
    assert found.kinds[size:].tolist() == [Reach.MERGES, Reach.REACHED]


def test_counts_add_up(make_tokenizer):
    found = reachability(make_tokenizer("sp-first"))
    assert sum(found.counts().values()) == len(found.kinds)


def test_other_kinds_are_one_line(make_lossy, make_folder):
    for tokenizer in (make_lossy("word-piece"), make_lossy("end-of-word"), ByteTokenizer()):
        with pytest.raises(UserError) as caught:
            reachability(tokenizer)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama2", "mistral_v1", "smollm2"])
def test_real_vocabularies_without_dead_tokens(shared, name):
    found = reachability(load_tokenizer(str(shared / "data/tokenizers" / name)))
    assert not found.ids(Reach.WHOLE_WORD)
    assert not len(found.unreachable)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama3", {"whole_word": 588}),
        ("qwen2", {"pretokens": 1661, "normalised": 248}),
        ("gemma3", {"merges": 4}),
        ("t5_small", {"merges": 2}),
    ],
)
def test_real_vocabularies_with_dead_tokens(shared, name, kinds):
    tokenizer = load_tokenizer(str(shared / "data/tokenizers" / name))
    found = reachability(tokenizer)
    expected = ("whole_word", "merges", "shadowed", "pretokens", "normalised")
    assert {kind: count for kind, count in found.counts().items() if kind in expected} == kinds
    for i in found.unreachable[:200].tolist():
        for text in {before + tokenizer.token_bytes[i].decode() for before in AROUND}:
            assert i not in tokenizer.encode(text).ids
