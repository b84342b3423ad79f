"""GGUF vocabularies written by the gguf package from real and small tokenizers give the ids of the originals."""

import base64
import json
import lzma
import struct
from pathlib import Path
from typing import Any

import pytest

from tokenkit.config import UserError
from tokenkit.tokenizers.formats import read_format
from tokenkit.tokenizers.hf import HFTokenizer

gguf = pytest.importorskip("gguf")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
TEXTS = [
    "The cat sat on the mat, it's 12:30 and I'LL go.",
    "  two  spaces   and\ttab",
    "line\n\nother line\r\n",
    "Größe über alles; 日本語 が 😀👩‍👩‍👧",
    "def f(x):\n    return x + 1234567  # <s> <|endoftext|>",
    "",
]


def write(path: Path, model: str, **keys: Any) -> Path:
    """A GGUF file with these `tokenizer.ggml.` keys, written by the reference writer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    methods = {
        "pre": writer.add_tokenizer_pre,
        "tokens": writer.add_token_list,
        "types": writer.add_token_types,
        "scores": writer.add_token_scores,
        "merges": writer.add_token_merges,
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
        "add_bos": writer.add_add_bos_token,
        "space": writer.add_add_space_prefix,
        "remove": writer.add_remove_extra_whitespaces,
        "charsmap": writer.add_precompiled_charsmap,
        "template": writer.add_chat_template,
    }
    for key, value in keys.items():
        methods[key](value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def read(path: Path, pattern: str | None = None) -> HFTokenizer:
    parsed = read_format(path, pattern)
    assert parsed is not None
    return HFTokenizer(*parsed, str(path))


def original(folder: Path) -> dict[str, Any]:
    packed = folder / "tokenizer.json.xz"
    return json.loads(
        lzma.decompress(packed.read_bytes()) if packed.exists() else (folder / "tokenizer.json").read_bytes()
    )


def byte_level_keys(definition: dict[str, Any]) -> dict[str, Any]:
    """Tokens, types and merges as llama.cpp's converter writes them."""
    ids = dict(definition["model"]["vocab"])
    types = dict.fromkeys(ids, NORMAL)
    for token in definition["added_tokens"]:
        ids[token["content"]] = token["id"]
        types[token["content"]] = CONTROL if token["special"] else USER_DEFINED
    names = {index: token for token, index in ids.items()}
    tokens = [names.get(index, f"[PAD{index}]") for index in range(max(names) + 1)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in definition["model"]["merges"]]
    return {"tokens": tokens, "types": [types.get(token, UNUSED) for token in tokens], "merges": merges}


def piece_types(pieces: list[str], special: set[str], unknown: str) -> list[int]:
    kinds = dict.fromkeys(special, CONTROL) | {f"<0x{byte:02X}>": BYTE for byte in range(256)} | {unknown: UNKNOWN}
    return [kinds.get(piece, NORMAL) for piece in pieces]


def assert_same_ids(ours: HFTokenizer, theirs: HFTokenizer, texts: list[str]) -> None:
    for text, one, other in zip(texts, ours.encode_batch(texts), theirs.encode_batch(texts)):
        assert one.ids.tolist() == other.ids.tolist(), text


def test_small_byte_level_vocabulary(bpe, tmp_path):
    definition = bpe.definition
    path = write(tmp_path / "small.gguf", "gpt2", pre="llama-bpe", eos=bpe.eos_id, **byte_level_keys(definition))
    ours = read(path)
    assert_same_ids(ours, bpe, TEXTS)
    assert (ours.eos_id, ours.bos_id, ours.pad_id) == (bpe.eos_id, None, None)
    assert ours.token_bytes == bpe.token_bytes


def test_split_of_the_file_is_overridden_by_pattern(bpe, tmp_path):
    keys = byte_level_keys(bpe.definition)
    path = write(tmp_path / "x.gguf", "gpt2", pre="of-the-future", template="{{ messages }}", **keys)
    with pytest.raises(UserError, match=r"pre is 'of-the-future'.*give pattern="):
        read(path)
    assert_same_ids(read(path, "cl100k"), bpe, TEXTS)
    assert read(path, "cl100k").chat_template == "{{ messages }}"


@pytest.mark.parametrize(("name", "pre"), [("gpt2", "gpt-2")])
def test_real_byte_level_vocabularies(name, pre, shared, tmp_path):
    definition = original(shared / "data/tokenizers" / name)
    ours = read(write(tmp_path / "x.gguf", "gpt2", pre=pre, **byte_level_keys(definition)))
    assert_same_ids(ours, HFTokenizer(definition, None, name), TEXTS)


LARGE = [("qwen2", "qwen2"), ("llama3", "llama-bpe"), ("deepseek_v3", "deepseek-v3"), ("mistral_tekken", "tekken")]
LARGE += [("smollm2", "smollm")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pre"), LARGE)
def test_splits_by_their_llama_cpp_names(name, pre, shared, tmp_path):
    definition = original(shared / "data/tokenizers" / name)
    ours = read(write(tmp_path / "x.gguf", "gpt2", pre=pre, **byte_level_keys(definition)))
    assert_same_ids(ours, HFTokenizer(definition, None, name), TEXTS)


def test_real_sentencepiece_bpe(shared, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = shared / "data/tokenizers/llama2"
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = [library.id_to_piece(index) for index in range(len(library))]
    types = piece_types(pieces, {"<s>", "</s>"}, "<unk>")
    scores = [library.get_score(index) for index in range(len(library))]
    path = write(tmp_path / "x.gguf", "llama", tokens=pieces, types=types, scores=scores, bos=1, eos=2, unk=0)
    ours = read(path)
    assert_same_ids(ours, HFTokenizer(original(folder), {"bos_token": "<s>"}, "llama2"), TEXTS)
    assert (ours.bos_id, ours.eos_id) == (1, 2)
    assert ours.definition["post_processor"]["type"] == "TemplateProcessing"  # llama.cpp begins such texts by bos
    bare = write(
        tmp_path / "y.gguf", "llama", tokens=pieces, types=types, scores=scores, bos=1, space=False, add_bos=False
    )
    assert [encoding.ids.tolist() for encoding in read(bare).encode_batch(["a b", " a b"])] == [
        [library.piece_to_id(p) for p in ("a", "▁b")],
        [library.piece_to_id(p) for p in ("▁a", "▁b")],
    ]


def test_real_unigram(shared, tmp_path):
    folder = shared / "data/tokenizers/t5_small"
    definition = original(folder)
    pieces, scores = zip(*definition["model"]["vocab"])
    charsmap = base64.b64decode(definition["normalizer"]["precompiled_charsmap"])
    special = {token["content"] for token in definition["added_tokens"]}
    keys = {"tokens": list(pieces), "scores": list(scores), "types": piece_types(list(pieces), special, "<unk>")}
    keys |= {"eos": 1, "unk": 2, "pad": 0, "space": True, "remove": True, "charsmap": charsmap}
    ours = read(write(tmp_path / "x.gguf", "t5", **keys))
    config = json.loads((folder / "tokenizer_config.json").read_bytes())
    assert_same_ids(ours, HFTokenizer(definition, config, "t5"), [text for text in TEXTS if text])
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (None, 1, 0)


def test_real_word_piece(shared, tmp_path):
    definition = original(shared / "data/tokenizers/bert_base_uncased")
    words = sorted(definition["model"]["vocab"], key=definition["model"]["vocab"].__getitem__)
    brackets = [word.startswith("[") and word.endswith("]") for word in words]
    tokens = [w if b else w[2:] if w.startswith("##") else f"▁{w}" for w, b in zip(words, brackets)]
    special = {token["content"] for token in definition["added_tokens"]}
    types = [CONTROL if word in special else NORMAL for word in words]
    ours, _ = read_format(write(tmp_path / "x.gguf", "bert", tokens=tokens, types=types))
    assert ours["model"]["vocab"] == definition["model"]["vocab"]
    assert ours["normalizer"] == definition["normalizer"]


def test_other_models_are_named(tmp_path):
    path = write(tmp_path / "x.gguf", "rwkv", tokens=["a", "b"])
    with pytest.raises(UserError, match=r"tokenizer.ggml.model is 'rwkv'; gpt2, llama, t5 or bert can be read"):
        read(path)


def header(count: int, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, count) + body


def key(name: str, kind: int, body: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + body


TOKENS = "tokenizer.ggml.tokens"
CLAIMS = {
    "keys": (header(1 << 60), "claims 1,152,921,504,606,846,976 keys"),
    "a string": (header(1, struct.pack("<Q", 1 << 31)), "a string claims 2,147,483,648 bytes"),
    "strings": (header(1, key(TOKENS, 9, struct.pack("<IQ", 8, 1 << 60))), "array claims 1,152,921,504,606,846,976"),
    "numbers": (header(1, key("general.x", 9, struct.pack("<IQ", 4, 1 << 31))), "array claims 2,147,483,648 entries"),
    "nested arrays": (header(1, key("general.x", 9, struct.pack("<IQ", 9, 5) + bytes(64))), "an array of type 9"),
    "a type": (header(1, key("general.x", 99, b"")), "a value of type 99"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF of version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian GGUF"),
    "no vocabulary": (header(0), "without tokenizer.ggml.tokens"),
    "end": (b"GGUF\x03\0\0", "a number claims 4 bytes, 3 are left"),
    "not text": (header(1, struct.pack("<Q", 2) + b"\xff\xfe"), "is not UTF-8"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_of_a_header_are_one_line(name, tmp_path):
    content, message = CLAIMS[name]
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_format(tmp_path / "x.gguf")
    assert "\n" not in str(caught.value)


BROKEN = {
    "merges of unknown tokens": ({"merges": ["a zz"]}, "needs tokens that the file does not hold"),
    "merges of one word": ({"merges": ["ab"]}, "needs tokens that the file does not hold"),
    "no merges": ({}, "without tokenizer.ggml.merges"),
    "bos": ({"merges": ["a b"], "bos": 77}, "bos_token_id is 77 of 4 tokens"),
    "types": ({"merges": ["a b"], "types": [1]}, "token_type has 1 entries for 4 tokens"),
    "twice": ({"merges": ["a b"], "tokens": ["a", "a"]}, "stands twice"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_vocabularies_are_one_line(name, tmp_path):
    keys, message = BROKEN[name]
    path = write(tmp_path / "x.gguf", "gpt2", pre="gpt-2", **{"tokens": ["a", "b", "ab", "</s>"], **keys})
    with pytest.raises(UserError, match=message):
        read_format(path)
