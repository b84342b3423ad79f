"""Generation equals a slow loop over full forward passes, whatever the batch, and leaves no trace behind."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenkit.models.generate import generate
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
