"""Vocabularies extended and pruned: ids are those of plain byte-pair encoding over what is left; no token is dead."""

import gzip
import json
import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import tokenizers

from tokenkit.config import UserError
from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.pieces import is_byte_level, model_vocabulary
from tokenkit.tokenizers.surgery.bpe import MergeList, merge_pairs
from tokenkit.tokenizers.surgery.continued import Pieces, learn_merges
from tokenkit.tokenizers.surgery.extend import extend
from tokenkit.tokenizers.surgery.library import Joins, count_ids, count_words
from tokenkit.tokenizers.surgery.prune import prune
from tokenkit.tokenizers.surgery.reachable import Reach, reachability
from tokenkit.tokenizers.targets import with_tokens

NEW_TEXT = [
    "Die Katze saß auf der Matte, und die andere Katze saß auch auf der Matte.\n\nKatzen schlafen auf Matten.",
    "def katze(x):\n    return x + matte  # die Katze\n\n    return matte + katze\n",
    "Кошка сидела на коврике, и другая кошка тоже сидела на коврике. Кошки спят на ковриках. 2024 2024 2024",
] * 3
OTHER_TEXT = [
    "Der Kater saß  nie auf Katzen.\n\tКошкин кот\n",
    "été 12345 <s> x=1;\r\n\r\nthe cat 中文 🙂👩\u200d👧",
    " ",
    "a",
]
BPE_KINDS = ["bpe", "sp-prepend", "sp-replace", "sp-first", "sp-always", "sp-never", "all-splits"]


def all_splits(tokenizer):
    """As tiktoken's files are converted: every split of a token is a merge, and whole pre-tokens are taken first."""
    definition = tokenizer.definition
    vocabulary = definition["model"]["vocab"]
    merges = [
        f"{piece[:cut]} {piece[cut:]}"
        for piece in vocabulary
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    model = {**definition["model"], "merges": merges, "ignore_merges": True}
    return HFTokenizer({**definition, "model": model}, tokenizer.config, "all-splits")


@pytest.fixture(scope="module", params=BPE_KINDS)
def before(request, make_tokenizer):
    return all_splits(make_tokenizer("bpe")) if request.param == "all-splits" else make_tokenizer(request.param)


@pytest.fixture(scope="module")
def extended(before):
    return extend(before, NEW_TEXT, 60)


def plain_bpe(definition, text):
    """Ids by the definition of byte-pair encoding: the pair of smallest rank, the leftmost of these, over and over."""
    library = tokenizers.Tokenizer.from_str(json.dumps(definition))
    vocabulary = model_vocabulary(definition)
    ranks = {pair: rank for rank, pair in enumerate(merge_pairs(definition))}
    normalised = library.normalizer.normalize_str(text) if library.normalizer else text
    words = [word for word, _ in library.pre_tokenizer.pre_tokenize_str(normalised)] if library.pre_tokenizer else None
    ids = []
    for word in [normalised] if words is None else words:
        if definition["model"].get("ignore_merges") and word in vocabulary:
            ids.append(vocabulary[word])
            continue
        symbols = []
        for character in word:
            known = character in vocabulary
            symbols += [character] if known else [f"<0x{byte:02X}>" for byte in character.encode()]
        while True:
            ranked = [(ranks[pair], place) for place, pair in enumerate(pairwise(symbols)) if pair in ranks]
            if not ranked:
                break
            _, place = min(ranked)
            symbols = [*symbols[:place], symbols[place] + symbols[place + 1], *symbols[place + 2 :]]
        ids += [vocabulary[symbol] for symbol in symbols]
    return ids


def same_as_plain(tokenizer, texts):
    definition = tokenizer.definition
    for text in texts:
        assert tokenizer.encode(text).ids.tolist() == plain_bpe(definition, text), text


def dead(tokenizer):
    return [tokenizer.token_bytes[i] for i in reachability(tokenizer).unreachable]


def round_trip(tokenizer, texts):
    return [tokenizer.decode(one.ids.tolist()) for one in tokenizer.encode_batch(texts)]


def num_tokens(tokenizer, texts):
    return sum(len(one.ids) for one in tokenizer.encode_batch(texts))


def test_extended_encodes_as_plain_bpe_and_comes_back(before, extended):
    same_as_plain(extended.tokenizer, [*NEW_TEXT[:3], *OTHER_TEXT])
    assert round_trip(extended.tokenizer, NEW_TEXT) == NEW_TEXT
    assert round_trip(extended.tokenizer, OTHER_TEXT) == round_trip(before, OTHER_TEXT)


def test_extended_keeps_every_id_and_makes_every_new_token(before, extended):
    old, new = before.token_bytes, extended.tokenizer.token_bytes
    assert new[: len(old)] == old
    assert extended.new == [*range(len(old), len(new))]
    assert len(extended.new) == 60
    assert extended.tokenizer.special_tokens == before.special_tokens
    assert len(set(new[len(old) :])) == 60
    assert all(len(one) == 1 for one in set(new[len(old) :]) & set(old))  # was a byte, and is a character
    assert dead(extended.tokenizer) == dead(before)
    found = count_ids(extended.tokenizer.definition, NEW_TEXT, extended.tokenizer.vocab_size)
    assert num_tokens(extended.tokenizer, NEW_TEXT) < num_tokens(before, NEW_TEXT)
    assert found[extended.new].sum() > 0


def test_extension_does_not_depend_on_the_order_of_texts(before, extended):
    again = extend(before, NEW_TEXT[::-1], 60)
    assert again.tokenizer.fingerprint == extended.tokenizer.fingerprint


def test_new_tokens_hold_at_most_one_space_and_in_front(before, extended):
    for spelling in (extended.tokenizer.token_bytes[i] for i in extended.new):
        assert not spelling.strip() or b" " not in spelling[1:], spelling


def test_extension_in_two_steps_is_extension_in_one(make_tokenizer):
    bpe = make_tokenizer("bpe")
    twice = extend(extend(bpe, NEW_TEXT, 20).tokenizer, NEW_TEXT, 25).tokenizer
    assert twice.fingerprint == extend(bpe, NEW_TEXT, 45).tokenizer.fingerprint


def test_pair_counts_are_those_of_counting_anew(make_tokenizer):
    bpe = make_tokenizer("bpe")
    definition, size = bpe.definition, bpe.vocab_size
    words = count_words(definition, NEW_TEXT, Joins.of(definition))
    learnt = learn_merges(words, Pieces(definition, size, Joins.of(definition), 32), 80, 2)
    pieces = {i: piece for piece, i in model_vocabulary(definition).items()}
    now, slow = dict(words), []
    while len(slow) < 80:
        counts = Counter()
        for word, times in now.items():
            for pair in pairwise(word):
                counts[pair] += times
        count, pair = min((-count, pair) for pair, count in counts.items())
        if -count < 2:
            break
        made = size + len(slow)
        pieces[made] = pieces[pair[0]] + pieces[pair[1]]
        slow.append((pieces[pair[0]], pieces[pair[1]]))
        after = Counter()
        for word, times in now.items():
            merged, place = [], 0
            while place < len(word):
                both = word[place : place + 2] == pair
                merged.append(made if both else word[place])
                place += 2 if both else 1
            after[tuple(merged)] += times
        now = after
    assert learnt.pairs == slow
    assert len(slow) > 40


def test_characters_that_were_bytes_become_tokens(make_tokenizer):
    tokenizer = make_tokenizer("sp-replace")
    none, all_of_them = extend(tokenizer, NEW_TEXT, 60, coverage=0.0), extend(tokenizer, NEW_TEXT, 60, coverage=1.0)
    spelled = [all_of_them.tokenizer.token_bytes[i].decode() for i in all_of_them.new[: all_of_them.characters]]
    assert none.characters == 0 < all_of_them.characters <= 30
    assert all(len(one) == 1 for one in spelled)
    assert "к" in spelled
    assert all_of_them.tokenizer.encode("к").ids.tolist()[-1] in all_of_them.new
    assert num_tokens(all_of_them.tokenizer, NEW_TEXT) < num_tokens(none.tokenizer, NEW_TEXT)


def test_added_tokens_behind_the_vocabulary_keep_their_ids(make_tokenizer):
    bpe = make_tokenizer("bpe")
    tokenizer = HFTokenizer(with_tokens(bpe.definition, ("zebra", "Katze ")), bpe.config)
    found = extend(tokenizer, NEW_TEXT, 30).tokenizer
    assert found.token_bytes[: tokenizer.vocab_size] == tokenizer.token_bytes
    for text in ("zebra", "ein zebra und eine Katze da"):
        assert tokenizer.vocab_size - 2 in found.encode("zebra").ids
        assert found.decode(found.encode(text).ids.tolist()) == text
    assert not any(found.token_bytes[i] == b"Katze" for i in range(tokenizer.vocab_size, found.vocab_size))
    assert all(found.token_bytes[i] for i in range(tokenizer.vocab_size, found.vocab_size))


def test_tokens_appended_without_their_merges_are_dead(make_tokenizer):
    bpe = make_tokenizer("bpe")
    definition, size = bpe.definition, bpe.vocab_size
    for place, word in enumerate(("ĠKatze", "ĠMatte", "schlafen")):
        definition["model"]["vocab"][word] = size + place
    found = reachability(HFTokenizer(definition, bpe.config))
    assert found.unreachable.tolist() == [size, size + 1, size + 2] == found.ids(Reach.MERGES)


@pytest.fixture(scope="module")
def counts(before):
    return count_ids(before.definition, NEW_TEXT, before.vocab_size)


@pytest.mark.parametrize("by", ["leaf_frequency", "frequency", "last"])
def test_pruned_encodes_as_plain_bpe_and_comes_back(before, counts, by):
    tokens = sum(map(bool, before.token_bytes)) + len(before.special_ids)
    pruned = prune(before, size=tokens - 40, by=by, counts=counts)
    found = pruned.tokenizer
    assert found.vocab_size == tokens - 40
    assert len(pruned.gone) == 40
    same_as_plain(found, [*NEW_TEXT[:3], *OTHER_TEXT])
    assert round_trip(found, NEW_TEXT) == NEW_TEXT
    assert round_trip(found, OTHER_TEXT) == round_trip(before, OTHER_TEXT)
    assert not dead(found)
    assert {name: pruned.mapping[i] for name, i in before.special_tokens.items()} == found.special_tokens
    assert [before.token_bytes[pruned.kept[new]] for new in range(found.vocab_size)] == found.token_bytes
    assert {i for i in pruned.gone if len(before.token_bytes[i]) == 1 and is_byte_level(before.definition)} == set()


def test_text_of_kept_tokens_alone_keeps_its_tokens(before, counts):
    pruned = prune(before, size=before.vocab_size - 30, by="last")
    kept, generator, seen = pruned.mapping, random.Random(0), 0
    texts = ["".join(generator.choice("the cat ") for _ in range(9)) for _ in range(300)] + OTHER_TEXT + NEW_TEXT
    for old, new in zip(before.encode_batch(texts), pruned.tokenizer.encode_batch(texts), strict=True):
        if set(old.ids.tolist()) <= kept.keys():
            assert [kept[i] for i in old.ids.tolist()] == new.ids.tolist()
            seen += 1
    assert seen > 10


def test_leaf_pruning_is_the_rarest_leaf_again_and_again(make_tokenizer):
    bpe = make_tokenizer("bpe")
    counts = count_ids(bpe.definition, NEW_TEXT, bpe.vocab_size)
    merges, ids = MergeList.of(bpe.definition), model_vocabulary(bpe.definition)
    parts = {ids[a + b]: (ids[a], ids[b]) for a, b in merges.pairs}  # one merge per token in a trained vocabulary
    left, now = {*parts}, dict(enumerate(counts.tolist()))
    for _ in range(60):
        leaves = left - {part for one in left for part in parts[one]}
        one = min(leaves, key=lambda i: (now[i], -i))
        left.remove(one)
        for part in parts[one]:
            now[part] += now[one]
    pruned = prune(bpe, size=bpe.vocab_size - 60, counts=counts)
    assert {*parts} - {*pruned.gone} == left


def test_frequency_keeps_the_commonest_and_what_they_need(make_tokenizer):
    bpe = make_tokenizer("bpe")
    counts = count_ids(bpe.definition, NEW_TEXT, bpe.vocab_size)
    pruned = prune(bpe, size=bpe.vocab_size - 60, by="frequency", counts=counts)
    unneeded = {*pruned.kept.values()} - {part for pair in _parts(bpe, pruned) for part in pair}
    ordinary = [i for i in unneeded if len(bpe.token_bytes[i]) > 1]
    assert min(counts[ordinary]) >= max(counts[pruned.gone])


def _parts(tokenizer, pruned):
    ids = model_vocabulary(tokenizer.definition)
    kept = {*pruned.kept.values()}
    return [(ids[a], ids[b]) for a, b in merge_pairs(tokenizer.definition) if ids[a + b] in kept]


def test_last_takes_the_largest_ids_of_a_trained_vocabulary(make_tokenizer):
    bpe = make_tokenizer("bpe")
    ordinary = [i for i, one in enumerate(bpe.token_bytes) if len(one) > 1]
    assert prune(bpe, size=bpe.vocab_size - 25, by="last").gone == ordinary[-25:]


def test_unwanted_tokens_stay_where_others_need_them(make_tokenizer):
    bpe = make_tokenizer("bpe")
    ids = model_vocabulary(bpe.definition)
    left, right = merge_pairs(bpe.definition)[-1]
    whole = ids[left + right]
    assert prune(bpe, unwanted=[ids[left], whole]).gone == sorted({ids[left], whole} - _needed(bpe, {whole, ids[left]}))
    with pytest.raises(UserError, match="nothing to take away"):
        prune(bpe, unwanted=[ids[part] for part in (left, right)])


def _needed(tokenizer, gone):
    ids = model_vocabulary(tokenizer.definition)
    return {ids[part] for pair in merge_pairs(tokenizer.definition) if ids["".join(pair)] not in gone for part in pair}


def test_kept_ids_leave_holes_and_an_extension_goes_behind_them(before, counts):
    pruned = prune(before, size=before.vocab_size - 30, counts=counts, keep_ids=True)
    assert all(new == old for new, old in pruned.kept.items())
    found = pruned.tokenizer
    for i in pruned.gone:
        assert i >= found.vocab_size or found.token_bytes[i] == b""
    same_as_plain(found, [*NEW_TEXT[:3], *OTHER_TEXT])
    again = extend(found, NEW_TEXT, 10).tokenizer
    assert again.token_bytes[: found.vocab_size] == found.token_bytes
    assert not dead(again)
    same_as_plain(again, NEW_TEXT[:3])


@pytest.mark.parametrize("kind", ["unigram", "unigram-none"])
def test_a_unigram_vocabulary_is_pruned(make_tokenizer, kind):
    tokenizer = make_tokenizer(kind)
    texts = ["the cat sat", "the  cat\nthe", "12 cats <s> ate"]
    counts = count_ids(tokenizer.definition, texts[:2], tokenizer.vocab_size)
    size = tokenizer.vocab_size - (60 if kind == "unigram" else 1)
    pruned = prune(tokenizer, size=size, counts=counts)
    found = pruned.tokenizer
    assert found.vocab_size == size
    assert not dead(found)
    scores = dict(map(tuple, tokenizer.definition["model"]["vocab"]))
    assert all(scores[piece] == score for piece, score in found.definition["model"]["vocab"])
    for old, new, text in zip(tokenizer.encode_batch(texts), found.encode_batch(texts), texts, strict=True):
        assert found.decode(new.ids.tolist()) == text
        if {*old.ids.tolist()} <= pruned.mapping.keys():
            assert [pruned.mapping[i] for i in old.ids.tolist()] == new.ids.tolist()
    with pytest.raises(UserError, match="keep_ids"):
        prune(tokenizer, size=size, counts=counts, keep_ids=True)


def test_ids_move_wherever_the_file_names_them(make_tokenizer):
    tokenizer = make_tokenizer("sp-replace")
    definition = tokenizer.definition
    template = tokenizers.processors.TemplateProcessing(
        single="</s> $A <s>", pair="</s> $A $B", special_tokens=[("</s>", 2), ("<s>", 1)]
    )
    library = tokenizers.Tokenizer.from_str(json.dumps(definition))
    library.post_processor = template
    library.enable_padding(pad_id=2, pad_token="</s>")
    moved = json.loads(library.to_str())
    vocabulary = {p: i + 3 if i > 2 else i for p, i in model_vocabulary(moved).items()}  # a hole before the bytes
    moved["model"]["vocab"] = vocabulary
    pruned = prune(HFTokenizer(moved, tokenizer.config), by="last", size=len(vocabulary) - 5)
    stock = tokenizers.Tokenizer.from_str(json.dumps(pruned.tokenizer.definition))
    ids = [one.ids for one in stock.encode_batch(["a cat", "a"])]
    specials = pruned.tokenizer.special_tokens
    assert ids[0][0] == specials["</s>"]
    assert ids[0][-1] == specials["<s>"]
    assert ids[1][-1] == specials["</s>"]
    assert pruned.tokenizer.vocab_size == len(vocabulary) - 5


def test_mistakes_are_one_line(make_tokenizer, make_lossy, make_folder):
    bpe, unigram = make_tokenizer("bpe"), make_tokenizer("unigram")
    counts = np.zeros(bpe.vocab_size, np.int64)
    cases = [
        (lambda: extend(unigram, NEW_TEXT, 5), "Unigram"),
        (lambda: extend(make_lossy("word-piece"), NEW_TEXT, 5), "WordPiece"),
        (lambda: extend(make_lossy("end-of-word"), NEW_TEXT, 5), "</w>"),
        (lambda: extend(ByteTokenizer(), NEW_TEXT, 5), "train a BPE"),
        (lambda: prune(load_tokenizer(str(make_folder("compact"))), size=9), "learned"),
        (lambda: extend(bpe, NEW_TEXT, 0), "tokens: 0"),
        (lambda: prune(bpe, size=5, counts=counts), "size: 5 is too small"),
        (lambda: prune(bpe, size=300), "by: 'leaf_frequency' needs text"),
        (lambda: prune(bpe, size=bpe.vocab_size, by="last"), "nothing to take away"),
    ]
    for call, words in cases:
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def sentences(shared, language, split="valid"):
    with gzip.open(shared / f"data/corpora/ntrex/{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)[language] for line in file]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "language"),
    [("gpt2", "deu"), ("llama2", "kat"), ("llama3", "tha"), ("qwen2", "amh"), ("mistral_v1", "deu")],
)
def test_real_vocabularies(shared, name, language):
    tokenizer = load_tokenizer(str(shared / "data/tokenizers" / name))
    texts, held = sentences(shared, language, "train")[:200], sentences(shared, language)[:30]
    found = extend(tokenizer, texts, 300)
    assert found.tokenizer.token_bytes[: tokenizer.vocab_size] == tokenizer.token_bytes
    assert num_tokens(found.tokenizer, held) < num_tokens(tokenizer, held)
    same_as_plain(found.tokenizer, held)
    english = sentences(shared, "eng")
    counts = count_ids(tokenizer.definition, english, tokenizer.vocab_size)
    pruned = prune(tokenizer, size=20_000, counts=counts)
    assert pruned.tokenizer.vocab_size == 20_000
    assert not dead(pruned.tokenizer)
    same_as_plain(pruned.tokenizer, [*held, *english[:30]])
    assert num_tokens(pruned.tokenizer, english) == num_tokens(tokenizer, english)
    new = reachability(found.tokenizer).kinds[found.new]
    assert (new == Reach.REACHED).all()
