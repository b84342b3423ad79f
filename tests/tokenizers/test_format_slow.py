"""Folders of slow tokenizers, what decides the format of a file, and the check before a tokenizer.json is built."""

import base64
import json
import lzma
import shutil
import struct
from pathlib import Path

import pytest
from tokenizers import normalizers

from tokenkit.config import UserError
from tokenkit.tokenizers.formats import read_format
from tokenkit.tokenizers.formats.check import charsmap_fault, check_definition
from tokenkit.tokenizers.formats.definition import read_bytes
from tokenkit.tokenizers.hf import HFTokenizer

TEXTS = ["The cat sat on the mat.", " it's  12:30\n\n", "été 😀", ""]


def loaded(path: Path, pattern: str | None = None) -> HFTokenizer:
    parsed = read_format(path, pattern)
    assert parsed is not None
    return HFTokenizer(*parsed, path.name)


def write_slow(folder: Path, tokenizer: HFTokenizer, names: tuple[str, str] = ("vocab.json", "merges.txt")) -> None:
    """The files of a slow GPT-2 tokenizer."""
    model = tokenizer.definition["model"]
    (folder / names[0]).write_text(json.dumps(model["vocab"]), "utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / names[1]).write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")


def test_vocabulary_and_merges(bpe, tmp_path):
    write_slow(tmp_path, bpe)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    for path in (tmp_path, tmp_path / "vocab.json", tmp_path / "merges.txt"):
        ours = loaded(path, "cl100k")
        assert [ours.encode(text).ids.tolist() for text in TEXTS] == [bpe.encode(text).ids.tolist() for text in TEXTS]
        assert (ours.eos_id, ours.bos_id) == (bpe.eos_id, None)


def test_added_tokens_beyond_the_vocabulary(bpe, tmp_path):
    write_slow(tmp_path, bpe)
    size = bpe.vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": size + 3}))
    config = {
        "added_tokens_decoder": {str(size): {"content": "<y>", "special": False}},
        "tokenizer_class": "GPT2Tokenizer",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = loaded(tmp_path)
    assert ours.special_tokens == {"<x>": size + 3}
    assert ours.encode("a<y>").ids.tolist()[-1] == size
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "OddTokenizer"}))
    with pytest.raises(UserError, match="tokenizer_class 'OddTokenizer' does not say how text is split"):
        read_format(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": "7"}))
    with pytest.raises(UserError, match=r"added_tokens.json: the id of '<x>' is '7'"):
        read_format(tmp_path)


def test_published_gpt2(shared, tmp_path):
    folder = shared / "data/tokenizers/gpt2"
    theirs = HFTokenizer(json.loads((folder / "tokenizer.json").read_bytes()), None, "gpt2")
    write_slow(tmp_path, theirs, ("encoder.json", "vocab.bpe"))  # as OpenAI published it
    ours = loaded(tmp_path)
    assert [ours.encode(text).ids.tolist() for text in TEXTS] == [theirs.encode(text).ids.tolist() for text in TEXTS]
    assert (ours.eos_id, ours.special_tokens) == (50256, {"<|endoftext|>": 50256})


def test_published_word_pieces(shared, tmp_path):
    folder = shared / "data/tokenizers/bert_base_uncased"
    theirs = json.loads((folder / "tokenizer.json").read_bytes())
    words = sorted(theirs["model"]["vocab"], key=theirs["model"]["vocab"].__getitem__)
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    ours, config = read_format(tmp_path)
    for part in ("normalizer", "pre_tokenizer", "decoder", "model"):
        assert ours[part].items() >= theirs[part].items()
    assert [token["id"] for token in ours["added_tokens"]] == [token["id"] for token in theirs["added_tokens"]]
    assert config == {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"} | {
        "mask_token": "[MASK]"
    }
    with pytest.raises(UserError, match="says itself how text is split"):
        read_format(tmp_path, "gpt2")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "strip_accents": False}))
    cased, _ = read_format(tmp_path / "vocab.txt")
    assert (cased["normalizer"]["lowercase"], cased["normalizer"]["strip_accents"]) == (False, False)


def test_what_is_none_of_these_formats(bpe, tmp_path):
    assert read_format(tmp_path) is None
    bpe.save(tmp_path)
    assert read_format(tmp_path / "tokenizer.json") is None
    (tmp_path / "notes.txt").write_text("hello")
    assert read_format(tmp_path / "notes.txt") is None


def test_packed_files_are_unpacked_to_a_limit(tmp_path):
    (tmp_path / "a.xz").write_bytes(lzma.compress(b"abc"))
    assert read_bytes(tmp_path / "a.xz") == b"abc"
    (tmp_path / "b.xz").write_bytes(lzma.compress(bytes(30 << 20)))
    with pytest.raises(UserError, match="unpacks to over"):
        read_bytes(tmp_path / "b.xz")


def test_every_tokenizer_made_here_passes_the_check(tokenizer):
    definition = tokenizer.definition if isinstance(tokenizer, HFTokenizer) else None
    if definition is not None:
        check_definition(definition, "it")


@pytest.mark.parametrize("name", ["gpt2", "t5_small", "bert_base_uncased"])
def test_published_files_pass_the_check(name, shared):
    check_definition(json.loads((shared / f"data/tokenizers/{name}/tokenizer.json").read_bytes()), name)


def trie(units: dict[int, int], replacements: bytes, size: int = 512) -> bytes:
    content = [units.get(index, 0) for index in range(size)]
    return struct.pack(f"<I{size}I", 4 * size, *content) + replacements


# the root's children lie at 256 ^ label; "a" (0x61) has a leaf at its own base, whose value is a replacement's place
ROOT, NODE, PLACE = {0: 256 << 10}, 256 ^ 0x61, 400
LEAF = (NODE ^ PLACE) << 10 | 1 << 8 | 0x61
SOUND = trie(ROOT | {NODE: LEAF, PLACE: 1 << 31 | 2}, b"x\0\xc3\xa9\0", 512)


def test_a_sound_charsmap():
    assert charsmap_fault(SOUND) is None
    assert normalizers.Precompiled(SOUND).normalize_str("banana") == "bénéné".replace("é", "\u00e9")


FAULTS = {
    "empty": (b"", "wrong size"),
    "size": (struct.pack("<I", 1 << 31) + bytes(2000), "wrong size"),
    "odd size": (struct.pack("<I", 1026) + bytes(2000), "wrong size"),
    "root": (trie({0: 1000 << 10}, b"\0"), "points outside itself"),
    "leaf": (trie(ROOT | {NODE: (NODE ^ 5000) << 10 | 1 << 8 | 0x61}, b"\0"), "points outside itself"),
    "place": (trie(ROOT | {NODE: LEAF, PLACE: 1 << 31 | 99}, b"x\0"), "outside its replacements"),
    "inside a character": (trie(ROOT | {NODE: LEAF, PLACE: 1 << 31 | 3}, b"x\0\xc3\xa9\0"), "outside its replacements"),
    "not text": (trie(ROOT, b"\xff\0"), "not UTF-8"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_a_charsmap(name):
    raw, message = FAULTS[name]
    assert message in str(charsmap_fault(raw))


def test_published_charsmap_is_sound(shared, tmp_path):
    folder = shared / "data/tokenizers/t5_small"
    raw = base64.b64decode(json.loads((folder / "tokenizer.json").read_bytes())["normalizer"]["precompiled_charsmap"])
    assert charsmap_fault(raw) is None
    shutil.copy(folder / "spiece.model", tmp_path)
    assert read_format(tmp_path)[0]["normalizer"]["normalizers"][0][
        "precompiled_charsmap"
    ].encode() == base64.b64encode(raw)
