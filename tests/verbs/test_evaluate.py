"""`tokenkit eval`: before and after, what a text needs, how a tokenizer cuts it, and one figure over all tasks."""

import pytest

from tokenkit.config import UserError, build
from tokenkit.data.source import read_documents
from tokenkit.eval.tokenizer_use import tokenizer_use
from tokenkit.models.load import load_model
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.verbs.benchmarks import benchmark_table
from tokenkit.verbs.evaluate import EvalRun, before_after_table, evaluate


@pytest.fixture
def run(model_folder, corpus):
    def make(**changes):
        source = {"path": str(corpus), "separator": "\n\n", "max_bytes": 600}
        asked = {"source": source, "context_tokens": 64} | changes.pop("eval", {})
        return build(EvalRun, {"model": {"source": str(model_folder)}, "eval": asked, "device": "cpu"} | changes)

    return make


def test_a_teacher_is_not_compared_with_itself(run, model_folder, corpus):
    teacher = {"source": str(model_folder)}
    asked = {"source": {"path": str(corpus), "max_bytes": 40}, "harness": {"tasks": ["agreement", "byte_agreement"]}}
    benchmarks = evaluate(run(teacher=teacher, eval=asked))["benchmarks"]
    assert {row["task"] for row in benchmarks["trained"]} == {"agreement", "byte_agreement"}
    assert benchmarks["teacher"] == []
    assert benchmarks["beside_teacher"] == {}


def cells(table):
    return [list(column.cells) for column in table.columns]


def test_a_model_beside_itself_and_beside_another(run, tmp_path, model_folder):
    other = load_model(str(model_folder))
    other.get_input_embeddings().weight.data.mul_(3)
    other.save_pretrained(tmp_path / "other")
    load_tokenizer(str(model_folder)).save(tmp_path / "other")
    before = {"source": str(tmp_path / "other")}
    asked = {"harness": {"tasks": ["perplexity", "agreement"]}}
    found = evaluate(run(before=before, teacher={"source": str(model_folder)}, eval=asked))
    assert found["bits_per_byte"] != found["before"]["bits_per_byte"]
    assert found["tokens"] == found["before"]["tokens"]
    benchmarks = found["benchmarks"]
    assert benchmarks["beside_teacher"]["mean"] == pytest.approx(1)
    own, earlier = (benchmarks[side][0]["value"] for side in ("trained", "before"))
    assert own == pytest.approx(found["bits_per_byte"])
    assert earlier == pytest.approx(found["before"]["bits_per_byte"])
    assert benchmarks["beside_before"]["tasks"] == 2  # perplexity and agreement, the first metric of each
    table = benchmark_table(benchmarks)
    assert [column.header for column in table.columns] == [
        "task", "metric", "before", "model", "of before", "teacher", "kept"
    ]  # fmt: skip
    assert [row[0] for row in zip(*cells(table))][-2:] == ["mean", "geometric mean"]
    assert cells(before_after_table(found))[0][0] == "bits per byte"
    plain = evaluate(run(eval=asked))["benchmarks"]
    assert "before" not in plain
    assert "beside_before" not in plain


def test_tasks_alone_need_no_text(run, tmp_path):
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"context": "the cat", "choices": [" sat", " fish"], "answer": 0}\n', "utf-8")
    found = evaluate(run(eval={"source": None, "harness": {"tasks": ["cloze"], "cloze": str(questions)}}))
    assert "bits_per_byte" not in found
    assert found["benchmarks"]["trained"][0]["metric"] == "accuracy"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"source": None}, r"eval.source: missing; write \{path: FILE\}"),
        ({"source": None, "harness": {"tasks": ["perplexity"]}}, "missing, and perplexity needs it"),
        (
            {"source": None, "harness": {"tasks": ["arc_easy"]}, "metrics": ["a.py:b"]},
            "missing, and eval.metrics needs",
        ),
    ],
)
def test_what_needs_a_text_says_so(run, asked, message):
    with pytest.raises(UserError, match=message):
        run(eval=asked)


def test_how_a_text_is_cut(model_folder):
    texts = ["the cat sat", "жук 🙂"]
    byte = tokenizer_use(load_tokenizer("byte"), texts)
    assert (byte.tokens, byte.words) == (22, 5)
    assert byte.partial == 10  # every byte of Cyrillic letters and of the face
    assert byte.vocabulary == 256
    known = load_tokenizer(str(model_folder))
    use = tokenizer_use(known, texts)
    assert use.tokens == sum(len(one) for one in known.encode_batch(texts))
    assert use.tokens_per_word == use.tokens / 5
    assert 0 < use.vocabulary_used <= 1
    assert use.ids_seen == len({i for one in known.encode_batch(texts) for i in one.ids.tolist()})


def test_figures_of_the_text_are_those_of_its_documents(run):
    asked = run()
    found = evaluate(asked)
    documents = read_documents(asked.eval.source)
    assert found["bytes"] == sum(len(text.encode()) for text in documents)
    assert found["tokens_per_word"] == found["tokens"] / sum(len(text.split()) for text in documents)
