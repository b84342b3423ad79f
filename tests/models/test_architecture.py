"""Shapes at a fixed number of weights: all within the budget, all buildable, the same every time."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from tokenkit.config import UserError, build
from tokenkit.models.architecture import ShapesConfig, shapes_of
from tokenkit.models.shape import changed_config, own_names

LLAMA = LlamaConfig(vocab_size=320, hidden_size=64, num_attention_heads=4, tie_word_embeddings=True)
LISTS = {"layers": [1, 2, 3], "hidden_size": [48, 54], "heads": [2, 3, 4], "kv_heads": [1, 2]}


def shapes(template=LLAMA, **values):
    return shapes_of(template, build(ShapesConfig, {"parameters": 120_000, **LISTS, **values}))


def formula(keys, vocab=320):
    layers, width, heads, groups, inner = keys.values()
    attention = 2 * width * width + 2 * width * (width // heads) * groups
    return vocab * width + layers * (attention + 3 * width * inner + 2 * width) + width


def test_every_shape_has_the_weights_and_can_be_built():
    found = shapes()
    assert len(found) > 5
    assert found == shapes()
    assert len({s.name for s in found}) == len(found)
    for shape in found:
        _, width, heads, groups, inner = shape.keys.values()
        assert shape.parameters == formula(shape.keys)
        assert abs(shape.parameters - 120_000) <= 0.02 * 120_000
        assert width % heads == 0
        assert (width // heads) % 2 == 0
        assert heads % groups == 0
        assert inner % 8 == 0
    keys = own_names(LlamaConfig, found[0].keys, "k")
    model = AutoModelForCausalLM.from_config(changed_config(LLAMA, keys, None, "k"))
    assert sum(p.numel() for p in model.parameters()) == found[0].parameters
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 320)


def test_all_of_the_grid_that_fits_is_found():
    """The obvious way: every combination by the formula."""
    given = [128, 160, 192, 224, 256, 288]
    wanted = {
        (n, d, h, g, f)
        for n in LISTS["layers"]
        for d in LISTS["hidden_size"]
        for h in LISTS["heads"]
        for g in LISTS["kv_heads"]
        for f in given
        if d % h == 0 and d // h % 2 == 0 and h % g == 0
        if abs(formula(dict(enumerate((n, d, h, g, f)))) - 120_000) <= 2400
    }
    assert {tuple(s.keys.values()) for s in shapes(ffn=given)} == wanted
    assert wanted


def test_other_families_and_mistakes():
    gpt2 = shapes(GPT2Config(vocab_size=320, n_positions=64), kv_heads=None, hidden_size=[48], layers=[2, 3], heads=[4])
    assert all(abs(s.parameters - 120_000) <= 2400 for s in gpt2)
    assert "4/4 heads" in " ".join(s.name for s in gpt2)
    with pytest.raises(UserError, match=r"shapes.kv_heads: gpt2 has no groups"):
        shapes(GPT2Config(vocab_size=320))
    with pytest.raises(UserError, match="no shape within 2% of 1,000 weights"):
        shapes(parameters=1000, hidden_size=[48], heads=[2])
    with pytest.raises(UserError, match=r"shapes.heads: 0 is no size"):
        shapes(heads=[0])
