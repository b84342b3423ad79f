"""The built-in benchmarks by their laws: perplexities, questions with choices, agreement with a teacher."""

import json
import math

import pytest
import torch

from tokenkit.config import UserError, build
from tokenkit.data.source import read_documents
from tokenkit.eval.bits_per_byte import bits_per_byte
from tokenkit.eval.builtin_tasks import BuiltinBackend, HeldOut, cloze_scores, read_questions
from tokenkit.eval.harness import Evaluation, Subject, benchmark
from tokenkit.models.load import load_model
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.verbs.benchmarks import benchmarks
from tokenkit.verbs.model import ModelChoice


@pytest.fixture
def evaluation(corpus):
    def make(**more):
        source = {"path": str(corpus), "separator": "\n\n", "max_bytes": 900}
        return build(Evaluation, {"source": source, "context_tokens": 64, **more})

    return make


@pytest.fixture
def loaded(model_folder):
    return ModelView(load_model(str(model_folder)).eval()), load_tokenizer(str(model_folder))


def rows_of(found):
    return {(row.task, row.metric): row for row in found}


def test_perplexities_are_one_number_in_three_units(evaluation, loaded, model_folder):
    view, tokenizer = loaded
    asked = evaluation()
    documents = read_documents(asked.source)
    backend = BuiltinBackend(lambda subject: loaded, HeldOut(documents, asked))
    found = rows_of(benchmark(backend, Subject(str(model_folder)), ["perplexity"], limit=2, num_fewshot=None))
    read = documents[:2]
    nats = bits_per_byte(view, tokenizer, read, context_tokens=64).nats
    counts = {
        "token": sum(len(encoding) for encoding in tokenizer.encode_batch(read)),
        "byte": sum(len(text.encode()) for text in read),
        "word": sum(len(text.split()) for text in read),
    }
    for unit, count in counts.items():
        row = found["perplexity", f"{unit}_perplexity"]
        assert row.value == pytest.approx(math.exp(nats / count))
        assert (row.backend, row.task_version, row.num_fewshot, row.limit) == ("builtin", "1", 0, 2)
    assert found["perplexity", "bits_per_byte"].value == pytest.approx(nats / math.log(2) / counts["byte"])
    assert found["perplexity", "token_perplexity"].direction is None  # tokens are not one unit for all tokenizers
    assert found["perplexity", "byte_perplexity"].dataset == "text.txt"


@torch.no_grad()
def test_cloze_scores_are_those_of_the_whole_text_from_the_border_on(loaded):
    view, tokenizer = loaded
    context, choices = "the cat sat on", [" a mat and", " fish", "zzz"]
    for choice, score in zip(choices, cloze_scores(view, tokenizer, context, choices, 64)):
        encoding = tokenizer.encode(context + choice)
        ids = [tokenizer.start_id(), *encoding.ids.tolist()]
        logp = view.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        expected = sum(
            logp[place, ids[place + 1]].item()
            for place, end in enumerate(encoding.ends.tolist())
            if end > len(context.encode())
        )
        assert score == pytest.approx(expected, abs=1e-4)
    kept = cloze_scores(view, tokenizer, "so much " * 50 + context, choices, 40)
    assert all(math.isfinite(score) and score < 0 for score in kept)


def write_questions(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def test_cloze_counts_what_is_right(tmp_path, evaluation, loaded, model_folder):
    view, tokenizer = loaded
    contexts, choices = ["the cat", "a mat and", "home to", "small"], [" sat on a mat", " qz", " fish"]
    likeliest = []
    for context in contexts:
        scores = cloze_scores(view, tokenizer, context, choices, 64)
        likeliest.append(scores.index(max(scores)))
    right = [{"context": c, "choices": choices, "answer": best} for c, best in zip(contexts, likeliest)]
    wrong = [{**line, "answer": (line["answer"] + 1) % 3} for line in right]

    def accuracy(lines, **options):
        path = write_questions(tmp_path / "q.jsonl", lines)
        backend = BuiltinBackend(lambda subject: loaded, HeldOut([], evaluation()), cloze=path)
        asked = {"limit": None, "num_fewshot": None} | options
        return benchmark(backend, Subject(str(model_folder)), ["cloze"], **asked)[0]

    assert accuracy(right).value == 1
    assert accuracy(wrong).value == 0
    assert accuracy([*right[:3], wrong[3]]).value == 0.75
    assert accuracy([*right[:1], *wrong[1:]], limit=1).value == 1
    shot = accuracy(right, num_fewshot=2)
    assert shot.metric == "accuracy"
    assert (shot.num_fewshot, shot.value in (0, 0.5, 1)) == (2, True)
    assert "4 questions" in accuracy(right, num_fewshot=4).note


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1"),
        ('{"context": "a", "choices": ["b"], "answer": 1}', "answer: 1, of 1 choices"),
        ('{"context": "a", "choices": "b", "answer": 0}', "choices"),
        ('{"context": "a", "answer": 0}', "choices: missing"),
        ("7", "line 1"),
        ("", "no question"),
    ],
)
def test_bad_questions_are_one_line(tmp_path, line, message):
    path = tmp_path / "q.jsonl"
    path.write_text(line, "utf-8")
    with pytest.raises(UserError, match=message) as told:
        read_questions(path)
    assert "\n" not in str(told.value)


def test_a_model_agrees_with_itself_and_its_export(tmp_path, evaluation, model_folder):
    asked = evaluation(harness={"tasks": ["agreement"]})
    documents = read_documents(asked.source)
    copy = tmp_path / "copy"
    load_model(str(model_folder)).save_pretrained(copy)
    load_tokenizer(str(model_folder)).save(copy)
    student, teacher = ModelChoice(source=str(copy)), ModelChoice(source=str(model_folder))
    found = benchmarks(asked, student, teacher, documents, device="cpu")
    values = {row["metric"]: row["value"] for row in found["trained"]}
    assert values["kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert values["top1_agreement"] == 1
    assert found["teacher"] == []
    alone = benchmarks(asked, student, None, documents, device="cpu")
    assert {row["note"] for row in alone["trained"]} == {"not run: no teacher that can be loaded"}
