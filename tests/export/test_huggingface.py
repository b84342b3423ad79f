"""What is exported answers as the model in memory, in a process that knows nothing of this package, or is not there."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Rust
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tokenkit.config import UserError
from tokenkit.export.huggingface import export_huggingface
from tokenkit.export.verify import ExportError, allowed, logits_of, verify_huggingface
from tokenkit.models.generate import generate
from tokenkit.models.lora import adapters, attach_lora
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.load import load_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def tiny(tokenizer: Tokenizer, **options: object) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=-(-tokenizer.vocab_size // 64) * 64, initializer_range=0.2, **sizes, **options)
    return LlamaForCausalLM(config).eval()


def trained(folder: Path, adds_bos: bool) -> Tokenizer:
    """A small byte-level BPE with a chat template; its own post-processor adds bos if asked."""
    rust = Rust(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    rust.train_from_iterator(["hello world, the world says hello"] * 3, trainer)
    rust.post_processor = processors.ByteLevel(trim_offsets=True)
    if adds_bos:
        rust.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir()
    rust.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(str(folder))


@pytest.fixture(params=["byte", "adds bos", "adds nothing"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return load_tokenizer("byte") if request.param == "byte" else trained(tmp_path / "t", request.param == "adds bos")


def test_an_exported_folder_answers_exactly_and_starts_texts_as_we_do(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = tiny(tokenizer)
    folder = export_huggingface(model, tokenizer, tmp_path / "out", extra_files={"note.md": "é\n"})
    figures = verify_huggingface(folder, model, tokenizer, ["hello world", "", "日本\n\n  x"])
    assert (figures["equal_tensors"], figures["texts"]) == (len(model.state_dict()), 3)
    assert figures["logit_difference"] <= 1e-5
    stock = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.start_id(), *tokenizer.encode("hello").ids.tolist()]
    assert stock("hello")["input_ids"] == ids
    assert stock(["hello", "hello"])["input_ids"] == [ids, ids]
    assert stock.decode(ids, skip_special_tokens=True) == "hello"
    assert (folder / "note.md").read_text("utf-8") == "é\n"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]
    assert not list(folder.glob("*.bin"))


def test_what_rounding_may_do_is_measured_where_the_tolerance_is_not_enough() -> None:
    tokenizer = load_tokenizer("byte")
    model, rows = tiny(tokenizer), [[256, *b"abc"]]
    assert allowed(1e-6, 1e-5, model, rows) == 1e-5
    exact = copy.deepcopy(model).double()
    own = (logits_of(model, rows[0]) - logits_of(exact, rows[0])).abs().max()
    assert 0 < own < 1e-4
    assert allowed(1.0, 1e-12, model, rows) == pytest.approx(4 * float(own))
    assert allowed(float("nan"), 1e-5, model, rows) >= 1e-5
    assert allowed(1.0, 1e-12, model.to(torch.bfloat16), rows) == 1e-12


def test_the_configuration_carries_the_tokenizers_ids(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("byte")
    model = tiny(tokenizer)
    export_huggingface(model, tokenizer, tmp_path / "out", dtype=torch.bfloat16)
    settings = json.loads((tmp_path / "out/config.json").read_text())
    assert (settings["vocab_size"], settings["dtype"]) == (320, "bfloat16")
    for name in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / "out" / name).read_text())
        assert [found[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [256, 257, 258]
        if name == "generation_config.json":
            assert found["suppress_tokens"] == list(range(259, 320))  # padding rows: they would decode to nothing
    assert model.dtype == torch.float32
    assert model.config.bos_token_id == 1  # the model in memory keeps what it had


def test_several_declared_ends_are_kept(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("byte")
    model = tiny(tokenizer)
    model.generation_config.eos_token_id = [10, 257]
    export_huggingface(model, tokenizer, tmp_path / "out")
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [10, 257]


def test_the_chat_template_travels(tmp_path: Path) -> None:
    tokenizer = trained(tmp_path / "t", adds_bos=False)
    folder = export_huggingface(tiny(tokenizer), tokenizer, tmp_path / "out")
    chat = [{"role": "user", "content": "hello"}]
    stock = AutoTokenizer.from_pretrained(folder)
    assert stock.apply_chat_template(chat, tokenize=False) == "hello"


def test_adapters_are_merged_into_a_copy(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("byte")
    model = tiny(tokenizer, tie_word_embeddings=True)
    attach_lora(model, rank=4, alpha=8.0)
    for layer in adapters(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    folder = export_huggingface(model, tokenizer, tmp_path / "out")
    figures = verify_huggingface(folder, model, tokenizer, ["hello"])
    assert figures["equal_tensors"] == 0
    assert 0 < figures["logit_difference"] <= figures["tolerance"] < 1e-2
    names = load_file(folder / "model.safetensors").keys()
    assert not any("lora" in name for name in names)
    assert "lm_head.weight" not in names  # tied weights are saved once
    assert len(adapters(model)) == 14
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weight)


def test_an_existing_folder_is_never_touched(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("byte")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export_huggingface(tiny(tokenizer), tokenizer, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_mistakes_are_one_line_each(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("byte")
    small = LlamaForCausalLM(LlamaConfig(vocab_size=100, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(UserError, match="100 embedding rows for 259 token ids"):
        export_huggingface(small, tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match=r"'\.\./x': write a plain file name"):
        export_huggingface(tiny(tokenizer), tokenizer, tmp_path / "out", extra_files={"../x": ""})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_answers_differently_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("byte")
    model = tiny(tokenizer)
    folder = export_huggingface(model, tokenizer, tmp_path / "out")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"the tensor model\.norm\.weight is not the same"):
        verify_huggingface(folder, model, tokenizer, ["hello"])
    with pytest.raises(ExportError, match="logits differ by"):
        verify_huggingface(folder, model.double(), tokenizer, ["hello"])
    model.float()
    with pytest.raises(ExportError, match="becomes"):
        verify_huggingface(folder, model, trained(tmp_path / "t", adds_bos=True), ["hello"])


def test_a_failed_verification_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ExportError("no")

    monkeypatch.setattr("tokenkit.export.huggingface.verify_huggingface", refuse)
    with pytest.raises(ExportError, match="no"):
        export_huggingface(tiny(load_tokenizer("byte")), load_tokenizer("byte"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_stock_generation_continues_as_ours(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = tiny(tokenizer)
    folder = export_huggingface(model, tokenizer, tmp_path / "out")
    stock, again = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    batch = stock("hello", return_tensors="pt")
    new = again.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=8, do_sample=False)
    text = stock.decode(new[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.rstrip("�") == generate(model, tokenizer, ["hello"], max_new_tokens=8)[0].rstrip("�")


PIPELINE = """
import sys
from transformers import pipeline
generator = pipeline("text-generation", model=sys.argv[1])
found = generator("hello", max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
assert not any(name.startswith("tokenkit") for name in sys.modules)
sys.stdout.buffer.write(found.encode())
"""


@pytest.mark.slow
def test_a_stock_pipeline_in_another_process_continues_as_ours(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = tiny(tokenizer)
    folder = export_huggingface(model, tokenizer, tmp_path / "out")
    command = [sys.executable, "-c", PIPELINE, str(folder)]
    found = subprocess.run(command, capture_output=True, check=True, cwd=tmp_path).stdout.decode()
    assert found.rstrip("�") == generate(model, tokenizer, ["hello"], max_new_tokens=8)[0].rstrip("�")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama2", "qwen2", "gpt2", "gemma3"])
def test_real_tokenizers_export(shared: Path, tmp_path: Path, name: str) -> None:
    tokenizer = load_tokenizer(str(shared / "data/tokenizers" / name))
    model = tiny(tokenizer)
    folder = export_huggingface(model, tokenizer, tmp_path / "out")
    stock = AutoTokenizer.from_pretrained(folder)
    assert stock("Hello there")["input_ids"] == [tokenizer.start_id(), *tokenizer.encode("Hello there").ids.tolist()]
