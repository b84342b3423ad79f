"""How attention is computed is said, checked, and put back."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tokenkit.config import UserError
from tokenkit.models import attention
from tokenkit.models.attention import attention_of, check_attention, set_attention, whole_precision
from tokenkit.models.load import load_model
from tokenkit.models.view import ModelView
from tokenkit.objective import LossesConfig, Objective
from tokenkit.verbs.sides import read_attention_maps


def test_every_way_computes_the_same(model_folder):
    model, ids = load_model(str(model_folder)), torch.arange(40).view(2, 20)
    found = {}
    with torch.no_grad():
        for name in ("auto", "eager", "sdpa"):
            set_attention(model, name)
            found[attention_of(model)] = model(ids).logits
    assert found.keys() == {"sdpa", "eager"}
    assert torch.allclose(found["sdpa"], found["eager"], atol=1e-5)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_what_needs_a_gpu_says_so_before_a_model_is_loaded(name):
    with pytest.raises(
        UserError, match=rf"train\.attention: {name} needs a CUDA GPU.*write train\.attention=sdpa"
    ) as told:
        check_attention(name, "cpu", "bfloat16")
    assert "\n" not in str(told.value)
    check_attention("sdpa", "cpu", "float32")


def test_what_reads_16_bits_says_so():
    with pytest.raises(UserError, match=r"write train\.precision=bfloat16"):
        check_attention("flash_attention_2", "cuda", "float32")
    check_attention("flash_attention_2", "cuda", "float16")


def test_a_package_that_is_not_here_is_one_line(model_folder):
    model = load_model(str(model_folder))
    with pytest.raises(UserError, match=r"train\.attention: flash_attention_2 cannot be had for llama here \(") as told:
        set_attention(model, "flash_attention_2")
    assert "\n" not in str(told.value)
    assert attention_of(model) == "sdpa"


def test_measured_in_whole_precision(model_folder, monkeypatch):
    monkeypatch.setattr(attention, "HALF", ("eager",))  # in the place of a kernel that is not to be had here
    models = [load_model(str(model_folder)) for _ in range(2)]
    set_attention(models[0], "eager")
    with whole_precision(*models):
        assert [attention_of(model) for model in models] == ["sdpa", "sdpa"]
    assert [attention_of(model) for model in models] == ["eager", "sdpa"]


def test_losses_over_maps_say_why_it_is_eager(model_folder):
    views = [ModelView(load_model(str(model_folder))) for _ in range(2)]
    plain = Objective.of(LossesConfig.model_validate({"forward_kl": {}}))
    assert read_attention_maps(plain, *views) == "sdpa (student), sdpa (teacher)"
    mapped = Objective.of(LossesConfig.model_validate({"attention_maps": {}}))
    line = read_attention_maps(mapped, *views)
    assert line == "eager (student), eager (teacher); a loss reads attention maps, which eager alone returns"


def test_an_architecture_that_cannot_choose_is_told(monkeypatch):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1))
    monkeypatch.setattr(model, "set_attn_implementation", lambda name: None)
    with pytest.raises(UserError, match=r"eager is not to be had for gpt2.*write train\.attention=auto"):
        set_attention(model, "eager")
