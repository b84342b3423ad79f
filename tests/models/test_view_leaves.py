"""The states, projections and best ids that a view yields are those of the model, computed the plain way."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, Phi3Config

from tokenkit.config import UserError
from tokenkit.models.lora import attach_lora
from tokenkit.models.tap import attention_projections
from tokenkit.models.view import ModelView, state_shape

LAYERS, WIDTH, VOCAB = 3, 32, 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=64),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "phi3": Phi3Config(**SIZES, num_key_value_heads=2),
}


def llama_projections(layer, states):
    attention, read = layer.self_attn, layer.input_layernorm(states)
    return torch.cat([attention.q_proj(read), attention.k_proj(read), attention.v_proj(read)], -1)


PROJECTIONS = {  # of one layer, from the states it reads
    "llama": llama_projections,
    "gpt2": lambda layer, states: layer.attn.c_attn(layer.ln_1(states)),
    "gpt_neox": lambda layer, states: layer.attention.query_key_value(layer.input_layernorm(states)),
    "phi3": lambda layer, states: layer.self_attn.qkv_proj(layer.input_layernorm(states)),
}


@pytest.fixture(params=CONFIGS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIGS[kind]).double().eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.normal_(std=0.3)  # norms and biases too: a norm left out, or one too many, shows
    return made


@pytest.fixture
def ids():
    return torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


def test_states_are_those_that_the_model_returns(model, ids):
    said = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    found = ModelView(model).leaves({"embeds", "layers", "hidden"}, ids, ids)
    assert found.keys() == {"embeds", "layers", "hidden"}
    assert len(said.hidden_states) == LAYERS + 1
    torch.testing.assert_close(found["embeds"], said.hidden_states[0])
    torch.testing.assert_close(found["layers"], torch.stack(said.hidden_states, 2))
    torch.testing.assert_close(found["layers"][:, :, -1], found["hidden"])
    logits = model.get_output_embeddings()(found["hidden"])  # the last ones are what the head reads
    torch.testing.assert_close(logits, said.logits)
    assert state_shape(ModelView(model), "layers") == (LAYERS + 1, WIDTH)


def test_queries_keys_and_values_are_the_projections_of_each_layers_normed_states(model, kind, ids):
    states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    body = model.base_model
    layers = body.h if kind == "gpt2" else body.layers
    wanted = [PROJECTIONS[kind](layer, states[number]) for number, layer in enumerate(layers)]
    found = ModelView(model).leaves({"qkv"}, ids, ids)
    assert found.keys() == {"qkv"}
    torch.testing.assert_close(found["qkv"], torch.stack(wanted, 2))
    assert state_shape(ModelView(model), "qkv") == (LAYERS, wanted[0].shape[-1])
    assert not any(m._forward_hooks for block in attention_projections(model) for m in block)  # nothing stays behind


@pytest.mark.parametrize("top_k", [1, 16, VOCAB - 1])
def test_best_ids_are_those_of_the_models_own_logits(model, ids, top_k):
    logp = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    best, best_ids = logp.topk(top_k, -1)
    rest = logp.scatter(-1, best_ids, -torch.inf).logsumexp(-1)
    found = ModelView(model).leaves({"top_logp", "top_ids", "tail_logp"}, ids, ids, top_k=top_k)
    assert torch.equal(found["top_ids"], best_ids)
    torch.testing.assert_close(found["top_logp"], best, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found["tail_logp"], rest, rtol=1e-6, atol=1e-7)


def test_no_more_best_ids_than_there_are(model, ids):
    found = ModelView(model).leaves({"top_logp", "top_ids", "tail_logp"}, ids, ids, top_k=1000)
    assert found["top_ids"].shape == (*ids.shape, VOCAB)
    torch.testing.assert_close(found["top_logp"].exp().sum(-1), torch.ones(ids.shape).double())
    assert (found["tail_logp"] < -20).all()


def test_scores_at_the_best_ids_of_another_model(model, ids):
    logp = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    others = torch.rand(*ids.shape, VOCAB, generator=torch.Generator().manual_seed(2)).topk(5, -1).indices
    found = ModelView(model).leaves({"top_logp", "tail_logp"}, ids, ids, top_ids=others)
    assert found.keys() == {"top_logp", "tail_logp"}
    torch.testing.assert_close(found["top_logp"], logp.gather(-1, others), rtol=1e-6, atol=1e-7)
    rest = logp.scatter(-1, others, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(found["tail_logp"], rest, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["llama"])
def test_a_teacher_on_the_students_body_says_what_the_model_said_before(model, ids):
    """Adapters off and the old embedding table: no projection and no state is the student's."""
    needs = {"embeds", "layers", "qkv", "top_logp", "top_ids", "tail_logp"}
    before = ModelView(model).leaves(needs, ids, ids, top_k=4)
    old = {"input": model.get_input_embeddings().weight.clone(), "head": model.get_output_embeddings().weight.clone()}
    attach_lora(model, rank=2, alpha=4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        torch.nn.init.normal_(table.weight)
    teacher = ModelView(model, tables=old, adapters=False).leaves(needs, ids, ids, top_k=4)
    student = ModelView(model).leaves(needs, ids, ids, top_k=4)
    for name in needs:
        torch.testing.assert_close(teacher[name], before[name])
        assert not torch.equal(student[name], before[name])


@pytest.mark.parametrize("kind", ["llama"])
def test_attention_of_unknown_layers_is_refused_in_one_line(model, ids):
    for layer in model.base_model.layers:
        layer.self_attn.mixed = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    with pytest.raises(UserError, match="no query, key and value layers are known in llama; take a loss over hidden"):
        ModelView(model).leaves({"qkv"}, ids, ids)
