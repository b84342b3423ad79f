"""A teacher in fewer bits: small, near the float one, and never a model that is trained."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tokenkit.config import UserError
from tokenkit.eval.agreement import agreement
from tokenkit.eval.bits_per_byte import EvalConfig
from tokenkit.models.load import load_model
from tokenkit.models.quantize import GROUP, LEVELS, Int4Linear, pack, quantize_linears, weight_bytes
from tokenkit.models.view import ModelView
from tokenkit.verbs.model import ModelChoice, load_pair

DEMO = "tokenkit/assets/demo_teacher"


@pytest.mark.parametrize("columns", [32, 64, 50, 1])
def test_four_bits_are_the_nearest_levels(columns):
    torch.manual_seed(0)
    weight = torch.randn(7, columns)
    layer = nn.Linear(columns, 7)
    layer.weight = nn.Parameter(weight)
    whole = Int4Linear(layer).whole(torch.float32)
    _, scale, least = pack(weight)
    steps = torch.arange(LEVELS + 1)
    for row in range(7):
        for column in range(columns):
            group = column // GROUP
            levels = least[row, group].float() + steps * scale[row, group].float()
            assert (whole[row, column] - weight[row, column]).abs() <= (levels - weight[row, column]).abs().min() + 1e-6


def test_a_matrix_of_few_levels_is_exact():
    weight = (torch.arange(64) % 16).view(2, 32).float() / 16
    layer = nn.Linear(32, 2, bias=False)
    layer.weight = nn.Parameter(weight)
    x = torch.randn(5, 32)
    assert torch.allclose(Int4Linear(layer)(x), x @ weight.T, atol=1e-6)


@pytest.mark.parametrize(("bits", "share", "kl", "top1"), [("int8", 0.27, 1e-4, 0.99), ("int4", 0.18, 2e-2, 0.9)])
def test_the_embedded_teacher_in_fewer_bits(bits, share, kl, top1, documents):
    pytest.importorskip("torchao")
    model, tokenizer = load_pair(ModelChoice(source=DEMO), "cpu")
    fewer, _ = load_pair(ModelChoice(source=DEMO, quantize=bits), "cpu", teacher=True)
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and "lm_head" not in name]
    linear = sum(model.get_submodule(name).weight.numel() for name in names)
    others = weight_bytes(model) - 4 * linear
    assert (weight_bytes(fewer) - others) / (4 * linear) < share
    alike = agreement(ModelView(fewer), ModelView(model), tokenizer, documents[:8], EvalConfig.model_construct())
    assert 0 < alike.kl < kl
    assert alike.top1 > top1


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_transposed_layers_autocast_and_copies(bits):
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=32)).eval()
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        before = model(ids).logits
        assert len(quantize_linears(model, bits)) == 8
        copied = copy.deepcopy(model)
        after = copied.requires_grad_(False)(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            half = model(ids).logits
    assert (after - before).norm() < {"int8": 0.02, "int4": 0.2}[bits] * before.norm()
    assert not torch.equal(after, before)
    assert half.dtype == torch.bfloat16
    assert (half.float() - after).norm() < 0.03 * after.norm()


def test_only_what_is_read_is_quantised(model_folder):
    with pytest.raises(UserError, match=r"model\.quantize: int4, but .*write teacher\.quantize=int4"):
        load_pair(ModelChoice(source=str(model_folder), quantize="int4"), "cpu")


def test_a_model_without_linear_layers_is_refused(model_folder):
    model = load_model(str(model_folder))
    model.model.layers = nn.ModuleList()
    with pytest.raises(UserError, match="llama has no linear layer to quantise"):
        quantize_linears(model, "int4")
