"""Models made ternary: what is converted, with which norms, how fast; what training them looks like from outside."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import (
    BitNetConfig,
    BitNetForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tokenkit.config import UserError, build
from tokenkit.models.bitlinear import TernaryLinear, ternary_layers
from tokenkit.models.load import head_matrix, input_matrix, load_model
from tokenkit.models.lora import attach_lora
from tokenkit.models.sub_norm import measured_gains, output_places
from tokenkit.models.ternary import TernaryConfig, attach_ternary, set_strength, strength_at
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.load import load_tokenizer

IDS = torch.arange(3, 19).view(2, 8)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96}
IDLE = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def model_of(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval()


def llama(**options: Any) -> PreTrainedModel:
    return model_of(LlamaForCausalLM, LlamaConfig(**{**SIZES, "intermediate_size": 48, **options}))


def gpt2() -> PreTrainedModel:
    return model_of(GPT2LMHeadModel, GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, **IDLE))


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def plain(**options: Any) -> TernaryConfig:
    return TernaryConfig(sub_norm="none", **options)


@pytest.mark.parametrize("kind", ["linear", "exponential", "sigmoid"])
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_the_warmup_rises_from_0_to_exactly_1_and_stays(kind: Any, steps: int) -> None:
    config = TernaryConfig(warmup=kind, warmup_steps=steps)
    course = [strength_at(config, step) for step in range(steps + 3)]
    assert course[0] == pytest.approx(0, abs=1e-12)
    assert course[steps:] == [1.0, 1.0, 1.0]
    assert all(a < b for a, b in pairwise(course[: steps + 1]))
    assert all(0 <= value <= 1 for value in course)


def test_courses_of_the_warmup() -> None:
    halfway = {
        k: strength_at(TernaryConfig(warmup=k, warmup_steps=10), 5) for k in ("linear", "exponential", "sigmoid")
    }
    assert halfway == pytest.approx({"linear": 0.5, "exponential": 0.9241418, "sigmoid": 0.5}, abs=1e-7)
    assert strength_at(TernaryConfig(), 0) == 1.0  # abrupt


def test_every_linear_layer_but_the_head_becomes_ternary_over_the_same_weights() -> None:
    model = llama(tie_word_embeddings=True)
    before = dict(model.named_parameters())
    report = attach_ternary(model, plain(warmup_steps=10))
    assert len(report.converted) == 2 * 7
    assert report.kept == ("lm_head",)
    assert dict(model.named_parameters()) == before  # the objects
    assert head_matrix(model) is input_matrix(model)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.ternary_weights == 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert report.sentence() == (
        f"ternary: 14 linear layers (17,408 of {report.parameters:,} weights, {17408 / report.parameters:.1%}); 1 kept"
    )
    assert torch.equal(logits(model), logits(llama(tie_word_embeddings=True)))  # the warm-up begins at 0
    set_strength(model, 1.0)
    assert not torch.allclose(logits(model), logits(llama(tie_word_embeddings=True)), atol=1e-2)


def test_gpt2s_transposed_layers_are_converted_too() -> None:
    model = gpt2()
    report = attach_ternary(model, plain(warmup_steps=10))
    assert len(report.converted) == 2 * 4
    layer = model.get_submodule("transformer.h.0.attn.c_attn")
    assert isinstance(layer, TernaryLinear)
    assert layer.weight.shape == (96, 32)
    torch.testing.assert_close(logits(model), logits(gpt2()), atol=1e-5, rtol=1e-5)


def test_latent_weights_of_a_half_precision_model_are_float32() -> None:
    model = llama().to(torch.bfloat16)
    attach_ternary(model, TernaryConfig(calibrate=False))
    layer = ternary_layers(model)["model.layers.0.mlp.down_proj"]
    assert layer.weight.dtype == layer.norm.weight.dtype == torch.float32
    assert torch.equal(layer.weight, llama().to(torch.bfloat16).model.layers[0].mlp.down_proj.weight.float())
    assert logits(model).isfinite().all()


def test_what_is_skipped_is_named_by_its_last_part_or_by_a_glob() -> None:
    model = llama()
    report = attach_ternary(model, plain(skip=["down_proj", "model.layers.1.self_attn.*"]))
    assert len(report.converted) == 14 - 2 - 4
    assert set(report.kept) >= {"lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"}
    with pytest.raises(UserError, match=r"ternary\.skip: 'fc1' is no linear layer here; known: down_proj, gate_proj"):
        attach_ternary(llama(), plain(skip=["fc1"]))
    with pytest.raises(UserError, match="none of the 15 linear layers of this llama model"):
        attach_ternary(llama(), plain(skip=["model.*"]))


def test_layers_that_share_weights_go_on_sharing_them() -> None:
    model = llama()
    model.model.layers[1] = model.model.layers[0]
    report = attach_ternary(model, plain())
    assert len(report.converted) == 7
    assert model.model.layers[1].mlp.up_proj is model.model.layers[0].mlp.up_proj
    assert isinstance(model.model.layers[1].mlp.up_proj, TernaryLinear)
    tied = llama()
    tied.model.layers[1].mlp.up_proj.weight = tied.model.layers[0].mlp.up_proj.weight
    report = attach_ternary(tied, plain())
    assert tied.model.layers[1].mlp.up_proj.weight is tied.model.layers[0].mlp.up_proj.weight
    assert report.ternary_weights == 2 * (4 * 32 * 32 + 3 * 32 * 48) - 32 * 48


def test_routers_stay_and_stacked_experts_have_to_be_left_out_by_name() -> None:
    sizes = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    experts = ["*.experts.down_proj", "*.experts.gate_up_proj"]
    with pytest.raises(UserError, match=r"one tensor.*; write ternary\.skip: \[.\*\.experts\.down_proj.*gate_up_proj"):
        attach_ternary(model_of(MixtralForCausalLM, MixtralConfig(**sizes, num_local_experts=4)), plain())
    model = model_of(MixtralForCausalLM, MixtralConfig(**sizes, num_local_experts=4))
    assert len(attach_ternary(model, plain(skip=experts)).converted) == 2 * 4
    config = Qwen2MoeConfig(**sizes, num_experts=4, shared_expert_intermediate_size=48, decoder_sparse_step=1)
    report = attach_ternary(model_of(Qwen2MoeForCausalLM, config), plain(skip=experts))
    assert len(report.converted) == 2 * (4 + 3)
    assert set(report.kept) == {"lm_head", *(f"model.layers.{i}.mlp.shared_expert_gate" for i in (0, 1))}


FAMILIES = {
    "llama": (llama, "self_attn.o_proj", "mlp.down_proj"),
    "gpt2": (gpt2, "attn.c_proj", "mlp.c_proj"),
    "square": (  # as wide inside the MLP as outside
        lambda: model_of(LlamaForCausalLM, LlamaConfig(**SIZES, intermediate_size=32)),
        "self_attn.o_proj",
        "mlp.down_proj",
    ),
    "qwen3": (  # heads together wider than the residual stream
        lambda: model_of(
            Qwen3ForCausalLM, Qwen3Config(**SIZES, intermediate_size=48, head_dim=24, num_key_value_heads=1)
        ),
        "self_attn.o_proj",
        "mlp.down_proj",
    ),
    "gemma2": (
        lambda: model_of(Gemma2ForCausalLM, Gemma2Config(**SIZES, intermediate_size=48, num_key_value_heads=1)),
        "self_attn.o_proj",
        "mlp.down_proj",
    ),
    "phi": (
        lambda: model_of(PhiForCausalLM, PhiConfig(**SIZES, intermediate_size=64, **IDLE)),
        "self_attn.dense",
        "mlp.fc2",
    ),
    "phi3": (
        lambda: model_of(Phi3ForCausalLM, Phi3Config(**SIZES, intermediate_size=64, **IDLE)),
        "self_attn.o_proj",
        "mlp.down_proj",
    ),
    "gpt_neox": (
        lambda: model_of(GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES, intermediate_size=64, **IDLE)),
        "attention.dense",
        "mlp.dense_4h_to_h",
    ),
    "falcon": (
        lambda: model_of(FalconForCausalLM, FalconConfig(**SIZES, **IDLE)),
        "self_attention.dense",
        "mlp.dense_4h_to_h",
    ),
    "opt": (
        lambda: model_of(OPTForCausalLM, OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, **IDLE)),
        "self_attn.out_proj",
        "fc2",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_go_where_attention_and_mlp_end(family: str) -> None:
    make, attention, mlp = FAMILIES[family]
    model = make()
    places = output_places(model)
    blocks = sorted({name.removesuffix(attention) for name in places if name.endswith(attention)})
    assert len(blocks) == 2
    assert places == [f"{block}{end}" for block in blocks for end in (attention, mlp)]
    report = attach_ternary(model, TernaryConfig(), calibration=[IDS[:1]])
    assert report.norms == tuple(places)
    assert len(report.converted) > 4
    layer = ternary_layers(model)[places[0]]
    assert layer.norm.weight.shape == (layer.in_features,)
    model(input_ids=IDS).logits.sum().backward()
    assert all(layer.norm.weight.grad.isfinite().all() for layer in ternary_layers(model).values() if layer.norm)


def test_where_the_places_are_not_known_it_says_so() -> None:
    model = model_of(MambaForCausalLM, MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, state_size=4))
    with pytest.raises(UserError, match=r"end is not known in mamba; write sub_norm: every, or none"):
        attach_ternary(model, TernaryConfig())
    assert not ternary_layers(model)


def test_gains_are_the_mean_root_mean_square_of_what_the_places_read() -> None:
    model = llama()
    with torch.no_grad():
        seen: list[Tensor] = []
        handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
        model(input_ids=IDS)
        handle.remove()
    expected = seen[0].square().mean(-1).sqrt().mean()
    found = measured_gains(model.train(), ["model.layers.1.mlp.down_proj"], [IDS[:1], IDS[1:]])
    assert found["model.layers.1.mlp.down_proj"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert model.training
    report = attach_ternary(model, TernaryConfig(), calibration=[IDS[:1], IDS[1:]])
    gains = ternary_layers(model)["model.layers.1.mlp.down_proj"].norm.weight
    torch.testing.assert_close(gains, torch.full((48,), expected.item()))
    assert report.calibration_tokens == IDS.numel()


@pytest.mark.parametrize("places", ["o_down", "every"])
def test_norms_destroy_what_a_model_computes_and_calibration_keeps_most_of_it(shared: Any, places: Any) -> None:
    """A real pretrained model, before any rounding: cosine with the logits it had, and agreement on the best token."""
    source = str(shared / "data/weights/stories260K")
    text = (shared / "data/corpora/tinystories/valid.txt").read_text("utf-8")
    tokenizer = load_tokenizer(source)
    rows = [torch.tensor(tokenizer.encode(text[i * 800 : (i + 1) * 800]).ids[:200]).long()[None] for i in range(6)]

    def said(model: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(input_ids=row).logits[0] for row in rows[4:]])

    before = said(load_model(source))
    agreement = {}
    for calibrate in (False, True):
        model = load_model(source)
        config = TernaryConfig(sub_norm=places, calibrate=calibrate, warmup_steps=1)
        attach_ternary(model, config, calibration=rows[:4])
        after = said(model)
        cosine = torch.cosine_similarity(after, before, dim=-1).mean().item()
        agreement[calibrate] = (cosine, (after.argmax(-1) == before.argmax(-1)).float().mean().item())
    assert agreement[False][0] < 0.96 < 0.985 < agreement[True][0]
    assert agreement[False][1] < 0.25 < 0.75 < agreement[True][1]


def test_what_cannot_be_converted_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="needs texts to measure gains on"):
        attach_ternary(llama(), TernaryConfig())
    adapted = llama()
    attach_lora(adapted, rank=2, alpha=2)
    with pytest.raises(UserError, match="has LoRA adapters; merge them first"):
        attach_ternary(adapted, plain())
    with pytest.raises(UserError, match=r"saved_int8 keeps int8 activations; write activation_bits: 8"):
        build(TernaryConfig, {"activation_bits": None, "backward": "saved_int8"})
    with pytest.raises((UserError, ValidationError), match="warmup_steps"):
        build(TernaryConfig, {"warmup_steps": -1})
    with pytest.raises(ValueError, match=r"from 0 to 1, not 1\.5"):
        set_strength(llama(), 1.5)
    model = llama()
    attach_ternary(model, plain())
    with pytest.raises(UserError, match="ternary already, without norms; write sub_norm: none"):
        attach_ternary(model, TernaryConfig())


def test_a_ternary_model_is_trained_on_with_its_layers_and_norms() -> None:
    model = llama()
    first = attach_ternary(model, TernaryConfig(), calibration=[IDS[:1]])
    layers, before = ternary_layers(model), logits(model)
    again = attach_ternary(model, TernaryConfig(backward="saved_int8", seed=3))
    assert ternary_layers(model) == layers
    assert (again.converted, again.norms, again.kept) == (first.converted, first.norms, first.kept)
    assert {(layer.backward, layer.seed, layer.strength) for layer in layers.values()} == {("saved_int8", 3, 1.0)}
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)


def test_a_bitnet_model_has_norms_of_its_own() -> None:
    """What a model with norms before `o_proj` and `down_proj` is saved as."""
    config = BitNetConfig(**SIZES, intermediate_size=48, num_key_value_heads=2)
    with pytest.raises(UserError, match="has these norms already; write sub_norm: none"):
        attach_ternary(model_of(BitNetForCausalLM, config), TernaryConfig())
    model = model_of(BitNetForCausalLM, config)
    attach_ternary(model, plain())
    assert len(attach_ternary(model, TernaryConfig(backward="int8")).converted) == 14
    with pytest.raises(UserError, match="ternary already, without norms"):
        attach_ternary(model, TernaryConfig(sub_norm="every"))


def test_converting_draws_nothing_and_is_the_same_every_time() -> None:
    before = torch.random.get_rng_state()
    models = [llama(), llama()]
    for model in models:
        attach_ternary(model, TernaryConfig(), calibration=[IDS[:1]])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(logits(models[0]), logits(models[1]))


def test_a_view_of_a_ternary_model_in_bfloat16_and_with_gradient_checkpointing() -> None:
    found = {}
    for recompute in (False, True):
        model = llama().train()
        attach_ternary(model, TernaryConfig(backward="saved_int8"), calibration=[IDS[:1]])
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", torch.bfloat16):
            leaves = ModelView(model).leaves({"label_logp"}, IDS, IDS)
        leaves["label_logp"].sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        found[recompute] = [p.grad for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(found[False], found[True], strict=True))


def test_a_state_dict_brings_a_ternary_model_back() -> None:
    model, other = llama(), llama()
    attach_ternary(model, TernaryConfig(), calibration=[IDS[:1]])
    attach_ternary(other, TernaryConfig(calibrate=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def learnt(backward: Any, steps: int) -> float:
    """Mean loss of the last 20 steps of a tiny ternary model that learns which id follows which (nine times in ten)."""
    model = llama(num_hidden_layers=1).train()
    attach_ternary(model, plain(backward=backward))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator, losses = torch.Generator().manual_seed(1), []
    after = torch.randperm(96, generator=generator)
    with torch.random.fork_rng(devices=[]):
        for step in range(steps):
            torch.manual_seed(step)
            ids = torch.randint(96, (8, 24), generator=generator)
            for t in range(1, 24):
                known = torch.rand(8, generator=generator) < 0.9
                ids[:, t] = torch.where(known, after[ids[:, t - 1]], ids[:, t])
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    return sum(losses[-20:]) / 20


@pytest.mark.slow
def test_200_steps_with_an_int8_backward_pass_learn_as_much() -> None:
    exact = learnt("float32", 200)
    assert exact < 2  # it begins at 4.6; what is random leaves 0.8
    for backward in ("saved_int8", "int8"):
        assert learnt(backward, 200) == pytest.approx(exact, rel=0.02)
