"""Scores of models whose logits are capped, scaled or shifted equal the log-softmax of the models' own logits."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPTJConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    PhiConfig,
)

from tokenkit.config import UserError
from tokenkit.models.load import output_head
from tokenkit.models.view import ModelView, check_linear_head
from tokenkit.scores import token_scores_dense

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
GPTJ = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "n_positions": 64}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}
MODELS = {
    "llama": (LlamaConfig(**SIZES), {}),
    "gemma2": (Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=0.5), {"softcap": 0.5}),
    "gemma3": (Gemma3TextConfig(**SIZES, head_dim=16), {}),
    "gemma3 capped": (Gemma3TextConfig(**SIZES, head_dim=16, final_logit_softcapping=0.7), {"softcap": 0.7}),
    "cohere": (CohereConfig(**SIZES, logit_scale=0.0625), {"scale": 0.0625}),
    "cohere2": (Cohere2Config(**SIZES, logit_scale=0.25), {"scale": 0.25}),
    "granite": (GraniteConfig(**SIZES, logits_scaling=8.0), {"scale": 0.125}),
    "falcon_h1": (FalconH1Config(**SIZES, **MAMBA, lm_head_multiplier=0.3), {"scale": 0.3}),
    "gptj": (GPTJConfig(**GPTJ), {}),
    "phi": (PhiConfig(**SIZES), {}),
}


def make(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():  # a head that says something, and a bias that is not zero
        output_head(model).weight.normal_(std=0.5)
        if output_head(model).bias is not None:
            output_head(model).bias.normal_()
    return model


@pytest.mark.parametrize("name", MODELS)
def test_scores_equal_the_log_softmax_of_the_models_own_logits(name):
    config, wanted = MODELS[name]
    model = make(config)
    check_linear_head(model)
    view = ModelView(model)
    form = view.form()
    assert {"scale": form.scale, "softcap": form.softcap} == {"scale": 1.0, "softcap": None} | wanted
    assert (form.bias is not None) == (name in ("gptj", "phi"))
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -1)], 1)
    boundary, eos = torch.arange(97) % 3 == 0, torch.arange(97) == 5
    logits = model(input_ids=ids, use_cache=False).logits
    needs = {"label_logp", "boundary_logp", "eos_logp", "logits"}
    found = view.leaves(needs, ids, labels, {"boundary_logp": boundary, "eos_logp": eos})
    label, mass = token_scores_dense(logits, labels, boundary)
    expected = {"label_logp": label, "boundary_logp": mass, "eos_logp": logits.log_softmax(-1)[..., 5]}
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found["logits"].double(), logits, rtol=1e-5, atol=1e-6)
    loss = sum(value.sum() for value in expected.values())
    own = sum(found[key].sum() for key in expected)
    trained = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(own, trained), torch.autograd.grad(loss, trained)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_model_whose_config_does_not_tell_is_refused_in_one_line():
    model = make(HyperCLOVAXConfig(**SIZES, logits_scaling=4.0))  # multiplies by the key that others divide by
    with pytest.raises(UserError, match="hyperclovax: its logits are neither") as caught:
        check_linear_head(model)
    assert "\n" not in str(caught.value)


def test_the_old_bias_goes_with_the_old_head():
    model = make(MODELS["gptj"][0])
    old = output_head(model).bias.detach().clone()
    tables = {"head": output_head(model).weight.detach().clone(), "bias": old}
    ids = torch.arange(8)[None]
    before = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    model.resize_token_embeddings(64, mean_resizing=False)
    teacher = ModelView(model, tables={**tables, "input": model.get_input_embeddings().weight.detach()})
    found = teacher.leaves({"label_logp"}, ids, torch.full((1, 8), 90))["label_logp"]
    torch.testing.assert_close(found, before[..., 90])
