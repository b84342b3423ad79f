"""Broken tokenizer files of every format: one line each, no hang, no memory beyond a multiple of the file."""

import base64
import io
import json
import lzma
import resource
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenkit.config import UserError
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.pieces import TO_BYTES, byte_alphabet
from tokenkit.tokenizers.train import train_tokenizer

LINES = ["The cat sat on the mat.", "été à la crème; 12 and 345", "def f(x):\n    return x + 1"] * 8
SECONDS = 5.0  # a hang, on a busy machine
MEMORY = 64 << 20  # bytes above what the file takes; a claim of 2 GB is far beyond


def definition(kind: str) -> dict[str, Any]:
    size = 290 if kind == "bpe" else 330
    return train_tokenizer(LINES, kind, size).definition


def tiktoken_lines() -> bytes:
    tokens = [piece.translate(TO_BYTES).encode("latin-1") for piece in definition("bpe")["model"]["vocab"]][2:]
    tokens = [bytes([byte]) for byte in range(256)] + [token for token in tokens if len(token) > 1]
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def tekken() -> bytes:
    vocabulary = [
        {"rank": rank, "token_bytes": line.split()[0].decode(), "token_str": None}
        for rank, line in enumerate(tiktoken_lines().splitlines())
    ]
    config = {"pattern": r"\s+|\S+", "num_vocab_tokens": len(vocabulary), "version": "v3"}
    config |= {"default_vocab_size": len(vocabulary) + 20, "default_num_special_tokens": 20}
    return json.dumps({"config": config, "vocab": vocabulary}).encode()


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    head = b""
    while value > 0x7F:
        head, value = head + bytes([value & 0x7F | 0x80]), value >> 7
    return head + bytes([value])


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def piece(text: str, score: float, kind: int) -> bytes:
    return message(1, message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind))


def charsmap() -> bytes:
    """A sound map that replaces nothing."""
    return struct.pack("<I", 1024) + bytes(1024) + b"\0"


def sentencepiece(model_type: int) -> bytes:
    pieces = [piece("<unk>", 0, 2), piece("<s>", 0, 3), piece("</s>", 0, 3)]
    pieces += [piece(f"<0x{byte:02X}>", 0, 6) for byte in range(256)]
    texts = ["▁", *"abcdehmnorst.", "th", "▁the", "▁c", "at"]
    pieces += [piece(text, -1.0 - rank, 1) for rank, text in enumerate(texts)]
    trainer = b"\x18" + varint(model_type) + varint(35 << 3) + b"\x01"
    normalizer = message(2, charsmap()) if model_type == 1 else b""
    return b"".join(pieces) + message(2, trainer) + message(3, normalizer)


def gguf() -> bytes:
    tokens = [*byte_alphabet(), "th", "the"]
    strings = b"".join(struct.pack("<Q", len(t.encode())) + t.encode() for t in tokens)
    merges = b"".join(struct.pack("<Q", len(m)) + m for m in (b"t h", b"th e"))

    def entry(name: str, kind: int, body: bytes) -> bytes:
        return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + body

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    keys = [entry("general.architecture", 8, text("llama"))]
    keys += [entry("tokenizer.ggml.model", 8, text("gpt2")), entry("tokenizer.ggml.pre", 8, text("gpt-2"))]
    keys += [entry("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, len(tokens)) + strings)]
    keys += [entry("tokenizer.ggml.merges", 9, struct.pack("<IQ", 8, 2) + merges)]
    keys += [entry("tokenizer.ggml.eos_token_id", 4, struct.pack("<I", 3))]
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(keys)) + b"".join(keys)


def word_list() -> bytes:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *letters,
        *(f"##{letter}" for letter in letters),
        *".,:;!?'-#()",
        "the",
    ]
    return "\n".join(words).encode() + b"\n"


FILES = {
    "tokenizer.json": lambda: json.dumps(definition("bpe")).encode(),
    "unigram/tokenizer.json": lambda: json.dumps(definition("unigram")).encode(),
    "x.tiktoken": tiktoken_lines,
    "tekken.json": tekken,
    "bpe.model": lambda: sentencepiece(2),
    "unigram.model": lambda: sentencepiece(1),
    "x.gguf": gguf,
    "vocab.txt": word_list,
}


@pytest.fixture(scope="module", params=FILES)
def whole(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Path, bytes]:
    """Where a file of the format is to lie, and its content."""
    path = tmp_path_factory.mktemp("fuzz") / request.param
    path.parent.mkdir(exist_ok=True)
    return path, FILES[request.param]()


def spec(path: Path) -> str:
    return f"{path}:pattern=gpt2" if path.suffix == ".tiktoken" else str(path)


def attempt(path: Path, content: bytes) -> str | None:
    """The one line that loading this content ends in; None where it gives a tokenizer that works."""
    path.write_bytes(content)
    begin = time.process_time()
    try:
        load_tokenizer(spec(path)).encode("The cat, 12 é\n")
    except UserError as error:
        line = str(error)
        assert "\n" not in line
        assert 10 < len(line) < 2000
        return line
    finally:
        assert time.process_time() - begin < SECONDS
    return None


def test_whole_files_load(whole):
    assert attempt(*whole) is None


def test_cut_files_are_one_line(whole):
    path, content = whole
    places = {*range(40), *range(len(content) - 20, len(content))} | {len(content) * i // 30 for i in range(30)}
    lines = [attempt(path, content[:place]) for place in sorted(places)]
    assert lines[0] is not None  # the empty file
    assert sum(line is not None for line in lines) > len(lines) // 3


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_flipped_bytes_are_one_line(whole, data):
    path, content = whole
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    attempt(path, bytes(changed))


def changed(kind: str, **parts: Any) -> bytes:
    """A tokenizer.json with parts replaced: `model__vocab` is the vocab of the model."""
    result = definition(kind)
    for name, value in parts.items():
        *way, last = name.split("__")
        node = result
        for key in way:
            node = node[key]
        node[last] = value
    return json.dumps(result).encode()


def zip_of_nothing() -> bytes:
    content = io.BytesIO()
    zipfile.ZipFile(content, "w").close()
    return content.getvalue()


TOKEN = {"id": 5, "content": "<x>", "special": True} | dict.fromkeys(
    ("single_word", "lstrip", "rstrip", "normalized"), False
)
LONG = b"".join(b"%s %d\n" % (base64.b64encode(b"a" * n), n) for n in (1, 5000))
CASES = {
    "empty": ("tokenizer.json", b"", "not a JSON file"),
    "empty model": ("tokenizer.model", b"", "an empty file"),
    "zip of nothing": ("tokenizer.model", zip_of_nothing(), "a zip archive"),
    "zip for JSON": ("x.json", zip_of_nothing(), "a zip archive"),
    "nested": ("tokenizer.json", b"[" * 200_000, "not a JSON file"),
    "nested object": ("tekken.json", b'{"a":' * 200_000, "not a JSON file"),
    "nested steps": (
        "tokenizer.json",
        changed("bpe", normalizer=json.loads('{"type":"Sequence","normalizers":[' * 90 + "]}" * 90)),
        "nested deeper than 64",
    ),
    "huge id": ("tokenizer.json", changed("bpe", model__vocab={"a": 0, "b": 1 << 30}), "id 1073741824 in a vocabulary"),
    "id over 32 bits": ("tokenizer.json", changed("bpe", model__vocab={"a": 1 << 60}), "the id of 'a' is 1152921"),
    "negative id": ("tokenizer.json", changed("bpe", model__vocab={"a": -1}), "the id of 'a' is -1"),
    "same id": ("tokenizer.json", changed("bpe", model__vocab={"a": 0, "b": 0}), "the same id"),
    "id of an added token": ("tokenizer.json", changed("bpe", added_tokens=[TOKEN | {"id": -3}]), "'<x>' is -3"),
    "added token": ("tokenizer.json", changed("bpe", added_tokens=[{"id": 1}]), "has no content"),
    "unknown merges": ("tokenizer.json", changed("bpe", model__merges=[["q", "zz"]]), "needs 'zz'"),
    "missing merges": ("tokenizer.json", changed("bpe", model__merges=None), "merges is None"),
    "prefix": ("tokenizer.json", changed("bpe", model__continuing_subword_prefix="abc"), "does not begin with 'abc'"),
    "scores": ("tokenizer.json", changed("unigram", model__vocab=[["a", "b"]]), "not a piece and its score"),
    "unk_id": ("tokenizer.json", changed("unigram", model__unk_id=1 << 20), "unk_id is 1048576 of"),
    "no vocab": ("tokenizer.json", b'{"model": {"type": "BPE"}}', "no model with a vocab"),
    "a rank of 9 digits": ("x.tiktoken", b"YQ== 0\nYg== 999999999\n", "line 2"),
    "a large rank": ("x.tiktoken", b"YQ== 0\nYg== 99999999\n", "99999999 is the largest rank of 2 tokens"),
    "same rank": ("x.tiktoken", b"YQ== 0\nYg== 0\n", "the same rank"),
    "same token": ("x.tiktoken", b"YQ== 0\nYQ== 1\n", "stands twice"),
    "no bytes": ("x.tiktoken", b"YQ== 0\n", "no token for the single byte 0x00"),
    "a long token": ("x.tiktoken", LONG, "line 2"),
    "a length of 2 GB": (
        "x.model",
        piece("<unk>", 0, 2) + b"\x0a" + varint(1 << 31) + b"ab",
        "claims 2147483648 bytes",
    ),
    "a length of 2^60": ("x.model", piece("<unk>", 0, 2) + b"\x0a" + varint(1 << 60), "claims 1152921504606846976"),
    "an .xz of zeros": ("tokenizer.json.xz", lzma.compress(bytes(40 << 20)), "tokenizer.json.xz"),
    "half an .xz": ("tokenizer.json.xz", lzma.compress(changed("bpe"))[:-20], "tokenizer.json.xz"),
    "a large tekken": (
        "tekken.json",
        json.dumps({"config": {"pattern": "a", "default_vocab_size": 1 << 60}, "vocab": []}).encode(),
        "default_vocab_size is 1152921504606846976",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_broken_files_are_one_line(name, tmp_path):
    file, content, message = CASES[name]
    line = attempt(tmp_path / file, content)
    assert line is not None
    assert message in line


def test_claims_take_no_memory(tmp_path):
    """The most memory that the process ever held barely grows over all broken files: nothing believes their claims."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    for file, content, _ in CASES.values():
        attempt(tmp_path / file, content)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before < MEMORY


def test_reading_takes_a_multiple_of_the_file(whole):
    path, content = whole
    attempt(path, content)  # what is imported and cached once
    tracemalloc.start()
    try:
        attempt(path, content)
        assert tracemalloc.get_traced_memory()[1] < 100 * len(content) + (4 << 20)
    finally:
        tracemalloc.stop()


def test_vocabulary_without_merges(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2}))
    for file in (tmp_path, tmp_path / "vocab.json"):
        with pytest.raises(UserError, match=r"without its merges; put merges.txt beside it"):
            load_tokenizer(str(file))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\na c\n")
    with pytest.raises(UserError, match=r"merges.txt, line 3: 'a c' is not two tokens that make a third"):
        load_tokenizer(str(tmp_path))
