"""`tokenkit generate` frames prompts as the model's family does."""

import shutil

import pytest

from tokenkit.config import UserError, build
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.verbs.generate import GenerateRun, continue_prompts

TURNS = """{%- for m in messages %}{{ '<|endoftext|>' + m.role + ' ' + m.content + '<|endoftext|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|endoftext|>assistant ' }}{% endif %}"""


@pytest.fixture
def chat_model(tmp_path, model_folder):
    folder = tmp_path / "chat"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").write_text(TURNS, "utf-8")
    return folder


def generated(folder, **options) -> str:
    return continue_prompts(
        build(GenerateRun, {"model": {"source": str(folder)}, "prompts": ["the cat"], "max_new_tokens": 8, **options})
    )[0]


def test_asked_as_a_user_the_answer_alone_comes_back(chat_model, monkeypatch):
    seen = []
    from tokenkit.verbs import generate as verb

    original = verb.generate
    monkeypatch.setattr(verb, "generate", lambda *a, **k: seen.append((a[2], k)) or original(*a, **k))
    answer = generated(chat_model, mode="surround_instruct")
    assert not answer.startswith("the cat")
    tokenizer = load_tokenizer(str(chat_model))
    ids, options = seen[0]
    end = tokenizer.special_tokens["<|endoftext|>"]
    wanted = [
        end,
        *tokenizer.encode("user the cat").ids.tolist(),
        end,
        end,
        *tokenizer.encode("assistant ").ids.tolist(),
    ]
    assert ids == [wanted]
    assert options["stop_ids"] == [end]


def test_modes_without_turns_continue_the_prompt(chat_model):
    plain = generated(chat_model)
    assert plain.startswith("the cat")
    assert generated(chat_model, mode="direct_encode_no_force_eos").startswith("the cat")


def test_placeholders_need_a_mode(chat_model):
    with pytest.raises(UserError, match="placeholders need a mode"):
        generated(chat_model, placeholders=True)
