"""Token maps against the obvious way: every pair compared by the textbook table of edit distances."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tokenkit.align import vocabulary
from tokenkit.align.vocabulary import (
    LONGEST,
    exact_map,
    ids_in_use,
    load_mined,
    map_vocabulary,
    mined_map,
    nearest,
    prefix_map,
    save_map,
    save_map_npy,
)
from tokenkit.config import UserError
from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.train import train_tokenizer


def edits(a: bytes, b: bytes) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def shared_prefix(a: bytes, b: bytes) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def obvious(spelling: bytes, candidates: dict[bytes, int]) -> tuple[int, int]:
    ranked = [(edits(spelling, c), -shared_prefix(spelling, c), index) for c, index in candidates.items()]
    distance, _, index = min(ranked)
    return index, distance


def test_the_table_itself():
    assert edits(b"kitten", b"sitting") == 3
    assert edits(b"", b"abc") == edits(b"abc", b"") == 3
    assert edits(b"ab", b"ab") == 0
    others = [b"kitten", b"sit", b"a", b"sitting on a mat"]
    assert edits_to_all(b"sitting", others).tolist() == [edits(b"sitting", other) for other in others]


TOKENS = st.binary(min_size=1, max_size=7).map(lambda raw: bytes(b"ab\xc3\xa9"[byte % 4] for byte in raw))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(spellings=st.lists(TOKENS, max_size=12, unique=True), candidates=st.lists(TOKENS, max_size=12, unique=True))
def test_nearest_equals_every_pair_compared(spellings, candidates):
    ids = {candidate: index * 7 % 41 for index, candidate in enumerate(candidates)}
    found = nearest(spellings, ids, workers=1)
    assert found == ({spelling: obvious(spelling, ids) for spelling in spellings} if candidates else {})


def test_long_tokens_and_small_blocks(monkeypatch):
    generator = np.random.default_rng(0)
    draw = [bytes(generator.choice([32, 97, 98, 200], size).tolist()) for size in [*range(1, 40), 64, 65, 130, 300]]
    candidates = {
        spelling: index for index, spelling in enumerate(dict.fromkeys(draw[1::2] + [s[:-2] for s in draw[4::3]]))
    }
    spellings = list(dict.fromkeys(s for s in draw if s not in candidates))
    whole = nearest(spellings, candidates)
    assert whole == {spelling: obvious(spelling, candidates) for spelling in spellings}
    monkeypatch.setattr(vocabulary, "CELLS", 1)
    assert nearest(spellings, candidates, workers=2) == whole


def spelled(tokenizer):
    names = {index: literal.encode() for literal, index in tokenizer.special_tokens.items()}
    return [names.get(index, spelling) for index, spelling in enumerate(tokenizer.token_bytes)]


def test_mined_map_of_real_vocabularies(bpe, unigram):
    for student, teacher in ((bpe, unigram), (unigram, bpe), (ByteTokenizer(), bpe), (unigram, ByteTokenizer())):
        found = mined_map(student, teacher, workers=1)
        right = spelled(teacher)
        for index, spelling in enumerate(spelled(student)):
            mapped, distance = int(found.teacher_id[index]), int(found.distance[index])
            assert distance == edits(spelling, right[mapped])
            assert distance == min(edits(spelling, other) for other in right if other)
        assert found.describe()["mapped"] == student.vocab_size
        assert found.describe()["equal"] == int((found.distance == 0).sum())


def test_a_vocabulary_onto_itself(bpe):
    for kind in ("mined", "exact", "prefix"):
        found = map_vocabulary(kind, bpe, bpe)
        assert found.teacher_id.tolist() == list(range(bpe.vocab_size))
        assert not found.distance.any()


def test_exact_and_prefix_maps_both_ways(bpe, unigram):
    for one, other in ((bpe, unigram), (unigram, bpe), (ByteTokenizer(), unigram)):
        exact, prefix, distance = (
            exact_map(one, other),
            prefix_map(one, other),
            map_vocabulary("prefix", one, other).distance,
        )
        ids = {spelling: index for index, spelling in enumerate(other.token_bytes) if spelling}
        for index, spelling in enumerate(one.token_bytes):
            if index in one.special_ids:
                continue
            assert exact[index] == ids.get(spelling, -1)
            starts = [token for token in ids if spelling.startswith(token)]
            longest = max(starts, key=len, default=b"")
            assert prefix[index] == ids.get(longest, -1)
            assert distance[index] == (len(spelling) - len(longest) if starts else -1)
        for literal, index in one.special_tokens.items():
            assert exact[index] == prefix[index] == other.special_tokens.get(literal, -1)
    assert map_vocabulary("exact", bpe, unigram).distance.tolist() == np.minimum(exact_map(bpe, unigram), 0).tolist()


def edits_to_all(spelling: bytes, others: list[bytes]) -> np.ndarray:
    """The same table for many tokens at once, a column per step."""
    longest = max(map(len, others))
    letters = np.array([list(other.ljust(longest, b"\0")) for other in others], np.int16)
    lengths = np.array(list(map(len, others)))
    column = np.tile(np.arange(len(spelling) + 1), (len(others), 1))
    found = np.full(len(others), len(spelling))
    for step in range(longest):
        after = np.empty_like(column)
        after[:, 0] = step + 1
        for i, byte in enumerate(spelling, 1):
            replaced = column[:, i - 1] + (letters[:, step] != byte)
            after[:, i] = np.minimum(np.minimum(column[:, i], after[:, i - 1]) + 1, replaced)
        column = after
        found = np.where(lengths == step + 1, column[:, -1], found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("names", [("gpt2", "llama2"), ("llama2", "gpt2"), ("smollm2", "mistral_v1")])
def test_real_vocabularies_by_the_whole_table(shared, names):
    folder = shared / "data/tokenizers"
    if not all((folder / name).is_dir() for name in names):
        pytest.skip("a tokenizer is not in the shared data")
    student, teacher = (ids_in_use(load_tokenizer(str(folder / name))) for name in names)
    others = [token for token in teacher if len(token) <= 24]
    rest = sorted(token for token in student if token not in teacher and len(token) <= 10)
    sample = np.random.default_rng(0).choice(len(rest), 40, replace=False).tolist()
    found = nearest([rest[index] for index in sample], teacher)
    for index in sample:
        distances = edits_to_all(rest[index], others)
        tied = [others[i] for i in np.flatnonzero(distances == distances.min())]
        best = min(tied, key=lambda other: (-shared_prefix(rest[index], other), teacher[other]))
        assert found[rest[index]] == (teacher[best], distances.min())


FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def sentencepiece(pieces: list[str], holes: int = 0) -> HFTokenizer:
    """Byte fallback before the letters, as in Llama-2: `<0x41>` and `A` are both there, only the latter is used."""
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(97, 123))]
    vocabulary = {piece: index for index, piece in enumerate(head)}
    vocabulary |= {piece: len(head) + holes + index for index, piece in enumerate(pieces)}
    definition = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": head[i], **FLAGS} for i in range(3)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [["c", "a"]] if "ca" in pieces else []}
        | {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True},
    }
    return HFTokenizer(
        definition, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, "sentencepiece-like"
    )


def test_doubled_spellings():
    doubled = sentencepiece(["ca"], holes=3)
    fallback, letter = 3 + ord("a"), 3 + 256 + 1
    assert doubled.token_bytes[fallback] == doubled.token_bytes[letter] == b"a"
    in_use = ids_in_use(doubled)
    assert in_use[b"a"] == letter
    assert in_use[b" "] == 3 + 256
    assert in_use[b"A"] == 3 + ord("A")
    onto = mined_map(ByteTokenizer(), doubled)
    assert onto.teacher_id[ord("a")] == letter
    back = mined_map(doubled, ByteTokenizer())
    assert back.teacher_id[fallback] == back.teacher_id[letter] == ord("a")
    assert back.distance[[fallback, letter]].tolist() == [0, 0]
    holes = slice(3 + 256 + 27, 3 + 256 + 30)
    assert doubled.token_bytes[holes] == [b""] * 3
    assert back.teacher_id[holes].tolist() == back.distance[holes].tolist() == [-1] * 3
    assert back.teacher_id[-1] == ord("c")  # "ca": one edit from both "c" and "a", and begins with "c"


def test_special_tokens_count_as_their_literals(bpe):
    student = sentencepiece(["<|endoftext|", "<s"])
    found = mined_map(student, bpe)
    eos = bpe.special_tokens["<|endoftext|>"]
    assert found.teacher_id[-2] == eos
    assert found.distance[-2] == 1
    assert found.distance[student.bos_id] == edits(b"<s>", spelled(bpe)[found.teacher_id[student.bos_id]])
    back = mined_map(bpe, student)
    assert back.teacher_id[eos] == student.vocab_size - 2


def test_a_token_without_end(bpe):
    with pytest.raises(UserError, match=f"a token of more than {LONGEST} bytes"):
        mined_map(sentencepiece(["x" * (LONGEST + 1)]), bpe)


def test_saved_and_read_again(bpe, unigram, tmp_path):
    found = mined_map(unigram, bpe)
    path = save_map(tmp_path, found, "mined", unigram, bpe)
    first = path.read_bytes()
    again = load_mined(tmp_path, bpe, unigram)
    assert np.array_equal(again.teacher_id, found.teacher_id)
    assert np.array_equal(again.distance, found.distance)
    save_map(tmp_path, found, "mined", unigram, bpe)
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["mined_mapping.safetensors"]
    with pytest.raises(UserError, match=r"made for another teacher than .*; make this pair's with tokenkit mined"):
        load_mined(tmp_path, unigram, bpe)
    with pytest.raises(UserError, match="made for another student"):
        load_mined(tmp_path, bpe, bpe)
    with pytest.raises(UserError, match=r"no exact_mapping\.safetensors here"):
        load_mined(tmp_path, bpe, unigram, "exact")


@pytest.mark.parametrize("content", [b"", b"x" * 50, (2**62).to_bytes(8, "little") + b"{}"])
def test_a_broken_file_is_one_line(bpe, tmp_path, content):
    (tmp_path / "mined_mapping.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not a token map") as caught:
        load_mined(tmp_path, bpe, bpe)
    assert "\n" not in str(caught.value)


def test_a_file_of_something_else(bpe, tmp_path):
    path = tmp_path / "mined_mapping.safetensors"
    save_file({"weight": np.zeros(2, np.float32)}, path)
    with pytest.raises(UserError, match="not a token map"):
        load_mined(tmp_path, bpe, bpe)
    save_file({"teacher_id": np.zeros(2, np.int32), "distance": np.zeros(2, np.int32)}, path)
    with pytest.raises(UserError, match="made for another teacher"):
        load_mined(tmp_path, bpe, bpe)


def test_files_for_other_programs(bpe, unigram, tmp_path):
    found = mined_map(unigram, bpe)
    save_map_npy(tmp_path, found, "mined", unigram)
    assert np.array_equal(np.load(tmp_path / "mined_mapping.npy"), found.teacher_id)
    distances = json.loads((tmp_path / "mined_distances.json").read_text("utf-8"))
    index = unigram.token_bytes.index(b" cat") if b" cat" in unigram.token_bytes else unigram.token_bytes.index(b" ")
    assert distances["Ġ" + unigram.token_bytes[index][1:].decode()] == found.distance[index]
    assert len(distances) == len({*spelled(unigram)} - {b""})


def test_of_doubled_line_breaks_the_one_that_text_becomes_is_in_use():
    """Behind a line break a line break joins it, so one look at a single place would find neither."""
    tokenizer = train_tokenizer(["one two\n\nthree four\n\n", "five\nsix\n\n\nseven"] * 40, "unigram", 340)
    doubled = [i for i, spelling in enumerate(tokenizer.token_bytes) if spelling == b"\n"]
    assert len(doubled) == 2
    given = tokenizer.encode("x\ny").ids[1]
    assert given in doubled
    assert given not in tokenizer.encode("\n\n").ids
    assert ids_in_use(tokenizer)[b"\n"] == given
