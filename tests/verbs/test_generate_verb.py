"""`tokenkit generate` frames prompts as the model's family does, and writes texts, lines or pieces."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tokenkit.cli import app
from tokenkit.config import UserError, build
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.verbs.generate import GenerateRun, prepared

TURNS = """{%- for m in messages %}{{ '<|endoftext|>' + m.role + ' ' + m.content + '<|endoftext|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|endoftext|>assistant ' }}{% endif %}"""


@pytest.fixture
def chat_model(tmp_path, model_folder):
    folder = tmp_path / "chat"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").write_text(TURNS, "utf-8")
    return folder


def generated(folder, **options) -> str:
    asked = {"model": {"source": str(folder)}, "prompts": ["the cat"], "max_new_tokens": 8, **options}
    return prepared(build(GenerateRun, asked)).texts()[0]


def test_asked_as_a_user_the_answer_alone_comes_back(chat_model, monkeypatch):
    seen = []
    from tokenkit.verbs import generate as verb

    original = verb.write
    monkeypatch.setattr(verb, "write", lambda **k: seen.append((k["prompts"], k)) or original(**k))
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


def ready(folder, **options):
    values = {"model": {"source": str(folder)}, "prompts": ["the cat"], "max_new_tokens": 8, **options}
    return build(GenerateRun, values)


def test_lines_hold_all_that_is_known(model_folder, tmp_path):
    more, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    more.write_text("who had\na mat and\n", "utf-8")
    run = ready(model_folder, prompts_file=more, output=output, temperature=1.0, seed=3)
    texts = prepared(run).texts(output)
    lines = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [line["prompt"] + line["text"] for line in lines] == texts
    assert [line["prompt"] for line in lines] == ["the cat", "who had", "a mat and"]
    tokenizer = load_tokenizer(str(model_folder))
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    for line in lines:
        start = [tokenizer.start_id(), *tokenizer.encode(line["prompt"]).ids.tolist()]
        with torch.no_grad():
            logp = model(torch.tensor([[*start, *line["ids"]]])).logits[0].log_softmax(-1)
        said = sum(float(logp[len(start) - 1 + n, i]) for n, i in enumerate(line["ids"]))
        assert line["logp"] == pytest.approx(said, abs=1e-4)
        assert line["ended"] in ("end", "stop", "length")


def test_pieces_are_printed_as_they_come(model_folder):
    run = ready(model_folder, stream=True)
    pieces = list(prepared(run).pieces())
    assert "".join(pieces) == generated(model_folder)
    assert len(pieces) > 3
    words = [f"model.source={model_folder}", 'prompts=["the cat"]', "max_new_tokens=8", "stream=true"]
    result = CliRunner().invoke(app, ["generate", *words])
    assert result.stdout == "".join(pieces) + "\n"


def test_a_draft_changes_nothing_but_the_speed(model_folder):
    plain = generated(model_folder, temperature=1.0)
    run = ready(model_folder, temperature=1.0, draft={"source": str(model_folder)}, draft_tokens=3)
    generation = prepared(run)
    assert generation.texts() == [plain]
    assert generation.drafting() == "draft: 100.0% of its guesses stand, 4.00 tokens for each pass"
    assert prepared(ready(model_folder)).drafting() is None


def test_a_draft_with_another_tokenizer_is_told_what_to_do(model_folder, shared):
    draft = shared / "data/weights/stories260K"
    with pytest.raises(UserError, match=r"give it this one: tokenkit transfer model.source=.*stories260K target_tok"):
        prepared(ready(model_folder, draft={"source": str(draft)}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "prompts: none"),
        ({"prompts": ["a", "b"], "stream": True}, "stream: 2 prompts"),
        ({"prompts_file": "nowhere.txt"}, "prompts_file: nowhere.txt is no file"),
        ({"output": "nowhere/out.jsonl"}, "output: nowhere is no folder"),
        ({"stop": [""]}, "stop: an empty string"),
    ],
)
def test_what_does_not_fit_together(model_folder, options, message):
    with pytest.raises(UserError, match=message):
        prepared(ready(model_folder, **options)).texts()
