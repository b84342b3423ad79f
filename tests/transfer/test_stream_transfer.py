"""Streamed from folder to folder, a model becomes what it becomes in memory, bit for bit; all else is left alone."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from tokenkit.config import UserError
from tokenkit.models.load import load_model
from tokenkit.models.sample import empty_ids
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer import INITIALIZERS, rows
from tokenkit.transfer.apply import transfer_model
from tokenkit.transfer.evidence import Evidence, Texts
from tokenkit.transfer.initialize import Choice
from tokenkit.transfer.plan import Side
from tokenkit.transfer.rows import TensorRows
from tokenkit.transfer.shards import open_checkpoint
from tokenkit.transfer.stream import Body, Rewrite, stream_transfer

GIVEN = {"donor", "texts", "source_tokenizer", "target_tokenizer"}
STREAMED = [one.name for one in INITIALIZERS.values() if set(one.needs) <= GIVEN]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def saved(folder: Path, source: Tokenizer, shard: str = "1GB", extra: int = 3, **options: object) -> Path:
    """A random Llama with more rows than ids, in shards."""
    torch.manual_seed(0)
    dtype = options.pop("dtype", torch.float32)
    config = LlamaConfig(vocab_size=source.vocab_size + extra, bos_token_id=source.bos_id, **SIZES, **options)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def streamed(
    folder: Path, new: Path, source: Tokenizer, target: Tokenizer, body: Body = "copy", **how: object
) -> Rewrite:
    rewrite = stream_transfer(open_checkpoint(folder), source, target, **how)[0]
    new.mkdir()
    rewrite.write(new, body=body)
    rewrite.verify(new)
    return rewrite


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return model.state_dict()


def same_model(folder: Path, wanted: PreTrainedModel) -> None:
    """The folder loads whole, and every tensor is that of the model, bit for bit."""
    found, loading = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert state(found).keys() == state(wanted).keys()
    for name, tensor in state(wanted).items():
        assert torch.equal(state(found)[name], tensor.to(state(found)[name].dtype)), name
    assert found.config.vocab_size == wanted.config.vocab_size
    tied = found.get_output_embeddings().weight is found.get_input_embeddings().weight
    assert tied == (wanted.get_output_embeddings().weight is wanted.get_input_embeddings().weight)


def evidence_for(source: Tokenizer, target: Tokenizer, texts: list[str]) -> Evidence:
    sides: tuple[Side, Side] = ("input", "head")
    generator = torch.Generator().manual_seed(1)
    drawn = {side: TensorRows(torch.randn(target.vocab_size - 2, 6, generator=generator)) for side in sides}
    return Evidence(source, target, drawn, Texts(texts))


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize(("tied", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_streamed_and_in_memory_are_one(
    tokenizers: dict[str, Tokenizer],
    corpus: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    tied: bool,
    dtype: torch.dtype,
) -> None:
    source, target = tokenizers["marked"], tokenizers["large"]
    monkeypatch.setattr(rows, "BLOCK_BYTES", 60_000)  # several blocks
    folder = saved(tmp_path / "old", source, shard="60KB", tie_word_embeddings=tied, dtype=dtype)
    how = {"choice": Choice(name, seed=4), "pad_to_multiple_of": 64}
    streamed(folder, tmp_path / "new", source, target, evidence=evidence_for(source, target, corpus), **how)
    model = load_model(str(folder))
    transfer_model(model, source, target, evidence=evidence_for(source, target, corpus), **how)
    same_model(tmp_path / "new", model)


@pytest.mark.parametrize("shard", ["1GB", "30KB"])
@pytest.mark.parametrize("body", ["copy", "hardlink"])
def test_all_else_is_left_alone(tokenizers: dict[str, Tokenizer], tmp_path: Path, shard: str, body: Body) -> None:
    source, target = tokenizers["small"], tokenizers["large"]
    folder, new = saved(tmp_path / "old", source, shard=shard), tmp_path / "new"
    (folder / "LICENSE.txt").write_text("as it is")
    (folder / "tokenizer.json").write_text("the old one")
    rewrite = streamed(folder, new, source, target, body=body)
    before, after = open_checkpoint(folder), open_checkpoint(new)
    tables = {before.tables.input, before.tables.head}
    assert before.entries.keys() == after.entries.keys()
    for path, header in before.files.items():
        touched = any(entry.name in tables for entry in header.entries)
        old, now = load_file(path), load_file(new / path.name)
        assert [entry.name for entry in after.files[new / path.name].entries] == [e.name for e in header.entries]
        assert all(torch.equal(old[name], now[name]) for name in old if name not in tables)
        if not touched:
            assert (new / path.name).read_bytes() == path.read_bytes()
        assert (os.stat(path).st_ino == os.stat(new / path.name).st_ino) == (body == "hardlink" and not touched)
    assert (new / "LICENSE.txt").read_text() == "as it is"
    assert not (new / "tokenizer.json").exists()
    load_model(str(new)).save_pretrained(tmp_path / "again", max_shard_size=shard)
    if shard == "30KB":
        index, theirs = (
            json.loads((f / "model.safetensors.index.json").read_text()) for f in (new, tmp_path / "again")
        )
        assert index["metadata"] == theirs["metadata"]
        assert index["weight_map"].keys() == theirs["weight_map"].keys()
        assert {new / name for name in index["weight_map"].values()} == set(after.files)
    assert rewrite.size == target.vocab_size


@pytest.mark.parametrize("twin", [None, 0.0, 1.0])
@pytest.mark.parametrize("untie", [True, False])
def test_tied_untied_and_stored_twice(
    tokenizers: dict[str, Tokenizer], tmp_path: Path, twin: float | None, untie: bool
) -> None:
    """Also for a file that holds the tied head too, and for one whose head is another than its configuration says."""
    source, target = tokenizers["large"], tokenizers["one_role"]
    folder = saved(tmp_path / "old", source, tie_word_embeddings=True)
    if twin is not None:
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + twin
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    streamed(folder, tmp_path / "new", source, target, untie=untie)
    model = load_model(str(folder))
    transfer_model(model, source, target, untie=untie)
    same_model(tmp_path / "new", model)
    stored = load_file(tmp_path / "new/model.safetensors")
    assert ("lm_head.weight" in stored) == (untie or twin == 1.0)  # a tied matrix is saved once
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert config["tie_word_embeddings"] == ("lm_head.weight" not in stored)


def test_a_matrix_that_bears_the_name_of_the_head_can_be_untied(
    tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    source, target = tokenizers["large"], tokenizers["one_role"]
    folder = saved(tmp_path / "old", source, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for untie in (True, False):
        streamed(folder, tmp_path / f"new{untie}", source, target, untie=untie)
        model = load_model(str(folder))
        transfer_model(model, source, target, untie=untie)
        same_model(tmp_path / f"new{untie}", model)


def test_a_bias_and_a_nested_configuration(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    source, target = tokenizers["small"], tokenizers["large"]
    biased = GPTJForCausalLM(GPTJConfig(vocab_size=source.vocab_size, n_embd=32, n_layer=1, n_head=2, rotary_dim=8))
    torch.nn.init.normal_(biased.lm_head.bias)
    text = {**SIZES, "vocab_size": source.vocab_size, "num_key_value_heads": 1, "head_dim": 8}
    vision = {**SIZES, "image_size": 28, "patch_size": 14}
    ids = {"image_token_index": source.special_tokens["<|p|>"], "boi_token_index": 250}
    nested = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **ids))
    for number, model in enumerate((biased, nested)):
        old, new = tmp_path / f"old{number}", tmp_path / f"new{number}"
        model.save_pretrained(old)
        rewrite = streamed(old, new, source, target, pad_to_multiple_of=8)
        model = load_model(str(old))
        transfer_model(model, source, target, pad_to_multiple_of=8)
        found = load_model(str(new))
        assert all(torch.equal(tensor, state(model)[name]) for name, tensor in state(found).items())
    config = json.loads((tmp_path / "new1/config.json").read_text())
    assert config["text_config"]["vocab_size"] == rewrite.size
    assert config["text_config"]["eos_token_id"] == config["eos_token_id"] == target.eos_id
    assert config["image_token_index"] == target.special_tokens["<|p|>"]  # a special token that both have
    assert rewrite.settings.left  # and those that the target has no token for are named
    assert "vocab_size" not in config


def test_settings_keep_what_is_not_about_the_vocabulary(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    source, target = tokenizers["small"], tokenizers["one_role"]
    folder = saved(tmp_path / "old", source)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mine": {"a": [1]}, "bad_words_ids": [[3]]}))
    generation = {"temperature": 0.7, "suppress_tokens": [1], "eos_token_id": [1, 2], "forced_eos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    rewrite = streamed(folder, tmp_path / "new", source, target, pad_to_multiple_of=64)
    found = json.loads((tmp_path / "new/config.json").read_text())
    ids = {"bos_token_id": target.bos_id, "eos_token_id": target.eos_id, "pad_token_id": target.eos_id}
    assert found == config | {"mine": {"a": [1]}, "vocab_size": rewrite.size} | ids
    assert list(found)[: len(config) - 1] == list(config)[: len(config) - 1]  # in the order that it had
    empty = empty_ids(target, rewrite.size)
    assert set(range(target.vocab_size, rewrite.size)) <= set(empty)
    wanted = {"temperature": 0.7, "suppress_tokens": empty, **ids}
    assert json.loads((tmp_path / "new/generation_config.json").read_text()) == wanted
    model = load_model(str(tmp_path / "new"))
    with torch.no_grad():
        model.lm_head.weight[target.vocab_size :] = 100 * model.lm_head.weight.abs().max()  # would win if they could
    written = model.generate(torch.tensor([[5]]), max_new_tokens=12, do_sample=False)
    assert int(written.max()) < target.vocab_size


def test_what_a_disk_gives_back_wrongly_is_seen(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    source, target = tokenizers["small"], tokenizers["large"]
    rewrite = streamed(saved(tmp_path / "old", source), tmp_path / "new", source, target)
    path = tmp_path / "new/model.safetensors"
    good = path.read_bytes()
    entries = open_checkpoint(tmp_path / "new").entries
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        spoilt = bytearray(good)
        spoilt[entries[name].begin + 2] ^= 1
        path.write_bytes(spoilt)
        with pytest.raises(UserError, match=rf"{name}.* is not what |of {name} are not what was written"):
            rewrite.verify(tmp_path / "new")
    path.write_bytes(good)
    rewrite.verify(tmp_path / "new")
