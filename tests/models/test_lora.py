"""Adapters agree with PEFT in both directions, vanish when disabled, and merge without a change of answers."""

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenkit.config import UserError
from tokenkit.models.lora import adapters, attach_lora, load_lora, lora_disabled, merge_lora, save_lora

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks
IDS = torch.arange(3, 15)[None]


def tiny(**options: object) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, attention_bias=True, **sizes, **options)).eval()


def adapted(targets: list[str] | str = "all-linear") -> LlamaForCausalLM:
    """A tiny model with adapters that do something."""
    model = tiny()
    attach_lora(model, rank=4, alpha=6.0, targets=targets)
    for layer in adapters(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.3)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_fresh_adapters_change_nothing_and_all_linear_leaves_the_head_out() -> None:
    model = tiny()
    names = attach_lora(model, rank=4, alpha=8)
    assert len(names) == 2 * 7
    assert not any("lm_head" in name for name in names)
    assert torch.equal(logits(model), logits(tiny()))


def test_targets_are_last_names_or_globs() -> None:
    assert attach_lora(tiny(), rank=2, alpha=2, targets=["q_proj"]) == [
        f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)
    ]
    assert attach_lora(tiny(), rank=2, alpha=2, targets=["model.layers.1.*.up_proj"]) == ["model.layers.1.mlp.up_proj"]
    with pytest.raises(UserError, match=r"'w_proj' is no linear layer here; known: down_proj, gate_proj, k_proj"):
        attach_lora(tiny(), rank=2, alpha=2, targets=["q_proj", "w_proj"])
    with pytest.raises(UserError, match="'lm_head' is no linear layer here"):
        attach_lora(tiny(), rank=2, alpha=2, targets=["lm_head"])


def test_base_weights_keep_their_names_in_the_state_dict() -> None:
    plain, names = tiny().state_dict(), adapted().state_dict()
    added = {name for name in names if ".lora_" in name}
    assert names.keys() - added == plain.keys()
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in added
    assert names["model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 32)


def test_only_adapters_get_gradients() -> None:
    model = adapted()
    model(IDS, labels=IDS).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name in model.state_dict() if ".lora_" in name}


def test_disabled_is_the_base_model_exactly_and_the_state_comes_back() -> None:
    model = adapted()
    before = logits(model)
    with lora_disabled(model):
        assert torch.equal(logits(model), logits(tiny()))
        with lora_disabled(model):
            pass
        assert torch.equal(logits(model), logits(tiny()))
    assert torch.equal(logits(model), before)
    assert not torch.allclose(before, logits(tiny()), atol=1e-2)


def test_merged_answers_as_unmerged_with_plain_layers() -> None:
    model = adapted()
    before = logits(model)
    merge_lora(model)
    assert not adapters(model)
    assert model.state_dict().keys() == tiny().state_dict().keys()
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-4)


def test_adapters_of_a_half_precision_model_are_float32() -> None:
    model = tiny().to(torch.bfloat16)
    attach_lora(model, rank=2, alpha=4)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.lora_A.weight.dtype == torch.float32
    assert layer(torch.ones(1, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "model.layers.1.mlp.down_proj"]])
def test_peft_loads_what_we_write(tmp_path: Path, targets: list[str] | str) -> None:
    model = adapted(targets)
    save_lora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(), str(tmp_path)).eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-4)
    settings = peft.LoraConfig.from_pretrained(str(tmp_path))
    assert (settings.r, settings.lora_alpha, len(settings.target_modules)) == (4, 6.0, len(adapters(model)))


def test_we_load_what_peft_writes(tmp_path: Path) -> None:
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["v_proj", "gate_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(tiny(), settings).eval()
    theirs.save_pretrained(tmp_path)
    ours = tiny()
    assert len(load_lora(ours, tmp_path)) == 4
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-4)


def test_save_and_load_is_exact(tmp_path: Path) -> None:
    model, again = adapted(["k_proj"]), tiny()
    save_lora(model, tmp_path)
    load_lora(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_adapters_that_are_not_plain_lora_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no adapter_config\.json inside"):
        load_lora(tiny(), tmp_path)
    save_lora(adapted(), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    with pytest.raises(UserError, match="use_dora is True"):
        load_lora(tiny(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"r": 8}))
    with pytest.raises(UserError, match="belong to another model"):
        load_lora(tiny(), tmp_path)
    with pytest.raises(UserError, match="no adapters to save"):
        save_lora(tiny(), tmp_path)
