"""Generation equals a slow loop over full forward passes, whatever the batch, and leaves no trace behind."""

import math

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tokenkit.config import UserError, build
from tokenkit.models.factorised_view import attach_factorised
from tokenkit.models.generate import WritingConfig, generate, stream, write
from tokenkit.models.load import load_model
from tokenkit.tokenizers.load import load_tokenizer

BYTES = load_tokenizer("byte")
PROMPTS = ["Hello", "a much longer prompt, é and 東", ""]


@pytest.fixture
def model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=320, initializer_range=0.2, **sizes)).eval()


def slow_greedy(model: LlamaForCausalLM, prompt: str, tokens: int) -> bytes:
    ids = [BYTES.start_id(), *prompt.encode()]
    found = []
    for _ in range(tokens):
        with torch.no_grad():
            best = int(model(torch.tensor([ids])).logits[0, -1, : BYTES.vocab_size].argmax())
        if best == BYTES.eos_id:
            break
        ids.append(best)
        found.append(best)
    return b"".join(BYTES.token_bytes[i] for i in found)


def test_greedy_equals_the_slow_loop_for_every_prompt_of_a_padded_batch(model: LlamaForCausalLM) -> None:
    found = generate(model, BYTES, PROMPTS, max_new_tokens=12)
    slow = [slow_greedy(model, prompt, 12) for prompt in PROMPTS]
    assert len(set(slow)) > 1
    for text, raw in zip(found, slow):
        whole = raw.decode("utf-8", "replace")
        assert whole.startswith(text)
        assert whole[len(text) :].strip("�") == ""
    assert found == [generate(model, BYTES, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]


def test_sampling_is_seeded_and_leaves_the_random_state_alone(model: LlamaForCausalLM) -> None:
    def sample(seed: int) -> list[str]:
        return generate(model, BYTES, PROMPTS, max_new_tokens=20, temperature=1.5, top_p=0.9, seed=seed)

    before = torch.get_rng_state()
    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert torch.equal(torch.get_rng_state(), before)


def bias_towards(model: LlamaForCausalLM, ids: list[int]) -> None:
    """Makes the model emit the ids in turn, whatever the input."""
    position = iter(ids)

    def hook(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, -1, next(position)] = 1e4
        return output

    model.lm_head.register_forward_hook(hook)


def test_it_stops_at_the_end_and_never_returns_half_a_character(model: LlamaForCausalLM) -> None:
    bias_towards(model, [*"né".encode(), BYTES.eos_id])
    assert generate(model, BYTES, ["x"], max_new_tokens=9) == ["né"]


def test_a_character_cut_by_the_length_limit_is_left_out(model: LlamaForCausalLM) -> None:
    bias_towards(model, [*"n東".encode()])
    assert generate(model, BYTES, ["x"], max_new_tokens=3) == ["n"]


def test_rows_beyond_the_tokenizer_are_never_emitted(model: LlamaForCausalLM) -> None:
    bias_towards(model, [300, 310, 319])
    assert len(generate(model, BYTES, ["x"], max_new_tokens=3)) == 1  # an id without bytes would raise IndexError


def test_no_prompts_no_texts_and_training_mode_survives(model: LlamaForCausalLM) -> None:
    model.train()
    assert generate(model, BYTES, [], max_new_tokens=3) == []
    generate(model, BYTES, ["x"], max_new_tokens=1)
    assert model.training


def gpt2(positions: int = 96) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=positions, initializer_range=0.2)
    model = GPT2LMHeadModel(config).eval()
    model.generation_config.eos_token_id = None
    return model


def writing(**keys) -> WritingConfig:
    return build(WritingConfig, {"max_new_tokens": 24, **keys})


PENALTIES = [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram": 2}, {"repetition_penalty": 0.8, "no_repeat_ngram": 3}]


def theirs(model, ids: list[int], tokens: int, unused: list[int], **keys) -> list[int]:
    """Transformers' own greedy generation of one row."""
    settings = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=0,
        repetition_penalty=keys.get("repetition_penalty", 1.0),
        no_repeat_ngram_size=keys.get("no_repeat_ngram", 0),
        suppress_tokens=unused or None,
    )
    row = torch.tensor([ids])
    return model.generate(row, attention_mask=torch.ones_like(row), generation_config=settings)[0, len(ids) :].tolist()


@pytest.mark.parametrize("keys", PENALTIES)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_greedy_with_penalties_is_transformers_own(kind, keys, model):
    model = gpt2() if kind == "gpt2" else model
    model.generation_config.eos_token_id = BYTES.eos_id
    rows = [[BYTES.start_id(), *prompt.encode()] for prompt in PROMPTS]
    unused = list(range(BYTES.vocab_size, 320))
    wanted = [theirs(model, row, 24, unused, **keys) for row in rows]
    assert [one.ids for one in write(model, BYTES, rows, writing(**keys))] == wanted


@pytest.mark.parametrize("keys", PENALTIES[1:])
def test_a_real_model_writes_what_it_writes_in_transformers(shared, keys):
    folder = str(shared / "data/weights/stories260K")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    texts = ["Once upon a time", "Lily", "The dog was very happy. He saw a big"]
    rows = [[tokenizer.start_id(), *tokenizer.encode(text).ids.tolist()] for text in texts]
    wanted = [theirs(model, row, 40, [], **keys) for row in rows]
    assert [one.ids for one in write(model, tokenizer, texts, writing(max_new_tokens=40, **keys))] == wanted


@pytest.mark.parametrize("keys", [{}, {"temperature": 1.2, "top_p": 0.9, "top_k": 50, "min_p": 0.01}])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_row_does_not_know_its_batch(kind, keys, model):
    model = gpt2() if kind == "gpt2" else model
    prompts = ["Hello", "a much longer prompt, é and 東", "", "two", "a", "of the same", "size, these"]
    config = writing(repetition_penalty=1.1, stop=("x", "q"), **keys)
    alone = write(model, BYTES, prompts, config, batch_size=1, scored=True)
    assert len({one.text for one in alone}) == len(prompts)
    for size in (2, 16):
        together = write(model, BYTES, prompts, config, batch_size=size, scored=True)
        assert [one.ids for one in together] == [one.ids for one in alone]
        assert [one.text for one in together] == [one.text for one in alone]
        assert [one.logp for one in together] == pytest.approx([one.logp for one in alone], abs=1e-4)


def test_log_probabilities_are_the_models_own(model):
    row = [BYTES.start_id(), *b"Hello"]
    one = write(model, BYTES, [row], writing(temperature=0.5, repetition_penalty=2.0), scored=True)[0]
    with torch.no_grad():
        logp = model(torch.tensor([[*row, *one.ids]])).logits.double().log_softmax(-1)[0]
    wanted = sum(float(logp[len(row) - 1 + place, i]) for place, i in enumerate(one.ids))
    assert one.logp == pytest.approx(wanted, abs=1e-4)
    assert math.isnan(write(model, BYTES, [row], writing())[0].logp)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_pieces_are_the_text(model, temperature):
    config = writing(max_new_tokens=60, temperature=temperature, stop=("e", "xy"))
    wanted = [one.text for one in write(model, BYTES, PROMPTS, config)]
    found = ["", "", ""]
    for place, piece in stream(model, BYTES, PROMPTS, config):
        assert piece
        found[place] += piece
    assert found == wanted
    assert "".join(wanted)


def test_a_stop_string_ends_the_text_and_is_no_part_of_it(model):
    bias_towards(model, [*b"one END two"])
    one = write(model, BYTES, ["x"], writing(stop=("END", "two")))[0]
    assert (one.text, one.ids, one.ended) == ("one ", [*b"one END"], "stop")


def test_what_looked_like_a_stop_string_is_text_at_the_end(model):
    bias_towards(model, [*b"one EN", BYTES.eos_id])
    one = write(model, BYTES, ["x"], writing(stop=("END",)))[0]
    assert (one.text, one.ids[-1], one.ended) == ("one EN", BYTES.eos_id, "end")
    assert list(stream(model, BYTES, [], writing())) == []


def test_the_end_waits_for_the_least_number_of_tokens(model):
    bias_towards(model, [BYTES.eos_id] * 9)
    one = write(model, BYTES, ["x"], writing(min_new_tokens=3))[0]
    assert (len(one.ids), one.ended) == (4, "end")


def test_a_text_ends_where_the_positions_do():
    model = gpt2(positions=20)
    one = write(model, BYTES, [[BYTES.start_id(), *b"0123456789"]], writing(max_new_tokens=50))[0]
    assert (len(one.ids), one.ended) == (10, "length")
    with pytest.raises(UserError, match="prompt: 21 tokens, but the model has 20 positions"):
        write(model, BYTES, [[65] * 21], writing())


def test_a_schedule_of_the_temperature(model):
    hot = writing(temperature={"kind": "first_then", "start": 50.0, "end": 1e-6, "first": 1})
    rows = [[BYTES.start_id(), *b"Hi"]] * 6
    found = write(model, BYTES, rows, hot)
    assert len({one.ids[0] for one in found}) > 3
    for one in found:
        after = write(model, BYTES, [[*rows[0], one.ids[0]]], writing(max_new_tokens=23))[0]
        assert one.ids[1:] == after.ids


def test_what_means_nothing_to_open_codes(open_folder):
    tokenizer = load_tokenizer(str(open_folder))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=600, **sizes)).eval()
    attach_factorised(model, tokenizer)
    whole = generate(model, tokenizer, ["the cat"], max_new_tokens=12, temperature=1.0)[0]
    cut = generate(model, tokenizer, ["the cat"], max_new_tokens=12, temperature=1.0, stop=[whole[1:3]])[0]
    assert cut == whole[: whole.index(whole[1:3])]
    assert "".join(piece for _, piece in stream(model, tokenizer, ["the cat"], writing(max_new_tokens=12)))
    with pytest.raises(UserError, match="top_k: a model with open codes"):
        generate(model, tokenizer, ["the cat"], max_new_tokens=2, top_k=3)
