"""A tokenizer is exported whole and proven, or not at all."""

import shutil
from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer

from tokenkit.config import UserError, build, resolved
from tokenkit.export.verify import ExportError
from tokenkit.tokenizers.autoencoder.chunkers import make_chunker, to_bytes
from tokenkit.tokenizers.autoencoder.huggingface import FSQTokenizer
from tokenkit.tokenizers.autoencoder.network import AutoEncoder, NetworkConfig
from tokenkit.tokenizers.autoencoder.selection import select_pins
from tokenkit.tokenizers.autoencoder.tokenizer import AutoEncoderTokenizer, package_of, save_with_fast
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.verbs.tokenizer import export as verb
from tokenkit.verbs.tokenizer.export import TokenizerExportRun, export_tokenizer

TEXT = "the cat sat on the mat, and ran home to see 123 中文 é\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory, documents):
    """A package with pins and a network that was taught nothing."""
    split = make_chunker("joined").split
    pins = select_pins(Counter(to_bytes(chunk) for text in documents for chunk in split(text)), 100)
    torch.manual_seed(0)
    network = AutoEncoder(NetworkConfig(max_bytes=4, levels=(5, 5), hidden=16, byte_width=4)).eval()
    folder = tmp_path_factory.mktemp("learned") / "model"
    save_with_fast(package_of(network, pins, kind="open"), folder)
    return folder


def done(model, output, **changes):
    return export_tokenizer(build(TokenizerExportRun, {"model": model, "output": output, **changes}))


def test_the_compact_form_is_for_anybody(model, tmp_path, corpus):
    found = done(model, tmp_path / "out", corpus={"path": str(corpus)})
    ours = AutoEncoderTokenizer.load(model, "compact")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    stock = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert stock(TEXT)["input_ids"] == ours.encode(TEXT)[:-1]
    assert len(stock) == ours.vocab_size == found["vocab_size"]
    assert load_tokenizer(str(tmp_path / "out")).encode(TEXT).ids.tolist() == ours.encode(TEXT, False)
    assert found["texts"] == len(verb.TEXTS) + 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_open_form_brings_its_codes(model, tmp_path):
    found = done(model, tmp_path / "out", kind="open")
    tokenizer = FSQTokenizer.from_pretrained(tmp_path / "out")
    ours = AutoEncoderTokenizer.load(model)
    assert tokenizer(TEXT)["input_ids"] == ours.encode(TEXT)[:-1]
    assert len(tokenizer) == ours.vocab_size == found["vocab_size"]
    assert not (tmp_path / "out" / "tokenizer.json").exists()  # which would be another tokenizer
    assert AutoEncoderTokenizer.load(tmp_path / "out").encode(TEXT) == ours.encode(TEXT)


@pytest.mark.parametrize("kind", ["compact", "open"])
def test_what_is_not_the_same_is_not_left_behind(model, tmp_path, monkeypatch, kind):
    elsewhere = verb._loaded_elsewhere

    def wrong(*arguments):
        found = elsewhere(*arguments)
        found["ids"][1][-1] += 1
        return found

    monkeypatch.setattr(verb, "_loaded_elsewhere", wrong)
    with pytest.raises(ExportError, match="after reloading"):
        done(model, tmp_path / "out", kind=kind)
    assert [*tmp_path.iterdir()] == []


def test_what_cannot_be_loaded_is_not_left_behind(model, tmp_path, monkeypatch):
    monkeypatch.setattr(verb, "PROCESS", "raise SystemExit('broken')")
    with pytest.raises(ExportError, match="broken"):
        done(model, tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


def test_mistakes_are_one_line(model, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists"):
        done(model, tmp_path / "there")
    with pytest.raises(UserError, match="does not exist"):
        done(tmp_path / "none", tmp_path / "out")
    compact = shutil.copytree(model, tmp_path / "compact")
    (compact / "weights.safetensors").unlink()
    with pytest.raises(UserError, match="changed since"):
        done(compact, tmp_path / "out", kind="open")
    assert resolved(build(TokenizerExportRun, {"model": "a", "output": "b"}))["kind"] == "compact"
