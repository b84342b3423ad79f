"""A byte student with expanded inputs in stock transformers, by the code beside its weights: same logits, same text."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from tokenkit.export import expanded
from tokenkit.export.expanded import export_model
from tokenkit.export.verify import ExportError
from tokenkit.models.expand import attach_expansion
from tokenkit.models.generate import generate
from tokenkit.models.remote_code.modeling_tokenkit_expanded import TokenkitExpandedForCausalLM
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.verbs.model import ModelChoice, load_pair

WORDS = ["the", " the", "he", "hell", "hello", "Hello, w", "東", "\n\n", " two sp"]
PROMPTS = ["hello the", "Hello, wor", "x", "東京\n\n the"]


def student(tied: bool = True, family: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=256)).eval()
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        config = LlamaConfig(vocab_size=320, initializer_range=0.3, tie_word_embeddings=tied, **sizes)
        model = LlamaForCausalLM(config).eval()
    attach_expansion(model, [word.encode() for word in WORDS], torch.randn(len(WORDS), 32))
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return export_model(student(), load_tokenizer("byte"), tmp_path / "model", dtype=None)


def ids_of(text: str) -> torch.Tensor:
    tokenizer = load_tokenizer("byte")
    return torch.tensor([[tokenizer.start_id(), *tokenizer.encode(text).ids.tolist()]])


@pytest.mark.parametrize(("tied", "family"), [(True, "llama"), (False, "llama"), (True, "gpt2")])
def test_both_readers_answer_as_the_model(tied: bool, family: str, tmp_path: Path) -> None:
    model = student(tied, family)
    folder = export_model(model, load_tokenizer("byte"), tmp_path / "model", dtype=None, max_shard_bytes=40_000)
    assert len(list((folder / "base").glob("*.safetensors"))) > 1
    stock = TokenkitExpandedForCausalLM.from_pretrained(folder)
    ours, _ = load_pair(ModelChoice(source=str(folder)), "cpu")
    ids = ids_of("hello the world, Hello, world 東")
    with torch.no_grad():
        expected = model(ids).logits
        for found in (stock, ours):
            torch.testing.assert_close(found(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_weights_are_stored_once_and_the_body_stays_an_ordinary_folder(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    names = []
    for file in sorted({*index.values()}):
        with safe_open(folder / file, "pt") as opened:
            names += list(opened.keys())
    assert sorted(names) == sorted(index)
    assert {*map(str, (path.relative_to(folder) for path in folder.rglob("*.safetensors")))} == {*index.values()}
    body = AutoModelForCausalLM.from_pretrained(folder / "base")
    ids = ids_of("hello the")
    assert not torch.allclose(body(ids).logits, student()(ids).logits, atol=1e-2)


def test_without_trust_transformers_refuses(folder: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def test_a_cache_gives_what_no_cache_gives(folder: Path) -> None:
    stock = TokenkitExpandedForCausalLM.from_pretrained(folder).eval()
    ids = ids_of("hello the hello Hello, world the")
    with torch.no_grad():
        whole = stock(ids).logits
        for cut in (1, 3, 9, 20):
            first = stock(ids[:, :cut], use_cache=True)
            rest = stock(ids[:, cut:], past_key_values=first.past_key_values)
            torch.testing.assert_close(rest.logits, whole[:, cut:], atol=1e-4, rtol=1e-4)
        cache = stock(ids[:, :20], use_cache=True).past_key_values
        cache.crop(-8)
        with pytest.raises(ValueError, match="ids_before"):
            stock(ids[:, 12:], past_key_values=cache)
        again = stock(ids[:, 12:], past_key_values=cache, ids_before=ids[:, :12])
        torch.testing.assert_close(again.logits, whole[:, 12:], atol=1e-4, rtol=1e-4)


def test_batches_beams_and_no_cache_write_what_one_row_writes(folder: Path) -> None:
    stock = TokenkitExpandedForCausalLM.from_pretrained(folder).eval()
    rows = [ids_of(prompt)[0] for prompt in PROMPTS]
    ids = torch.nn.utils.rnn.pad_sequence(rows, True, ord("h"), padding_side="left")  # a byte as padding: masked out
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True, 0, padding_side="left")
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 258}
    found = stock.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    uncached = stock.generate(ids, attention_mask=mask, use_cache=False, **options)[:, ids.shape[1] :]
    assert torch.equal(found, uncached)
    for row, expected in zip(rows, found, strict=True):
        alone = stock.generate(row[None], attention_mask=torch.ones_like(row)[None], **options)[0, len(row) :]
        assert torch.equal(alone, expected)
    beams = [
        stock.generate(ids, attention_mask=mask, num_beams=3, use_cache=cached, **options) for cached in (True, False)
    ]
    assert torch.equal(*beams)


def test_a_folder_of_the_older_layout_is_read_as_well(folder: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    shutil.copytree(folder / "base", older / "base")
    shutil.copyfile(folder / "expansion.safetensors", older / "expansion.safetensors")
    ids = ids_of("hello the")
    found = [load_pair(ModelChoice(source=str(path)), "cpu")[0](ids).logits for path in (folder, older)]
    assert torch.equal(*found)


def test_a_reader_that_answers_otherwise_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expanded, "load_expansion", lambda model, path: None)
    with pytest.raises(ExportError, match="logits differ"):
        export_model(student(), load_tokenizer("byte"), tmp_path / "model", dtype=None)
    assert list(tmp_path.iterdir()) == []


STRANGER = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompts = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, padding_side="left")
batch = tokenizer(prompts, return_tensors="pt", padding=True)
found = model.generate(**batch, max_new_tokens=16, do_sample=False)[:, batch["input_ids"].shape[1]:]
assert not any(name == "tokenkit" or name.startswith("tokenkit.") for name in sys.modules)
print(json.dumps([tokenizer.decode(row, skip_special_tokens=True) for row in found]))
"""


@pytest.mark.slow
def test_in_a_process_without_this_package_the_same_greedy_text(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STRANGER, str(folder), json.dumps(PROMPTS)]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, check=True, cwd=tmp_path, env=environment, text=True)
    expected = generate(student(), load_tokenizer("byte"), PROMPTS, max_new_tokens=16)
    assert [text.rstrip("�") for text in json.loads(done.stdout)] == [text.rstrip("�") for text in expected]
