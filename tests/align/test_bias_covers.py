"""Covers and biases against the definition itself: every candidate tokenised, on random and on real vocabularies."""

import functools
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.align.counts import unigram_probabilities
from tokenkit.align.covers import MergeCovers, Model, ModelCovers, covers
from tokenkit.align.merges import merge_tree
from tokenkit.align.pair_bias import bias_blocks
from tokenkit.config import UserError
from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.pieces import byte_alphabet

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
END = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True, "content": "<e>"}
ATOMS = [byte_alphabet()[byte] for byte in "abé ".encode()]  # é is two bytes, so tokens end inside characters


def byte_level_bpe(merges: list[tuple[str, str]], more: list[str] | None = None, **model: object) -> HFTokenizer:
    pieces = dict.fromkeys([*byte_alphabet(), *(left + right for left, right in merges), *(more or [])])
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    listed = [list(pair) for pair in merges]
    return HFTokenizer(
        {
            "version": "1.0",
            "added_tokens": [{**END, "id": len(vocabulary)}],
            "normalizer": None,
            "pre_tokenizer": BYTE_LEVEL,
            "post_processor": None,
            "decoder": BYTE_LEVEL,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": listed, **model},
        }
    )


def sentencepiece_bpe(merges: list[tuple[str, str]]) -> HFTokenizer:
    """With byte fallback; spaces are U+2581."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + [chr(c) for c in range(0x21, 0x7F)] + ["▁", "é", "日"]
    pieces = dict.fromkeys([*pieces, *(left + right for left, right in merges)])
    model = {"type": "BPE", "vocab": {p: i for i, p in enumerate(pieces)}, "merges": [list(m) for m in merges]}
    return HFTokenizer(
        {
            "version": "1.0",
            "added_tokens": [{**END, "id": len(pieces)}],
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": None,
            "model": {**model, "byte_fallback": True, "fuse_unk": True},
        }
    )


@functools.lru_cache(maxsize=4)
def library_model(tokenizer: HFTokenizer) -> tuple[Model, tokenizers.Tokenizer]:
    model = Model(tokenizer)
    definition = {"version": "1.0", "added_tokens": [], "model": model.model}
    return model, tokenizers.Tokenizer.from_str(json.dumps(definition))


def defined_cover(tokenizer: HFTokenizer, token: int) -> dict[bytes, list[int]]:
    """The definition, word for word: overhang to ids, later entries overwriting."""
    model, backend = library_model(tokenizer)
    spelled, found = tokenizer.token_bytes[token], {}
    for start in range(len(spelled) - 1, -1, -1):
        head = model.text(spelled[:start])
        for index, candidate in enumerate(tokenizer.token_bytes):
            if head is None or index in tokenizer.special_ids or not candidate.startswith(spelled[start:]):
                continue
            joined = spelled[:start] + candidate
            text = model.text(joined)
            ids = [*(backend.encode(head).ids if start else []), index]
            if text is not None and len(joined) > len(spelled) and backend.encode(text).ids == ids:
                found[joined[len(spelled) :]] = ids
    return found


class Numbers(dict[bytes, int]):
    def __call__(self, overhang: bytes) -> int:
        return self.setdefault(overhang, len(self))


def found_covers(tokenizer: HFTokenizer, tokens: list[int]) -> list[dict[bytes, int]]:
    numbers = Numbers()
    made = covers(tokenizer, numbers)
    names = {number: overhang for overhang, number in numbers.items()}
    result = []
    for token in tokens:
        cover = made.of(token)
        assert len(set(cover.overhangs.tolist())) == len(cover.overhangs)  # each overhang once
        result.append({names[o]: t for o, t in zip(cover.overhangs.tolist(), cover.tokens.tolist())})
    return result


def check(tokenizer: HFTokenizer, tokens: list[int]) -> int:
    found = found_covers(tokenizer, tokens)
    for token, cover in zip(tokens, found):
        wanted = {overhang: ids[-1] for overhang, ids in defined_cover(tokenizer, token).items()}
        assert cover == wanted, tokenizer.token_bytes[token]
    return sum(map(len, found))


@st.composite
def merge_lists(draw, atoms: list[str] = ATOMS, *, in_order: bool = True) -> list[tuple[str, str]]:
    """Merges of merges, also several that make one token; in the order of their making, or shuffled."""
    pieces, merges = list(atoms), []
    for _ in range(draw(st.integers(1, 14))):
        pair = (draw(st.sampled_from(pieces)), draw(st.sampled_from(pieces)))
        if len("".join(pair)) <= 8 and pair not in merges:
            merges.append(pair)
            pieces += [piece for piece in ["".join(pair)] if piece not in pieces]
    return merges if in_order else draw(st.permutations(merges))


def tokens_of(tokenizer: HFTokenizer) -> list[int]:
    short = {bytes([byte]) for byte in "abé日 ".encode()}
    return [i for i, spelled in enumerate(tokenizer.token_bytes) if len(spelled) > 1 or spelled in short]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    merges=merge_lists(), whole_words=st.booleans(), more=st.lists(st.text("ab", min_size=2, max_size=5), max_size=3)
)
def test_covers_of_random_merges(merges, whole_words, more):
    tokenizer = byte_level_bpe(merges, more, ignore_merges=whole_words)
    assert isinstance(covers(tokenizer, Numbers()), MergeCovers)
    check(tokenizer, tokens_of(tokenizer))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(merges=merge_lists(in_order=False))
def test_covers_of_merges_in_any_order(merges):
    tokenizer = byte_level_bpe(merges)
    check(tokenizer, tokens_of(tokenizer))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(merges=merge_lists([*"ab", "▁", "é", "日"]))
def test_covers_with_byte_fallback(merges):
    tokenizer = sentencepiece_bpe(merges)
    check(tokenizer, tokens_of(tokenizer))


def test_merges_out_of_order():
    """`abc` is listed before the `bc` of which it is made, so it is there as soon as `bc` is: ranks are no times."""
    tokenizer = byte_level_bpe([("a", "bc"), ("b", "c"), ("c", "a")])
    ids = {spelled: index for index, spelled in enumerate(tokenizer.token_bytes)}
    tree = merge_tree(Model(tokenizer).vocabulary, [("a", "bc"), ("b", "c"), ("c", "a")], tokenizer.vocab_size)
    assert (tree.rank[ids[b"abc"]], tree.time[ids[b"abc"]]) == (0, 1)
    assert check(tokenizer, tokens_of(tokenizer)) > 0


def test_a_hand_made_cover():
    """`a b` becomes `ab`, so a lone `a` says that no b follows. `bca` is `bc a`, not `b ca`: `bc` is merged first."""
    tokenizer = byte_level_bpe([("a", "b"), ("b", "c"), ("c", "a")])
    ids = {spelled: index for index, spelled in enumerate(tokenizer.token_bytes)}
    a, ab, bc = found_covers(tokenizer, [ids[b"a"], ids[b"ab"], ids[b"bc"]])
    assert a == {b"b": ids[b"ab"]}
    assert ab == {}  # a + bc is ab + c
    assert bc == {}


def test_the_tree_takes_the_merge_that_happens():
    """Two merges make `abc`; the text `abc` is made by the second, since `ab` is there before `bc`."""
    tree = merge_tree({"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5, "x": 6, "xx": 7}, [], 8)
    assert tree.reachable.tolist() == [True, True, True, False, False, False, True, False]
    merges = [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")]
    tree = merge_tree({"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}, merges, 6)
    assert (tree.left[5], tree.right[5], tree.rank[5]) == (3, 2, 3)
    assert tree.time.tolist() == [-1, -1, -1, 0, 1, 3]


def test_covers_of_trained_tokenizers(bpe, unigram):
    for tokenizer, kind in ((bpe, MergeCovers), (unigram, ModelCovers)):
        assert isinstance(covers(tokenizer, Numbers()), kind)
        tokens = [i for i, spelled in enumerate(tokenizer.token_bytes) if spelled]
        assert check(tokenizer, tokens[:60] + tokens[-40:]) > 0


def test_bytes_rule_nothing_out():
    assert found_covers(ByteTokenizer(), [0, 97, 255]) == [{}, {}, {}]


def test_marked_words_are_refused():
    tokenizer = byte_level_bpe([("a", "b")])
    definition = tokenizer.definition
    definition["model"]["end_of_word_suffix"] = "</w>"
    tokenizer._json = json.dumps(definition)
    with pytest.raises(UserError, match="end_of_word_suffix"):
        Model(tokenizer)


def defined_bias(a: HFTokenizer, b: HFTokenizer, counts_a, counts_b) -> dict[tuple[int, int], tuple[float, float]]:
    """Every pair of tokens, straight from the definition."""
    probabilities = unigram_probabilities(counts_a), unigram_probabilities(counts_b)
    covered: dict[tuple[int, int], dict[bytes, list[int]]] = {}
    found = {}
    for t, spelled_t in enumerate(a.token_bytes):
        for u, spelled_u in enumerate(b.token_bytes):
            if not (spelled_t and spelled_u and (spelled_t.endswith(spelled_u) or spelled_u.endswith(spelled_t))):
                continue
            if spelled_t.decode(errors="replace").isspace() or spelled_u.decode(errors="replace").isspace():
                found[t, u] = (1.0, 1.0)
                continue
            for side, tokenizer, token in ((0, a, t), (1, b, u)):
                if (side, token) not in covered:
                    covered[side, token] = defined_cover(tokenizer, token)
            mine, other = covered[0, t], covered[1, u]
            found[t, u] = (
                sum(probabilities[0][ids[-1]] for overhang, ids in mine.items() if overhang not in other),
                sum(probabilities[1][ids[-1]] for overhang, ids in other.items() if overhang not in mine),
            )
    return found


def computed_bias(a: HFTokenizer, b: HFTokenizer, counts_a, counts_b) -> dict[tuple[int, int], tuple[float, float]]:
    work = bias_blocks(a, b, counts_a, counts_b)
    bias = np.ones((2, len(work.pairs.blank)))
    for block, rows in enumerate(work.pairs.blocks):
        result = work.run(block)
        bias[:, rows] = result["bias1"], result["bias2"]
    pairs = list(zip(work.pairs.teacher_ids.tolist(), work.pairs.student_ids.tolist()))
    assert pairs == sorted(set(pairs))
    return dict(zip(pairs, zip(*bias.tolist())))


def counts_for(tokenizer: HFTokenizer, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50, tokenizer.vocab_size)


def compare(a: HFTokenizer, b: HFTokenizer) -> dict[tuple[int, int], tuple[float, float]]:
    counts = counts_for(a, 1), counts_for(b, 2)
    wanted, found = defined_bias(a, b, *counts), computed_bias(a, b, *counts)
    assert found.keys() == wanted.keys()
    for pair, values in wanted.items():
        assert found[pair] == pytest.approx(values, abs=1e-12)
        assert [value == 0 for value in found[pair]] == [value == 0 for value in values]
    return found


@settings(max_examples=10, deadline=None, derandomize=True)
@given(merges=merge_lists(), others=merge_lists())
def test_biases_of_random_merges(merges, others):
    compare(byte_level_bpe(merges), byte_level_bpe(others))


def test_biases_of_trained_tokenizers_of_two_kinds(bpe, unigram):
    """The Unigram side has every byte twice, as itself and as a fallback token: both ids are listed, each once."""
    found = compare(bpe, unigram)
    assert max(max(values) for values in found.values()) <= 1
    assert any(0 < value < 1 for values in found.values() for value in values)
    mirrored = computed_bias(unigram, bpe, counts_for(unigram, 2), counts_for(bpe, 1))
    assert {(u, t): (second, first) for (t, u), (first, second) in mirrored.items()} == found


def test_a_tokenizer_against_itself_has_no_bias_where_the_tokens_are_equal(bpe):
    counts = counts_for(bpe, 3)
    found = computed_bias(bpe, bpe, counts, counts)
    blank = [spelled.decode(errors="replace").isspace() for spelled in bpe.token_bytes]
    equal = [values for (t, u), values in found.items() if t == u and not blank[t]]
    assert len(equal) > 250
    assert set(equal) == {(0.0, 0.0)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "llama3", "llama2", "gemma3"])
def test_covers_of_real_tokenizers(shared, name):
    """40 tokens each: what the merges say equals what tokenising every candidate says."""
    tokenizer = load_tokenizer(str(shared / "data" / "tokenizers" / name))
    numbers = Numbers()
    fast = covers(tokenizer, numbers)
    assert isinstance(fast, MergeCovers)
    model = Model(tokenizer)
    slow = ModelCovers(model, model.words(numbers, lambda index: True))
    usable = [index for index, spelled in enumerate(tokenizer.token_bytes) if spelled and not spelled.isspace()]
    for token in np.random.default_rng(0).choice(usable, 40, replace=False).tolist():
        left, right = fast.of(token), slow.of(token)
        assert dict(zip(left.overhangs.tolist(), left.tokens.tolist())) == dict(
            zip(right.overhangs.tolist(), right.tokens.tolist())
        )
