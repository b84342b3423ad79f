"""A pruned model says what the whole one says with the pruned parts masked; the best is kept, the same every time."""

import copy

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers import SmolLM3Config as SmolConfig

from tokenkit.config import UserError, build
from tokenkit.models.blocks import block_list, skip, watching
from tokenkit.models.count import unique_parameters
from tokenkit.models.load import load_model
from tokenkit.models.prune import PruneConfig, best, block_scores, keep_sets, width_scores
from tokenkit.models.student import StudentConfig, build_student

FAMILIES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
FAMILIES["smollm3"] = SmolConfig
TEXTS = [torch.randint(0, 70, (1, n), generator=torch.Generator().manual_seed(n)) for n in (9, 14)]
IDS = torch.randint(0, 70, (2, 12), generator=torch.Generator().manual_seed(0))


def make(family="llama", **changes):
    sizes = {
        "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 3,
        "num_hidden_layers": 4, "vocab_size": 70, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "initializer_range": 0.3,
    }  # fmt: skip
    if family == "qwen3":
        sizes["head_dim"] = 4
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**{**sizes, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # gains and biases that are not 1 and 0
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return model


def masked_logits(model, kept, ids):
    """The whole model, skipping blocks, with zeros for what is not kept; its norms count kept channels only."""
    heads, head_dim = model.config.num_attention_heads, model.model.layers[0].self_attn.head_dim
    hooks, width = [], model.config.hidden_size
    axes = dict(zip(kept.layers, kept.axes, strict=True))
    channels = torch.zeros(width)
    channels[kept.axes[0].get("hidden", range(width))] = 1

    def on(size, indices):
        mask = torch.zeros(size)
        mask[indices] = 1
        return mask

    def zeroed(mask):
        return lambda module, args, kwargs, output: output * mask

    def norm(module, args, kwargs, output):
        variance = (args[0].square() * channels).sum(-1, keepdim=True) / channels.sum()
        return args[0] * torch.rsqrt(variance + module.variance_epsilon) * module.weight * channels

    hooks += [(model.model.embed_tokens, zeroed(channels)), (model.model.norm, norm)]
    handles = []
    for number, block in enumerate(model.model.layers):
        hooks += [(block.input_layernorm, norm), (block.post_attention_layernorm, norm)]
        hooks += [(block.self_attn.o_proj, zeroed(channels)), (block.mlp.down_proj, zeroed(channels))]
        if number not in axes:
            hooks.append((block, skip))
            continue
        queries = on(heads * head_dim, axes[number].get("query", range(heads * head_dim)))
        neurons = on(model.config.intermediate_size, axes[number].get("neuron", range(model.config.intermediate_size)))
        for module, mask in ((block.self_attn.o_proj, queries), (block.mlp.down_proj, neurons)):
            handles.append(module.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,)))
    with watching(hooks), torch.no_grad():
        logits = model(ids).logits
    for handle in handles:
        handle.remove()
    return logits


WAYS = {
    "hidden": {"hidden_size": 18},
    "neurons": {"intermediate_size": 13},
    "groups": {"num_attention_heads": 4},
    "queries": {"num_attention_heads": 3, "num_key_value_heads": 3},
    "both heads": {"num_attention_heads": 2, "num_key_value_heads": 2},
    "layers": {"layers": 2, "intermediate_size": 40},
    "all": {"layers": 3, "hidden_size": 20, "intermediate_size": 7, "num_attention_heads": 4},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_is_the_whole_one_masked(family, way):
    model = make(family)
    kept = keep_sets(model, PruneConfig(**WAYS[way]), TEXTS)
    student = build_student(model, build(StudentConfig, {"prune": WAYS[way]}), seed=0, calibration=TEXTS).model
    for key, size in {**WAYS[way], "num_hidden_layers": WAYS[way].get("layers", 4)}.items():
        if key != "layers":
            assert student.config.to_dict()[key] == size
    with torch.no_grad():
        found = student(IDS).logits
    expected = masked_logits(model, kept, IDS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, model(IDS).logits, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_is_saved_and_comes_back(family, tmp_path):
    config = build(StudentConfig, {"prune": WAYS["all"]})
    student = build_student(make(family), config, seed=0, calibration=TEXTS)
    student.model.save_pretrained(tmp_path / "m")
    assert torch.equal(load_model(str(tmp_path / "m"))(IDS).logits, student.model(IDS).logits)
    assert student.report["parameters_after"] == unique_parameters(student.model)


def test_tied_tables_and_biases_are_cut_too():
    model = make(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    config = build(StudentConfig, {"prune": WAYS["all"]})
    student = build_student(model, config, seed=0, calibration=TEXTS).model
    expected = masked_logits(model, keep_sets(model, PruneConfig(**WAYS["all"]), TEXTS), IDS)
    torch.testing.assert_close(student(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_kept_sets_are_the_same_every_time_and_the_generator_stays():
    model, config = make(), PruneConfig(**WAYS["all"])
    before = torch.get_rng_state()
    one, two = keep_sets(model, config, TEXTS), keep_sets(copy.deepcopy(model), config, TEXTS)
    assert torch.equal(torch.get_rng_state(), before)
    assert one == two
    assert all(part == sorted(part) for axes in one.axes for part in axes.values())
    model.train()
    assert keep_sets(model, config, TEXTS) == one
    assert model.training


def test_equal_scores_go_by_place():
    assert best(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), 2) == [1, 2]
    assert best(torch.zeros(5), 3) == [0, 1, 2]


@pytest.mark.parametrize("score", ["cosine", "kl"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_block_that_does_nothing_scores_nothing_and_goes_first(family, score):
    torch.manual_seed(0)
    gpt2 = GPT2Config(n_layer=4, n_embd=16, n_head=2, vocab_size=70, n_positions=32, initializer_range=0.2)
    model = make() if family == "llama" else AutoModelForCausalLM.from_config(gpt2).eval()
    _, blocks = block_list(model)
    with torch.no_grad():
        for name, parameter in blocks[2].named_parameters():
            if any(part in ("o_proj", "down_proj", "c_proj") for part in name.split(".")):
                parameter.zero_()
    scores = block_scores(model, TEXTS, score)
    assert scores[2].abs() < 1e-6
    assert scores.argmin() == 2
    assert (scores > -1e-6).all()
    config = build(StudentConfig, {"prune": {"layers": 3, "layer_score": score}})
    found = build_student(model, config, seed=0, calibration=TEXTS)
    assert found.report["layers"] == found.report["pruned"]["layers"] == [0, 1, 3]
    torch.testing.assert_close(found.model(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_scores_are_means_computed_by_hand():
    model = make()
    block, states = model.model.layers[1], []
    handle = block.mlp.down_proj.register_forward_pre_hook(lambda _, args: states.append(args[0][0]))
    heads = []
    other = block.self_attn.o_proj.register_forward_pre_hook(lambda _, args: heads.append(args[0][0]))
    hidden = [model(ids, output_hidden_states=True).hidden_states for ids in TEXTS]
    handle.remove()
    other.remove()
    found = width_scores(model, TEXTS)
    torch.testing.assert_close(found.neurons[1].float(), torch.cat(states).abs().mean(0))
    torch.testing.assert_close(found.heads[1].float(), torch.cat(heads).view(-1, 6, 4).norm(dim=-1).mean(0))
    cosine = torch.cat([functional.cosine_similarity(one[1], one[2], dim=-1)[0] for one in hidden])
    torch.testing.assert_close(block_scores(model, TEXTS)[1].float(), 1 - cosine.mean())


def test_the_loudest_neurons_and_whole_groups_are_kept():
    model = make()
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight[5:25] *= 1e-3
            block.self_attn.v_proj.weight[4:8] *= 1e-3  # the second of three groups
    kept = keep_sets(model, PruneConfig(intermediate_size=20, num_attention_heads=4), TEXTS)
    for axes, heads in zip(kept.axes, kept.heads, strict=True):
        assert axes["neuron"] == [*range(5), *range(25, 40)]
        assert heads == [0, 1, 4, 5]
        assert axes["key"] == [*range(4), *range(8, 12)]


def test_training_brings_a_pruned_model_nearer_to_its_teacher():
    model = make()
    config = build(StudentConfig, {"prune": {"layers": 3, "intermediate_size": 30}})
    student = build_student(model, config, seed=0, calibration=TEXTS).model
    with torch.no_grad():
        target = model(IDS).logits.log_softmax(-1)

    def divergence():
        logp = student(IDS).logits.log_softmax(-1)
        return functional.kl_div(logp, target, log_target=True, reduction="none").sum(-1).mean()

    before, optimizer = divergence().item(), torch.optim.AdamW(student.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        divergence().backward()
        optimizer.step()
    assert divergence().item() < before / 2


@pytest.mark.parametrize(
    ("prune", "parts"),
    [
        ({"hidden_size": 48}, ["hidden_size 48 of 24", "only take away"]),
        ({"layers": 5}, ["num_hidden_layers 5 of 4"]),
        ({"num_attention_heads": 5}, ["5 query heads for 3 key-value heads", "multiple"]),
        ({"num_attention_heads": 3, "num_key_value_heads": 1}, ["each has up to 2"]),
        ({"hidden_size": 16}, ["multiple of the number of attention heads"]),
    ],
)
def test_mistakes_are_one_line(prune, parts):
    with pytest.raises(UserError) as caught:
        build_student(make(), build(StudentConfig, {"prune": prune}), seed=0, calibration=TEXTS)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_what_cannot_be_pruned_is_said():
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=70))
    with pytest.raises(UserError, match="widths of 'gpt2' cannot be pruned here"):
        build_student(gpt2, build(StudentConfig, {"prune": {"hidden_size": 8}}), seed=0, calibration=TEXTS)
    with pytest.raises(UserError, match="give calibration texts"):
        build_student(gpt2, build(StudentConfig, {"prune": {"layers": 1}}), seed=0)
    sizes = {"prune": {"layers": 1}, "config": {"hidden_size": 8}}
    with pytest.raises(UserError, match=r"student\.config\.hidden_size: beside student\.prune"):
        build_student(make(), build(StudentConfig, sizes), seed=0, calibration=TEXTS)
