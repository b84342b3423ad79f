"""The factory, the mistakes it names in one line, and folders that AutoTokenizer loads with equal ids."""

import json
import lzma

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoTokenizer

from tokenkit.config import UserError
from tokenkit.tokenizers.autoencoder.learned import LearnedTokenizer
from tokenkit.tokenizers.autoencoder.package import PACKAGE_FILES
from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.tokenizers.formats import definition
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.load import load_tokenizer

TEXTS = ["The cat sat.", " leading", "two  spaces\n\n\ttab\r\n", "été 😀 中文 \0 \x7f", "", "x" * 50, "12345 e\u0301"]


@pytest.fixture(scope="session")
def tokenizer(any_tokenizer):
    return any_tokenizer


def test_saved_folder_loads_in_transformers_with_equal_ids(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    if isinstance(tokenizer, LearnedTokenizer):
        tokenizer = tokenizer.fixed  # no file of a stock tokenizer holds codes
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text).ids.tolist()
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert theirs.pad_token_id == tokenizer.pad_id
    assert len(theirs) == tokenizer.vocab_size


def test_saved_folder_loads_here_as_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.fingerprint == tokenizer.fingerprint
    assert [*again.token_bytes] == [*tokenizer.token_bytes]
    for ours, theirs in zip(tokenizer.encode_batch(TEXTS), again.encode_batch(TEXTS)):
        assert np.array_equal(ours.ids, theirs.ids)
        assert np.array_equal(ours.ends, theirs.ends)


def test_chat_template_travels(bpe, tmp_path):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    HFTokenizer(bpe.definition, bpe.config | {"chat_template": template}, "x").save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == template
    assert load_tokenizer(str(tmp_path)).chat_template == template


def test_config_that_names_a_class_does_not_rebuild_the_tokenizer(bpe, tmp_path):
    config = bpe.config | {"tokenizer_class": "LlamaTokenizer", "auto_map": {"AutoTokenizer": ["x.Y", None]}}
    HFTokenizer(bpe.definition, config, "x").save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "auto_map" not in saved


def test_compressed_file_and_file_are_the_folder(bpe, tmp_path):
    bpe.save(tmp_path)
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "tokenizer.json.xz").write_bytes(lzma.compress((tmp_path / "tokenizer.json").read_bytes()))
    (packed / "tokenizer_config.json").write_bytes((tmp_path / "tokenizer_config.json").read_bytes())
    for spec in (tmp_path / "tokenizer.json", packed, packed / "tokenizer.json.xz"):
        assert load_tokenizer(str(spec)).fingerprint == bpe.fingerprint


def test_role_tokens_from_the_special_tokens_map(bpe, tmp_path):
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.bos_id, loaded.eos_id, loaded.start_id()) == (None, bpe.eos_id, bpe.eos_id)


MISTAKES = {
    "empty folder": ({}, "no tokenizer.json in this folder"),
    "vocab.txt": ({"vocab.txt": "a\nb"}, "vocab.txt: no .UNK. among its 2 tokens"),
    "sentencepiece": ({"tokenizer.model": "x"}, "tokenizer.model: neither a sentencepiece model"),
    "cut short": ({"tokenizer.json.xz": lzma.compress(b"{}" * 99)[:40]}, "not a JSON file"),
    "deep": ({"tokenizer.json": "[" * 100_000}, "not a JSON file"),
    "configuration": ({"tokenizer.json": "{}", "tokenizer_config.json": "[]"}, "not a working tokenizer.json"),
    "not json": ({"tokenizer.json": "hello"}, "not a JSON file"),
    "not utf-8": ({"tokenizer.json": b"\xff\xfe\xfa"}, "not a JSON file"),
    "not compressed": ({"tokenizer.json.xz": "hello"}, "not a JSON file"),
    "a list": ({"tokenizer.json": "[]"}, "not a working tokenizer.json: no model"),
    "no vocabulary": ({"tokenizer.json": '{"model": {"type": "BPE"}}'}, "no model with a vocab"),
    "unreadable model": (
        {"tokenizer.json": '{"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": 3}}'},
        "not a working tokenizer.json: merges is 3",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, tmp_path):
    files, message = MISTAKES[name]
    for file, content in files.items():
        (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_configuration_that_is_no_object(bpe, tmp_path):
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="holds a list; write one JSON object"):
        load_tokenizer(str(tmp_path))


def test_a_pattern_for_a_tokenizer_that_has_one(bpe, tmp_path):
    bpe.save(tmp_path)
    with pytest.raises(UserError, match=r"a tokenizer\.json says how it splits text; leave pattern out"):
        load_tokenizer(f"{tmp_path}:pattern=a+")


def test_a_small_file_that_unpacks_to_gigabytes(tmp_path, monkeypatch):
    monkeypatch.setattr(definition, "MAX_FILE_BYTES", 10_000)
    (tmp_path / "tokenizer.json.xz").write_bytes(lzma.compress(b" " * 20_000))
    with pytest.raises(UserError, match="unpacks to over 10,000 bytes"):
        load_tokenizer(str(tmp_path))


@pytest.mark.slow
def test_other_formats_are_loaded_and_changed(shared):
    folder = shared / "data/tokenizers/llama2"
    ours, wanted = load_tokenizer(str(folder / "tokenizer.model")), load_tokenizer(str(folder))
    moved = load_tokenizer(f"{folder / 'tokenizer.model'}:source=TinyLlama:target=Qwen2")
    for text in TEXTS:
        assert ours.encode(text).ids.tolist() == wanted.encode(text).ids.tolist()
        assert moved.encode(text).ids.tolist() == wanted.encode(text).ids.tolist()
    assert moved.special_tokens["<|im_start|>"] == wanted.vocab_size


def test_missing_path():
    with pytest.raises(UserError, match=r"'\./nowhere': no such file"):
        load_tokenizer("./nowhere")


def test_hub_id_downloads_tokenizer_files_only(bpe, tmp_path, monkeypatch):
    asked = {}

    def snapshot(spec: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(spec=spec, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    bpe.save(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    load_tokenizer("someone/model:revision=main", revision="abc")
    assert asked["revision"] == "main"
    loaded = load_tokenizer("someone/model", revision="abc")
    assert (loaded.name, loaded.fingerprint) == ("someone/model", bpe.fingerprint)
    assert (asked["spec"], asked["revision"]) == ("someone/model", "abc")
    others = {*asked["patterns"]} - {*PACKAGE_FILES}
    assert not any(pattern.endswith(("safetensors", "bin")) or pattern == "*" for pattern in others)


def test_hub_failure_is_one_line(monkeypatch):
    def offline(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"'someone/model': no such folder, not loaded from the hub \(no network\)"):
        load_tokenizer("someone/model")


def test_byte_ids_are_bytes():
    byte = load_tokenizer("byte")
    assert isinstance(byte, ByteTokenizer)
    encoding = byte.encode("é\0")
    assert encoding.ids.tolist() == [0xC3, 0xA9, 0]
    assert encoding.ends.tolist() == [1, 2, 3]
    assert byte.token_bytes == [bytes([value]) for value in range(256)] + [b""] * 3
