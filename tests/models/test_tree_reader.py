"""A tree in one row says what its paths say alone: whatever the family, the order and what was freed between."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from tokenkit.models.expand import attach_expansion
from tokenkit.models.tree_reader import ROOT, TreeReader

ROWS = 40
SMALL = {"vocab_size": ROWS, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.3}
LLAMA = SMALL | {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def make(family):
    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **SMALL)).eval()
    if family == "window":
        return MistralForCausalLM(MistralConfig(sliding_window=6, num_key_value_heads=1, **LLAMA)).eval()
    if family == "recurrent":
        return MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=2, **SMALL)).eval()
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    if family == "expanded":
        attach_expansion(model, [b"\x01\x02", b"\x02\x03", b"\x05\x06\x07"], torch.randn(3, 16))
    return model


@torch.no_grad()
def alone(model, path):
    return model(torch.tensor([path]), use_cache=False).logits[0, -1]


@pytest.mark.parametrize(
    ("family", "shared"),
    [("llama", True), ("gpt2", True), ("expanded", True), ("window", True), ("recurrent", False)],
)
def test_every_path_is_what_it_is_alone(family, shared):
    model = make(family)
    tree = TreeReader(model)
    assert tree.shared == shared
    generator = torch.Generator().manual_seed(1)
    assert torch.allclose(tree.read_path([1, 2, 3]), alone(model, [1, 2, 3]), atol=1e-4)
    tree.read([ROOT], [5])  # a second beginning beside the first
    live = [2, 3]
    for step in range(12):
        parents = [live[i] for i in torch.randint(len(live), (3,), generator=generator).tolist()]
        ids = torch.randint(8, (3,), generator=generator).tolist()
        first = len(tree)
        parents.append(first)  # a child of a node of the same call
        logits = tree.read(parents, [*ids, 6])
        for row, node in enumerate(range(first, first + 4)):
            assert torch.allclose(logits[row], alone(model, tree.path(node)), atol=1e-4)
        live = [*live[-2:], *range(first, first + 4)]
        if step % 3 == 2:
            tree.keep(live)
            assert tree.held <= len(tree)
    if shared and family != "window":  # beyond its window it reads alone
        held = tree.held
        tree.keep(live[-1:])
        assert tree.held == len(tree.path(live[-1])) < held
        tree.keep([])
        assert tree.held == 0
