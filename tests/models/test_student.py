"""A student is what its configuration says, begins as it says, and its teacher stays as it was."""

import copy

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    SmolLM3Config,
)
from transformers.models.smollm3.modeling_smollm3 import SmolLM3ForCausalLM

from tokenkit.config import UserError, build
from tokenkit.export.huggingface import export_huggingface
from tokenkit.models.blocks import block_list, skip, watching
from tokenkit.models.count import inventory_of, inventory_of_model, unique_parameters
from tokenkit.models.load import head_matrix, input_matrix, load_model
from tokenkit.models.shape import own_names
from tokenkit.models.student import StudentConfig, build_student, chosen_layers
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.bytelevel import ByteTokenizer

IDS = torch.randint(0, 70, (2, 12), generator=torch.Generator().manual_seed(0))


def llama(tie=False, layers=6, **changes):
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**{**sizes, **changes}, num_hidden_layers=layers, vocab_size=70, tie_word_embeddings=tie)
    return LlamaForCausalLM(config).eval()


def gpt2(layers=6):
    torch.manual_seed(3)
    return GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=16, n_head=2, n_positions=32, vocab_size=70)).eval()


def built(teacher, **keys):
    return build_student(teacher, build(StudentConfig, keys), seed=0)


def complaint(teacher, **keys):
    with pytest.raises(UserError) as caught:
        built(teacher, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_student_without_changes_is_its_teacher(make):
    teacher = make()
    before = copy.deepcopy(teacher.state_dict()), teacher.config.to_dict()
    found = built(teacher)
    assert torch.equal(found.model(IDS).logits, teacher(IDS).logits)
    assert found.report["parameters_after"] == found.report["parameters_before"] == unique_parameters(teacher)
    assert found.report["random"] == []
    found.model.config.update({"initializer_range": 0.9})
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.zero_()
    assert same_state(teacher.state_dict(), before[0])
    assert teacher.config.to_dict() == before[1]


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("how", ["uniform", "first", "last"])
def test_fewer_layers_are_the_teacher_without_some_of_its_blocks(make, how):
    teacher = make()
    found = built(teacher, layers=3, copy_layers=how)
    kept = found.report["layers"]
    assert kept == {"uniform": [0, 3, 5], "first": [0, 1, 2], "last": [3, 4, 5]}[how]
    _, blocks = block_list(teacher)
    with watching([(block, skip) for number, block in enumerate(blocks) if number not in kept]):
        expected = teacher(IDS).logits
    assert torch.equal(found.model(IDS).logits, expected)
    each = sum(parameter.numel() for parameter in blocks[0].parameters())
    assert found.report["parameters_before"] - found.report["parameters_after"] == 3 * each


def test_six_of_twelve_are_those_of_distilgpt2():
    assert chosen_layers(6, 12, "uniform") == [0, 2, 4, 7, 9, 11]
    assert chosen_layers(1, 12, "uniform") == [0]
    assert all(chosen_layers(n, n, how) == [*range(n)] for n in (1, 2, 7) for how in ("uniform", "first", "last"))


@pytest.mark.parametrize("key", ["n_layer", "num_hidden_layers"])
def test_layers_by_either_name_of_the_configuration(key):
    found = built(gpt2(), config={key: 2})
    assert found.model.config.n_layer == len(found.model.transformer.h) == 2
    assert found.report["layers"] == [0, 5]
    assert torch.equal(found.model.transformer.h[1].mlp.c_fc.weight, gpt2().transformer.h[5].mlp.c_fc.weight)


def test_layers_may_stand_twice():
    teacher = llama(layers=2)
    found = built(teacher, layers=[0, 0, 1, 1])
    assert found.model.config.num_hidden_layers == 4
    for mine, theirs in zip(found.model.model.layers, (0, 0, 1, 1), strict=True):
        assert same_state(mine.state_dict(), teacher.model.layers[theirs].state_dict())


def test_settings_of_a_layer_go_with_it_and_lists_of_other_things_stay():
    config = SmolLM3Config(
        hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4,
        vocab_size=70, pad_token_id=0, bos_token_id=1, eos_token_id=[2, 3, 4, 5],
    )  # fmt: skip
    torch.manual_seed(0)
    teacher = SmolLM3ForCausalLM(config).eval()
    assert config.no_rope_layers == [1, 1, 1, 0]
    found = built(teacher, layers=[1, 3]).model
    assert found.config.no_rope_layers == [1, 0]
    assert len(found.config.layer_types) == 2
    assert found.config.eos_token_id == [2, 3, 4, 5]
    with watching([(teacher.model.layers[layer], skip) for layer in (0, 2)]):
        expected = teacher(IDS).logits
    assert torch.equal(found(IDS).logits, expected)
    deeper = built(teacher, layers=8, start="random").model.config
    assert deeper.no_rope_layers == [1, 1, 1, 0, 1, 1, 1, 0]


def test_widths_follow_from_what_they_followed_from():
    wider = built(llama(), config={"hidden_size": 32}, start="random").model.config
    assert (wider.head_dim, wider.num_key_value_heads) == (8, 2)
    all_heads = llama(num_key_value_heads=4)
    fewer = built(all_heads, config={"num_attention_heads": 2}, start="random").model.config
    assert (fewer.head_dim, fewer.num_key_value_heads) == (8, 2)
    apart = built(llama(head_dim=16), config={"hidden_size": 32}, start="random").model.config
    assert apart.head_dim == 16


def test_dictionaries_are_merged_not_shared():
    teacher = llama()
    found = built(teacher, config={"rope_parameters": {"rope_theta": 500.0}}).model.config
    assert found.rope_parameters["rope_theta"] == 500.0
    assert found.rope_parameters["rope_type"] == teacher.config.rope_parameters["rope_type"]
    assert teacher.config.rope_parameters["rope_theta"] == 10000.0


def test_a_saved_student_comes_back(tmp_path):
    for name, teacher in (("llama", llama(tie=True)), ("gpt2", gpt2())):
        student = built(teacher, layers=2).model
        student.save_pretrained(tmp_path / name)
        assert torch.equal(load_model(str(tmp_path / name))(IDS).logits, student(IDS).logits)


def test_random_starts_are_functions_of_the_seed_alone():
    teacher, config = llama(), build(StudentConfig, {"start": "random", "layers": 2})
    before = torch.get_rng_state()
    one, again, other = (build_student(teacher, config, seed=seed).model.state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert same_state(one, again)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert not torch.equal(one["lm_head.weight"], teacher.lm_head.weight)


def test_modules_are_copied_by_glob_under_a_random_start():
    teacher = llama()
    found = built(teacher, layers=[1, 4], start="random", copy_modules=["embed_tokens", "*.self_attn", "lm_head"])
    for number, layer in enumerate((1, 4)):
        mine, theirs = found.model.model.layers[number], teacher.model.layers[layer]
        assert same_state(mine.self_attn.state_dict(), theirs.self_attn.state_dict())
        assert not torch.equal(mine.mlp.up_proj.weight, theirs.mlp.up_proj.weight)
    assert torch.equal(input_matrix(found.model), input_matrix(teacher))
    assert torch.equal(head_matrix(found.model), head_matrix(teacher))
    assert "model.layers.*.mlp.up_proj.weight" in found.report["random"]
    assert "model.layers.*.self_attn.q_proj.weight" in found.report["copied"]


def test_fresh_modules_and_then_copied_ones():
    teacher = llama()
    plain = built(teacher, start="random").model
    found = built(teacher, reinitialize=["*.mlp"], copy_modules=["model.layers.2.mlp"])
    layers = found.model.model.layers
    assert torch.equal(layers[0].mlp.up_proj.weight, plain.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(layers[2].mlp.up_proj.weight, teacher.model.layers[2].mlp.up_proj.weight)
    assert torch.equal(layers[0].self_attn.q_proj.weight, teacher.model.layers[0].self_attn.q_proj.weight)


def test_initializers():
    teacher = llama(hidden_size=64, intermediate_size=128)
    bound = (6 / (64 + 128)) ** 0.5
    xavier = built(teacher, start="random", initializer="xavier").model
    up = xavier.model.layers[1].mlp.up_proj.weight
    assert 0.98 * bound < up.abs().max() <= bound
    assert torch.equal(xavier.model.norm.weight, torch.ones(64))
    normal = built(teacher, start="random", initializer="normal", config={"initializer_range": 0.5}).model
    assert 0.45 < normal.model.layers[1].mlp.up_proj.weight.std() < 0.55
    part = built(teacher, reinitialize=["up_proj"], initializer="xavier").model
    assert part.model.layers[1].mlp.up_proj.weight.abs().max() <= bound
    assert torch.equal(part.lm_head.weight, teacher.lm_head.weight)


def test_tied_tables():
    untied, tied = llama(), llama(tie=True)
    apart = built(tied, config={"tie_word_embeddings": False}).model
    assert head_matrix(apart) is not input_matrix(apart)
    assert torch.equal(head_matrix(apart), input_matrix(apart))
    assert torch.equal(apart(IDS).logits, tied(IDS).logits)
    keys = {"config": {"tie_word_embeddings": True}}
    one = built(untied, **keys).model
    assert head_matrix(one) is input_matrix(one)
    assert torch.equal(input_matrix(one), input_matrix(untied))
    assert torch.equal(input_matrix(built(untied, **keys, copy_modules=["lm_head"]).model), head_matrix(untied))
    both = built(tied, freeze=["lm_head"])
    assert both.report["frozen"] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert not input_matrix(both.model).requires_grad


def test_frozen_modules():
    found = built(gpt2(), layers=2, freeze=["transformer.h.0", "*.ln_f"])
    frozen = {name for name, parameter in found.model.named_parameters() if not parameter.requires_grad}
    assert frozen == {*found.report["frozen"]}
    assert {name.rsplit(".", 2)[0] for name in frozen} >= {"transformer.h.0.mlp", "transformer.h.0"}
    assert "transformer.ln_f.weight" in frozen
    assert not any(".h.1." in name for name in frozen)


def test_shared_blocks_are_counted_once_trained_as_one_and_written_whole(tmp_path):
    teacher = llama(layers=4, tie=True)
    found = built(teacher, share_layers=2)
    each = sum(parameter.numel() for parameter in teacher.model.layers[0].parameters())
    assert found.report["parameters_after"] == unique_parameters(teacher) - 2 * each
    layers = found.model.model.layers
    assert layers[1].mlp.up_proj.weight is layers[0].mlp.up_proj.weight
    assert layers[2].mlp.up_proj.weight is not layers[0].mlp.up_proj.weight
    assert torch.equal(layers[3].mlp.up_proj.weight, teacher.model.layers[2].mlp.up_proj.weight)
    expected = built(teacher, layers=[0, 0, 2, 2]).model
    assert torch.equal(found.model(IDS).logits, expected(IDS).logits)
    found.model.save_pretrained(tmp_path / "m")
    loaded = load_model(str(tmp_path / "m"))
    assert torch.equal(loaded(IDS).logits, found.model(IDS).logits)
    assert unique_parameters(loaded) == unique_parameters(teacher)
    again = copy.deepcopy(found.model)
    assert unique_parameters(again) == unique_parameters(found.model)
    counted = inventory_of_model(found.model, "student")
    assert counted.parameters == unique_parameters(found.model)
    assert counted.stored_elements == inventory_of(str(tmp_path / "m")).stored_elements


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("mamba", {"state_size": 4}),
        ("mixtral", {"num_local_experts": 2}),
        ("gpt2", {}),
        ("qwen3", {}),
    ],
)
def test_other_architectures_keep_the_vocabulary(model_type, changes):
    teacher = llama(bos_token_id=5, eos_token_id=6)
    found = built(teacher, config={"model_type": model_type, **changes}, layers=2, start="random")
    config = found.model.config
    assert config.model_type == model_type
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (2, 16, 70)
    assert (config.bos_token_id, config.eos_token_id) == (5, 6)
    logits = found.model(IDS).logits
    assert logits.shape == (2, 12, 70)
    read = ModelView(found.model).leaves({"logits"}, IDS, IDS)["logits"]  # as losses on logits read any model
    torch.testing.assert_close(read, logits)
    divergence = functional.kl_div(read.log_softmax(-1), teacher(IDS).logits.softmax(-1), reduction="sum")
    divergence.backward()
    assert all(parameter.grad is not None for parameter in found.model.parameters())
    if "head_dim" in config.to_dict():
        assert config.head_dim == teacher.config.head_dim


def test_a_table_goes_into_another_architecture_by_its_role():
    teacher = llama(tie=True)
    found = built(teacher, config={"model_type": "gpt2"}, start="random", copy_modules=["wte"])
    assert torch.equal(input_matrix(found.model), input_matrix(teacher))
    assert found.report["layers"] is None


def test_a_gpt2_becomes_a_llama_of_its_sizes():
    found = built(gpt2(), config={"model_type": "llama"}, start="random").model.config
    assert (found.num_hidden_layers, found.hidden_size, found.intermediate_size) == (6, 16, 64)
    assert (found.num_attention_heads, found.num_key_value_heads, found.max_position_embeddings) == (2, 2, 32)


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"config": {"n_layers": 3}}, ["student.config.n_layers", "did you mean 'num_hidden_layers'"]),
        ({"config": {"n_layer": 3}}, ["did you mean 'num_hidden_layers'"]),
        ({"config": {"hiden_size": 3}}, ["did you mean 'hidden_size'"]),
        ({"config": {"hidden_size": "wide"}}, ["expected int"]),
        ({"config": {"hidden_size": 30}}, ["multiple of the number of attention heads"]),
        ({"config": {"num_attention_heads": 0}}, ["student.config: llama cannot be"]),
        ({"config": {"num_attention_heads": 0, "model_type": "qwen3"}, "start": "random"}, ["qwen3 cannot be"]),
        ({"config": {"num_attention_heads": "x", "model_type": "qwen3"}, "start": "random"}, ["expected int"]),
        ({"config": {"num_hidden_layers": "two"}}, ["student.config.num_hidden_layers: 'two'"]),
        ({"config": {"vocab_size": 3}}, ["target_tokenizer"]),
        ({"config": {"model_type": "lama"}, "start": "random"}, ["did you mean 'llama'"]),
        ({"config": {"model_type": "gpt2"}}, ["write student.start=random"]),
        ({"config": {"hidden_size": 32}}, ["model.embed_tokens.weight is [70, 32], the teacher's [70, 16]"]),
        ({"config": {"mlp_bias": True}}, ["the teacher has no model.layers.0.mlp", "reinitialize"]),
        ({"config": {"num_hidden_layers": 2}, "layers": 3}, ["keep one"]),
        ({"layers": 9}, ["9 from a teacher's 6", "start=random"]),
        ({"layers": [0, 6]}, ["student.layers: 6", "0 to 5"]),
        ({"layers": []}, ["empty list"]),
        ({"copy_modules": ["mlpp"]}, ["student.copy_modules: 'mlpp'", "mlp"]),
        ({"freeze": ["heads"]}, ["student.freeze: 'heads'"]),
        ({"share_layers": 9}, ["9 of 6 layers"]),
        ({"prune": {}}, ["no size is given"]),
        ({"prune": {"layers": 2}, "start": "random"}, ["leave out start=random"]),
    ],
)
def test_mistakes_are_one_line(keys, parts):
    message = complaint(llama(), **keys)
    for part in parts:
        assert part in message


def test_matrices_of_experts_are_drawn_one_by_one():
    config = {"model_type": "mixtral", "num_local_experts": 3}
    student = built(llama(), config=config, start="random", initializer="xavier").model
    experts = student.model.layers[0].mlp.experts.down_proj
    assert experts.shape == (3, 16, 24)
    assert 0.9 * (6 / 40) ** 0.5 < experts.abs().max() <= (6 / 40) ** 0.5


def test_a_student_with_shared_blocks_is_exported_and_verified(tmp_path):
    tokenizer = ByteTokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 4}
    teacher = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=tokenizer.vocab_size)).eval()
    student = built(teacher, share_layers=1).model
    export_huggingface(student, tokenizer, tmp_path / "m", dtype=torch.bfloat16)
    loaded = load_model(str(tmp_path / "m"), dtype=torch.bfloat16)
    expected = copy.deepcopy(student).to(torch.bfloat16)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    # one processor rounds products of shared and of copied matrices alike, another does not
    torch.testing.assert_close(loaded(IDS).logits, expected(IDS).logits, rtol=0.05, atol=0.02)


def test_keys_of_a_configuration_that_is_no_dataclass():
    class Old(PreTrainedConfig):
        model_type = "old"

        def __init__(self, depth=2, **others):
            self.depth = depth
            super().__init__(**others)

    assert own_names(Old, {"depth": 3}, "student.config") == {"depth": 3}
    with pytest.raises(UserError, match="did you mean 'depth'"):
        own_names(Old, {"dept": 3}, "student.config")


def test_both_names_of_a_key():
    assert "n_layer" in complaint(gpt2(), config={"n_layer": 2, "num_hidden_layers": 3})


def test_the_types_are_the_ones_the_auto_class_gives():
    assert type(built(gpt2(), layers=1).model) is type(AutoModelForCausalLM.from_config(gpt2().config))
