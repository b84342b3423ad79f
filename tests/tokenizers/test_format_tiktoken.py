"""tiktoken files and tekken.json: the ids of tiktoken and of mistral-common, special tokens at their ids."""

import base64
import gzip
import json
import lzma
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.config import UserError
from tokenkit.tokenizers.formats import read_format
from tokenkit.tokenizers.formats.splits import SPLITS
from tokenkit.tokenizers.formats.tiktoken import FAMILIES
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.pieces import TO_BYTES

tiktoken = pytest.importorskip("tiktoken")
LINES = ["The cat sat on the mat.", "été à la crème; 12 and 345", "def f(x):\n    return x + 1", "aaaa    aaa"] * 8


def small_ranks() -> dict[bytes, int]:
    """The bytes and what they most often make, without looking at words: pairs that many splits can reach."""
    random.seed(0)
    text = "".join(LINES).encode()
    tokens = [bytes([byte]) for byte in range(256)]
    for length in (2, 3, 4, 5):
        found = sorted({text[start : start + length] for start in range(len(text) - length)})
        tokens += random.sample(found, min(len(found), 60))
    return {token: rank for rank, token in enumerate(tokens)}


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()))
    return path


def loaded(path: Path, pattern: str | None = None) -> HFTokenizer:
    parsed = read_format(path, pattern)
    assert parsed is not None
    return HFTokenizer(*parsed, path.name)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[HFTokenizer, Any]:
    ranks = small_ranks()
    path = write_ranks(tmp_path_factory.mktemp("tiktoken") / "a.tiktoken", ranks)
    (pattern,) = SPLITS["cl100k"].patterns
    return loaded(path, "cl100k"), tiktoken.Encoding("small", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.one_of(st.text(), st.text(alphabet="The catsonm. é12\n")))
def test_ids_of_tiktoken(small, text):
    ours, theirs = small
    assert ours.encode(text).ids.tolist() == theirs.encode_ordinary(text)


def test_tokens_are_the_bytes_of_the_file(small):
    ours, theirs = small
    assert ours.token_bytes == [theirs.decode_single_token_bytes(rank) for rank in range(theirs.n_vocab)]


def test_unknown_ranks_need_a_pattern(tmp_path):
    path = write_ranks(tmp_path / "tokenizer.model", small_ranks())  # the name that Llama 3's file has
    with pytest.raises(UserError, match=r"496 ranks of no known family.*give pattern=") as caught:
        read_format(path)
    assert "\n" not in str(caught.value)
    definition, config = read_format(path, r"\S+|\s+")
    assert definition["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": r"\S+|\s+"}
    assert config is None
    assert loaded(path, "gpt2").encode("The cat").ids.tolist() == loaded(path, "cl100k").encode("The cat").ids.tolist()


def test_a_family_whose_special_tokens_are_taken(tmp_path):
    ranks = {**small_ranks(), b"odd token": 50256}
    ranks |= {bytes([200, i, j]): 1000 + 256 * i + j for i in range(192) for j in range(256)}
    path = write_ranks(tmp_path / "x.tiktoken", ranks)
    with pytest.raises(UserError, match=r"rank 50256 is a special token of the family 'r50k_base'"):
        read_format(path, "r50k_base")


def test_specials_of_families_are_distinct():
    for name, family in FAMILIES.items():
        assert family.split in SPLITS, name
        assert len(set(family.specials.values())) == len(family.specials)
        assert family.eos in family.specials
        assert family.bos is None or family.bos in family.specials


def original(folder: Path) -> dict[str, Any]:
    return json.loads(lzma.decompress((folder / "tokenizer.json.xz").read_bytes()))


def sentences(shared: Path, step: int) -> list[str]:
    with gzip.open(shared / "data/corpora/ntrex/valid.jsonl.gz", "rt") as rows:
        return [text for row in rows for text in json.loads(row).values() if isinstance(text, str)][::step]


def published_ranks(folder: Path, number: int) -> dict[bytes, int]:
    """The ranks of a published tokenizer.json: its first ids."""
    pieces = sorted(original(folder)["model"]["vocab"].items(), key=lambda entry: entry[1])[:number]
    return {piece.translate(TO_BYTES).encode("latin-1"): rank for piece, rank in pieces}


def test_cl100k(shared):
    folder = shared / "data/tokenizers/cl100k_base"
    ours = loaded(folder / "cl100k_base.tiktoken")
    assert {token["content"]: token["id"] for token in original(folder)["added_tokens"]} == ours.special_tokens
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (100257, 100257, 100277)
    # tiktoken's own pattern, in its own writing
    pattern = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
        r"|\s+(?!\S)|\s"
    )
    ranks = {token: rank for rank, token in enumerate(ours.token_bytes[:100256])}
    theirs = tiktoken.Encoding("cl100k", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    texts = [*sentences(shared, 20), "x\r\n\r\n  y   \n", "\n\n  \n", "it's I'LL 1234567", "<|endoftext|>", ""]
    for text, encoding in zip(texts, ours.encode_batch(texts)):
        assert encoding.ids.tolist() == theirs.encode_ordinary(text)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), [("llama3", 128000), ("qwen2", 151643)])
def test_files_rebuilt_from_published_tokenizers_are_recognised(name, number, shared, tmp_path):
    folder = shared / "data/tokenizers" / name
    ours = loaded(write_ranks(tmp_path / "tokenizer.model", published_ranks(folder, number)))
    theirs = HFTokenizer(original(folder), None, name)
    texts = sentences(shared, 20)
    for one, other in zip(ours.encode_batch(texts), theirs.encode_batch(texts)):
        assert one.ids.tolist() == other.ids.tolist()
    shared_specials = dict(list(theirs.special_tokens.items())[: 256 if name == "llama3" else 3])
    assert shared_specials.items() <= ours.special_tokens.items()


def tekken(vocab_size: int, **parts: Any) -> dict[str, Any]:
    ranks = small_ranks()
    vocabulary = [{"rank": r, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for t, r in ranks.items()]
    config = {"pattern": SPLITS["tekken"].patterns[0], "num_vocab_tokens": len(ranks), "version": "v3"}
    config |= {"default_vocab_size": vocab_size, "default_num_special_tokens": 100}
    return {"config": config, "vocab": vocabulary, **parts}


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), "utf-8")
    return path


def test_small_tekken_is_that_of_mistral_common(tmp_path):
    library = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    path = write_json(tmp_path / "tekken.json", tekken(500))
    ours, theirs = loaded(path), library.Tekkenizer.from_file(path)
    assert ours.vocab_size == theirs.n_words == 500
    for text in ["The cat sat, 123", "crème  aaaa\n\n x", "<s>[INST] a", *LINES]:
        assert ours.encode(text).ids.tolist() == theirs.encode(text, bos=False, eos=False)
    names = {index: token for token, index in ours.special_tokens.items()}
    assert [names[index] for index in range(100)] == [theirs.id_to_piece(index) for index in range(100)]
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_id, theirs.eos_id, theirs.pad_id)


def test_named_specials_of_a_tekken_file(tmp_path):
    specials = [
        {"rank": 1, "token_str": "<s>", "is_control": True},
        {"rank": 7, "token_str": "[x]", "is_control": True},
    ]
    ours = loaded(write_json(tmp_path / "any.json", tekken(400, special_tokens=specials)))
    assert (ours.special_tokens["[x]"], ours.special_tokens["<SPECIAL_0>"], ours.bos_id) == (7, 0, 1)


SAME = [{"rank": rank, "token_bytes": "YQ=="} for rank in range(420)]
BROKEN = {
    "too large": (tekken(5000), "asks for 4900 tokens of the 496 in vocab"),
    "no rank": (
        tekken(500, vocab=[{"rank": 300 + i, "token_bytes": "YQ=="} for i in range(420)]),
        "no base64|no rank 0",
    ),
    "no base64": (tekken(500, vocab=[{"rank": i, "token_bytes": "é"} for i in range(420)]), "is no base64 token"),
    "one token": (tekken(500, vocab=SAME), "hold the same token"),
    "specials": (tekken(500, special_tokens=[{"rank": 100, "token_str": "x"}]), "is not a special token with an id"),
    "specials twice": (tekken(500, special_tokens=[{"rank": 1, "token_str": "<SPECIAL_2>"}]), "the same literal"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tekken_files_are_one_line(name, tmp_path):
    value, message = BROKEN[name]
    with pytest.raises(UserError, match=message) as caught:
        read_format(write_json(tmp_path / "tekken.json", value))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_published_tekken_files(shared):
    library = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    folder = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    texts = [*sentences(shared, 20), "  x\r\n", "12345"]
    for name in ("tekken_240718.json", "tekken_240911.json"):
        ours, theirs = loaded(folder / name), library.Tekkenizer.from_file(folder / name)
        for text, encoding in zip(texts, ours.encode_batch(texts)):
            assert encoding.ids.tolist() == theirs.encode(text, bos=False, eos=False)
        assert ours.vocab_size == theirs.n_words
