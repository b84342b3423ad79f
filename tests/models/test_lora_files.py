"""Adapters go both ways between here and PEFT with the same answers, whatever kind they are."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tokenkit.config import UserError
from tokenkit.models.adapter import merge_adapter, read_adapter
from tokenkit.models.lora import adapters, attach_lora, merge_lora
from tokenkit.models.lora_files import load_lora, save_lora

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft asks
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*ensure_weight_tying:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]
IDS = torch.arange(3, 15)[None]


def tiny(family: str = "llama", **options: object) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, attention_bias=True, **sizes, **options)).eval()


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """Moves everything that is trained."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


OURS = {
    "plain": ("llama", {}),
    "some": ("llama", {"targets": ["q_proj", "model.layers.1.mlp.down_proj"], "layers": ["1"]}),
    "rank-stabilised": ("llama", {"rslora": True}),
    "DoRA": ("llama", {"dora": True}),
    "all of it": ("llama", {"dora": True, "rslora": True, "modules_to_save": ["norm", "model.layers.1.mlp"]}),
    "transposed": ("gpt2", {}),
    "transposed DoRA": ("gpt2", {"dora": True, "modules_to_save": ["ln_f"]}),
}


@pytest.mark.parametrize("kind", OURS)
def test_peft_loads_what_we_write(tmp_path: Path, kind: str) -> None:
    family, options = OURS[kind]
    model = tiny(family)
    attach_lora(model, rank=4, alpha=6.0, **options)
    expected = logits(moved(model))
    save_lora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(family), str(tmp_path)).eval()
    torch.testing.assert_close(logits(theirs), expected, atol=1e-5, rtol=1e-5)
    settings = peft.LoraConfig.from_pretrained(str(tmp_path))
    assert (settings.r, settings.lora_alpha, len(settings.target_modules)) == (4, 6.0, len(adapters(model)))
    merged, again = tiny(family), tiny(family)
    merge_adapter(merged, read_adapter(tmp_path))
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    load_lora(again, tmp_path)
    assert torch.equal(logits(again), expected)
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    merge_lora(model)
    torch.testing.assert_close(logits(theirs.merge_and_unload()), logits(model), atol=1e-5, rtol=1e-5)


THEIRS = {
    "plain": ("llama", {"target_modules": ["v_proj", "gate_proj"]}),
    "rank-stabilised": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "DoRA": ("llama", {"target_modules": ["v_proj", "gate_proj"], "use_dora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"layers.1.mlp.up_proj": 2},
            "alpha_pattern": {"q_proj": 3},
        },
    ),
    "whole modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("kind", THEIRS)
def test_we_load_what_peft_writes_and_write_it_again(tmp_path: Path, kind: str) -> None:
    family, settings = THEIRS[kind]
    config = peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **settings)
    theirs = moved(peft.get_peft_model(tiny(family), config))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = tiny(family)
    names = load_lora(ours, tmp_path / "theirs")
    assert names == list(adapters(ours))
    assert len(names) == sum(name.endswith("lora_A.default") for name, _ in theirs.named_modules())
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    save_lora(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny(family), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(again), logits(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_go_along(tmp_path: Path, tied: bool, untied: bool) -> None:
    """A grown vocabulary, of a model with one table or two; `untied` is one that was given a second."""
    model = tiny(tie_word_embeddings=tied)
    if untied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
    model.resize_token_embeddings(101, mean_resizing=False)
    attach_lora(model, rank=2, alpha=4)
    model.get_input_embeddings().weight.requires_grad_(True)
    model.get_output_embeddings().weight.requires_grad_(True)
    ids = torch.tensor([[100, 3, 97]])
    expected = logits(moved(model), ids)
    save_lora(model, tmp_path, base="somewhere")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tables = {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}
    assert {name for name in tensors if ".lora_" not in name} == tables
    merged = tiny(tie_word_embeddings=tied)
    merge_adapter(merged, read_adapter(tmp_path))
    torch.testing.assert_close(logits(merged, ids), expected, atol=1e-5, rtol=1e-5)
    one_table = tied and not untied
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == one_table
    assert (merged.config.vocab_size, merged.config.tie_word_embeddings) == (101, one_table)
    ours = tiny(tie_word_embeddings=tied)
    load_lora(ours, tmp_path)
    assert torch.equal(logits(ours, ids), expected)
    base = tiny(tie_word_embeddings=tied)
    if untied and tied:  # PEFT has one table to put both into, unless it is told
        base = tiny(tie_word_embeddings=False)
        base.load_state_dict(tiny(tie_word_embeddings=True).state_dict())
    base.resize_token_embeddings(101, mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    torch.testing.assert_close(logits(theirs, ids), expected, atol=1e-5, rtol=1e-5)
    assert peft.LoraConfig.from_pretrained(str(tmp_path)).base_model_name_or_path == "somewhere"


def test_tables_are_left_out_where_they_are_the_bases(tmp_path: Path) -> None:
    model = tiny()
    attach_lora(model, rank=2, alpha=4)
    save_lora(model, tmp_path / "without")
    save_lora(model, tmp_path / "with", tables=True)
    names = [{*load_file(tmp_path / f"{word}/adapter_model.safetensors")} for word in ("without", "with")]
    assert names[1] - names[0] == {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}


def test_adapters_that_cannot_be_trained_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no adapter_config\.json inside"):
        load_lora(tiny(), tmp_path)
    model = tiny()
    attach_lora(model, rank=2, alpha=4)
    save_lora(model, tmp_path)
    with pytest.raises(UserError, match="already has adapters"):
        load_lora(model, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"bias": "all"}))
    with pytest.raises(UserError, match="bias is 'all', which can be merged"):
        load_lora(tiny(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="is nothing in this model"):
        load_lora(tiny("gpt2"), tmp_path)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    wide = LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes))
    with pytest.raises(UserError, match=r"adapts a matrix of 32 x 64, where the model has 48 x 64; these adapters bel"):
        load_lora(wide, tmp_path)
    with pytest.raises(UserError, match="no adapters to save"):
        save_lora(tiny(), tmp_path)
    config = peft.LoraConfig(target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    with pytest.warns(UserWarning, match="Setting `save_embedding_layers`"):
        peft.get_peft_model(tiny(), config).save_pretrained(tmp_path / "embedding")
    with pytest.raises(UserError, match="is a Embedding in this model, where a linear layer"):
        load_lora(tiny(), tmp_path / "embedding")
