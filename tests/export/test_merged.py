"""Merged adapters answer as adapters beside the base do, by our count and by PEFT's, whatever kind they are."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tokenkit.config import UserError
from tokenkit.export import merged as merging
from tokenkit.export.merged import export_merged
from tokenkit.export.verify import ExportError
from tokenkit.models.adapter import adapted_copy, merge_adapter, read_adapter
from tokenkit.tokenizers.load import load_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft asks
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*ensure_weight_tying:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]
IDS = torch.arange(3, 15)[None]


def tiny(kind: str = "llama", **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=288, n_embd=32, n_layer=2, n_head=2, n_positions=128)).eval()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return LlamaForCausalLM(LlamaConfig(vocab_size=288, attention_bias=True, **sizes, **options)).eval()


def trained(base: torch.nn.Module, **settings: object) -> peft.PeftModel:
    """A PEFT model whose every trainable tensor has moved."""
    wrapped = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, **settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return wrapped


def logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


KINDS = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    "rank-stabilised": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"layers.1.mlp.up_proj": 2},
        "alpha_pattern": {"q_proj": 3},
    },
    "DoRA": {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ["q_proj", "up_proj"]},
    "biases": {"r": 4, "lora_alpha": 6, "bias": "lora_only", "target_modules": ["q_proj", "up_proj"]},
    "whole head": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "adapted embedding": {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_beside_and_peft_are_one(kind: str, tied: bool, tmp_path: Path) -> None:
    theirs = trained(tiny(tie_word_embeddings=tied), **KINDS[kind])
    theirs.save_pretrained(tmp_path / "adapter")
    adapter, base = read_adapter(tmp_path / "adapter"), tiny(tie_word_embeddings=tied)
    expected = logits(theirs)
    beside = adapted_copy(base, adapter)
    torch.testing.assert_close(logits(beside), expected, atol=1e-5, rtol=1e-5)
    merge_adapter(base, adapter)
    torch.testing.assert_close(logits(base), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, logits(tiny(tie_word_embeddings=tied)), atol=1e-2)
    if not tied or kind not in ("whole head", "adapted embedding"):  # there PEFT merges into the other end as well
        torch.testing.assert_close(logits(base), logits(theirs.merge_and_unload()), atol=1e-5, rtol=1e-5)


def test_transposed_matrices_of_gpt2(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        theirs = trained(tiny("gpt2"), r=4, lora_alpha=6, target_modules=["c_attn", "c_fc"])
    theirs.save_pretrained(tmp_path)
    base = tiny("gpt2")
    merge_adapter(base, read_adapter(tmp_path))
    torch.testing.assert_close(logits(base), logits(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_grown_vocabulary(tied: bool, tmp_path: Path) -> None:
    base = tiny(tie_word_embeddings=tied)
    base.resize_token_embeddings(300, mean_resizing=False)
    theirs = trained(base, r=4, lora_alpha=6, target_modules=["q_proj"])
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    ours = tiny(tie_word_embeddings=tied)
    merge_adapter(ours, read_adapter(tmp_path))
    ids = torch.tensor([[295, 3, 299]])
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), atol=1e-5, rtol=1e-5)
    assert (ours.config.vocab_size, ours.config.tie_word_embeddings) == (300, tied)


def test_the_folder_is_an_ordinary_one(tmp_path: Path) -> None:
    theirs = trained(tiny(), **KINDS["whole head"])
    theirs.save_pretrained(tmp_path / "adapter")
    base, tokenizer = tiny(), load_tokenizer("byte")
    before = logits(base)
    figures = export_merged(
        base, read_adapter(tmp_path / "adapter"), tokenizer, tmp_path / "out", max_shard_bytes=50_000
    )
    assert (figures["merged_layers"], figures["whole_tensors"]) == (2, 6)  # the head and five norms
    assert torch.equal(logits(base), before)  # the base is left alone
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(stock), logits(theirs), atol=1e-5, rtol=1e-5)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len({*index["weight_map"].values()}) > 1
    assert not list((tmp_path / "out").glob("adapter*"))


def test_merging_that_changes_the_answers_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tiny(), **KINDS["plain"]).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(merging, "merge_adapter", lambda model, adapter: None)
    with pytest.raises(ExportError, match="merged logits differ"):
        export_merged(tiny(), read_adapter(tmp_path / "adapter"), load_tokenizer("byte"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "only LORA adapters"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"init_lora_weights": "pissa"}, "changed the base as well"),
    ],
)
def test_adapters_of_other_kinds_are_refused(changes: dict, message: str, tmp_path: Path) -> None:
    trained(tiny(), **KINDS["plain"]).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path)


def test_half_an_adapter_is_refused(tmp_path: Path) -> None:
    trained(tiny(), **KINDS["plain"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    gone = next(name for name in tensors if "lora_B" in name)
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != gone}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(UserError, match="not both there"):
        read_adapter(tmp_path)
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_E"] = torch.ones(2)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="no part of LoRA"):
        read_adapter(tmp_path)
