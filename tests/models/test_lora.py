"""Adapters vanish when disabled, merge without a change of answers, and learn as PEFT's do."""

import copy

import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tokenkit.config import UserError
from tokenkit.models.lora import adapters, attach_lora, lora_disabled, merge_lora
from tokenkit.models.lora_whole import whole
from tokenkit.models.view import ModelView

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft asks
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]
IDS = torch.arange(3, 15)[None]
FAMILIES = ["llama", "gpt2"]
KINDS = {
    "plain": {},
    "rank-stabilised": {"rslora": True},
    "DoRA": {"dora": True},
    "DoRA, rank-stabilised": {"dora": True, "rslora": True},
}


def tiny(family: str = "llama", **options: object) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, attention_bias=True, **sizes, **options)).eval()


def adapted(family: str = "llama", **options: object) -> PreTrainedModel:
    """A tiny model with adapters, and modules trained whole, that do something."""
    model = tiny(family)
    attach_lora(model, **{"rank": 4, "alpha": 6.0} | options)
    moved(model)
    return model


def moved(model: torch.nn.Module) -> None:
    """Moves everything that is trained."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapters_change_nothing_and_all_linear_leaves_the_head_out(family: str, kind: str) -> None:
    model = tiny(family)
    names = attach_lora(model, rank=4, alpha=8, **KINDS[kind])
    assert len(names) == 2 * {"llama": 7, "gpt2": 4}[family]
    assert not any("lm_head" in name for name in names)
    assert torch.equal(logits(model), logits(tiny(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_base_weights_keep_their_names_in_the_state_dict(family: str) -> None:
    plain, names = tiny(family).state_dict(), adapted(family, modules_to_save=["norm" if family == "llama" else "ln_f"])
    added = {name for name in names.state_dict() if ".lora_" in name}
    assert names.state_dict().keys() - added == plain.keys()
    name = {"llama": "model.layers.0.self_attn.q_proj", "gpt2": "transformer.h.0.attn.c_attn"}[family]
    assert names.state_dict()[f"{name}.lora_A.weight"].shape == (4, 32)
    assert names.state_dict()[f"{name}.lora_B.weight"].shape[0] == {"llama": 32, "gpt2": 96}[family]


@pytest.mark.parametrize("dora", [False, True])
def test_only_adapters_get_gradients(dora: bool) -> None:
    model = adapted(dora=dora)
    model(IDS, labels=IDS).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name in model.state_dict() if ".lora_" in name}
    assert any("magnitude" in name for name in with_gradient) == dora


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_disabled_is_the_base_model_exactly_and_the_state_comes_back(family: str, kind: str) -> None:
    model, base = adapted(family, **KINDS[kind]), logits(tiny(family))
    before = logits(model)
    with lora_disabled(model):
        assert torch.equal(logits(model), base)
        with lora_disabled(model):
            pass
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), before)
    assert not torch.allclose(before, base, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_answers_as_unmerged_with_plain_layers(family: str, kind: str) -> None:
    saved = {"llama": ["norm", "down_proj"], "gpt2": ["ln_f", "h.1.mlp"]}[family]
    saved = [f"transformer.{name}" if name.startswith("h.") else name for name in saved]
    model = adapted(family, modules_to_save=saved, **KINDS[kind])
    before = logits(model)
    merge_lora(model)
    assert not adapters(model)
    assert not whole(model)
    assert model.state_dict().keys() == tiny(family).state_dict().keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in tiny(family).modules()]
    assert not any(name.rpartition(".")[2].startswith("_original") for name, _ in model.named_buffers())
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)


def theirs_like(ours: PreTrainedModel, family: str, **options: object) -> peft.PeftModel:
    """PEFT's adapters on the same base, with the same values."""
    settings = {"r": 4, "lora_alpha": 6.0, "use_rslora": options.get("rslora", False)}
    settings |= {"use_dora": options.get("dora", False), "fan_in_fan_out": family == "gpt2"}
    targets = list(adapters(ours))
    model = peft.get_peft_model(tiny(family), peft.LoraConfig(target_modules=targets, **settings))
    own = ours.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                plain = name.removeprefix("base_model.model.").replace(".default", "")
                parameter.copy_(own[plain.replace("magnitude_vector.weight", "magnitude_vector")])
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_and_gradients_are_those_of_peft(family: str, kind: str) -> None:
    ours = adapted(family, **KINDS[kind])
    theirs = theirs_like(ours, family, **KINDS[kind])
    torch.testing.assert_close(logits(ours), logits(theirs.eval()), atol=1e-5, rtol=1e-5)
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    found = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    compared = 0
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            other = "base_model.model." + name.replace("_A.", "_A.default.").replace("_B.", "_B.default.")
            other = other.replace("magnitude_vector", "magnitude_vector.default.weight")
            torch.testing.assert_close(parameter.grad, found[other], atol=1e-6, rtol=1e-4)
            compared += 1
    assert compared == len(found) > 0


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_draws_as_peft_does(dora: bool) -> None:
    ours = adapted(dora=dora)
    theirs = theirs_like(ours, "llama", dora=dora)
    for layer in adapters(ours).values():
        layer.dropout.p = 0.5
    for name, module in theirs.named_modules():
        if name.endswith("lora_dropout"):
            module["default"] = torch.nn.Dropout(0.5)
    found = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(3)
        found.append(logits(model))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[0], logits(ours.eval()), atol=1e-2)


def test_rank_stabilised_scales_by_the_root_of_the_rank() -> None:
    layer = next(iter(adapters(adapted(rslora=True)).values()))
    assert layer.scale == 6.0 / 2.0


def test_a_row_of_zeros_stays_one_under_dora() -> None:
    model = tiny()
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.up_proj").weight[3] = 0
    base = logits(model)
    attach_lora(model, rank=2, alpha=2, dora=True)
    assert torch.equal(logits(model), base)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    merge_lora(model)
    torch.testing.assert_close(logits(model), base, atol=1e-5, rtol=1e-5)


def test_modules_trained_whole_are_the_original_to_a_teacher() -> None:
    """Norms, a whole block, and a matrix: 20 steps later the body without adapters answers as before, to the bit."""
    model, ids = tiny(), IDS.repeat(2, 1)
    attach_lora(model, rank=4, alpha=8, dora=True, modules_to_save=["norm", "model.layers.1.mlp", "o_proj"])
    assert not any(".mlp." in name for name in adapters(model) if name.startswith("model.layers.1"))
    assert not any("o_proj" in name for name in adapters(model))
    teacher = ModelView(model, adapters=False)
    needs = {"logits", "hidden", "layers"}
    before = teacher.leaves(needs, ids, ids)
    assert torch.equal(before["logits"], logits(tiny()).repeat(2, 1, 1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(20):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(logits(model), logits(tiny()), atol=1e-2)
    after = teacher.leaves(needs, ids, ids)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    changed = model.get_submodule("model.layers.1.mlp.up_proj").weight
    assert not torch.equal(changed, tiny().get_submodule("model.layers.1.mlp.up_proj").weight)
    duplicate = copy.deepcopy(model)
    moved(model)
    with lora_disabled(duplicate):
        assert torch.equal(logits(duplicate), logits(tiny()))


def test_without_originals_nothing_is_kept() -> None:
    model = tiny()
    attach_lora(model, rank=2, alpha=2, modules_to_save=["norm"], originals=False)
    assert not whole(model)
    assert not [name for name, _ in model.named_buffers() if "_original" in name]
    assert model.get_parameter("model.norm.weight").requires_grad


def test_adapters_of_a_half_precision_model_are_float32() -> None:
    model = tiny().to(torch.bfloat16)
    attach_lora(model, rank=2, alpha=4, dora=True)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.lora_A.weight.dtype == layer.lora_magnitude_vector.dtype == torch.float32
    assert layer(torch.ones(1, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_second_set_of_adapters_is_refused() -> None:
    with pytest.raises(UserError, match="already has adapters"):
        attach_lora(adapted(), rank=2, alpha=2)
    with pytest.raises(UserError, match="lora rank: 0"):
        attach_lora(tiny(), rank=0, alpha=2)
