"""lm-evaluation-harness asks our models: answers as of its own class, and tasks run on every kind of tokenizer."""

import json
import os
from dataclasses import asdict

import pytest
import torch

from tokenkit.config import UserError, build
from tokenkit.eval.harness import HarnessConfig, Subject, benchmark
from tokenkit.eval.lm_eval_backends import LmEvalBackend
from tokenkit.models.factorised_view import attach_factorised
from tokenkit.models.load import load_model
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.load import load_tokenizer

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from tokenkit.eval.lm_eval_model import HowRead, TokenkitLM
from tokenkit.eval.lm_eval_tasks import TaskFolders

PAIRS = [
    ("the cat sat on", " a mat"),
    ("the cat sat on ", "a mat"),
    ("", "the cat"),
    ("the cat", " sat"),
    ("the cat", " ran home"),
    ("and then ran home to see " * 20, "who had been"),  # longer than the model reads
    ("naïve жук 🙂\n", "fish"),
]
TASK = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: "${data}/rows.jsonl"}}
output_type: KIND
test_split: test
doc_to_text: question
doc_to_target: label
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - {metric: METRIC, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
WRITE = 'generation_kwargs: {until: ["\\n"], max_gen_toks: 4}\n'


def requests(kind, arguments):
    return [Instance(kind, {}, one, 0, ("some", 0, 1)) for one in arguments]


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return load_tokenizer(str(model_folder))


@pytest.fixture(scope="module")
def ours(model_folder, tokenizer):
    return TokenkitLM(ModelView(load_model(str(model_folder), dtype=torch.float64)), tokenizer, HowRead(add_bos=None))


@pytest.fixture(scope="module")
def theirs(model_folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(model_folder), device="cpu", dtype="float64", batch_size=2)


@pytest.fixture
def folder(tmp_path):
    """Task files over four questions, and what a run says of them."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [
        {"question": q, "choices": [" sat on a mat", " fish", " zzz"], "label": 0} for q in ("the cat", "who", "a", "и")
    ]
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    for name, kind, metric in (("choose", "multiple_choice", "acc"), ("write", "generate_until", "exact_match")):
        text = TASK.replace("NAME", name).replace("KIND", kind).replace("METRIC", metric)
        (tasks / f"{name}.yaml").write_text(text + (WRITE if name == "write" else ""), "utf-8")
    (tasks / "both.yaml").write_text("group: both\ntask: [choose, write]\n", "utf-8")
    return tasks


def harness(folder, **more):
    asked = {"tasks": ["choose", "write"], "include_path": [str(folder)], "placeholders": {"data": str(folder)}}
    return build(HarnessConfig, asked | more)


def measured(config, loaded, cache=None, identity="w"):
    backend = LmEvalBackend("tokenkit", config, device="cpu", load=lambda subject: loaded)
    options = {"limit": config.limit, "num_fewshot": config.num_fewshot, "cache": cache}
    return benchmark(backend, Subject("some", None, identity), config.tasks, **options)


def test_log_likelihoods_are_those_of_the_harness_own_class(ours, theirs):
    asked = requests("loglikelihood", PAIRS)
    for (logp, greedy), (expected, likeliest) in zip(
        ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True
    ):
        assert logp == pytest.approx(expected, abs=1e-6)  # some parts of the model compute in float32
        assert greedy == likeliest


def test_rolling_log_likelihoods_are_those_of_the_harness_own_class(ours, theirs):
    texts = [("the cat sat on a mat",), ("and then ran home to see naïve " * 40,), ("a",)]
    asked = requests("loglikelihood_rolling", texts)
    theirs_begin, theirs.add_bos_token = theirs.add_bos_token, False  # it would score its own start token
    try:
        assert ours.loglikelihood_rolling(asked) == pytest.approx(theirs.loglikelihood_rolling(asked), abs=1e-5)
    finally:
        theirs.add_bos_token = theirs_begin


def test_generated_texts_are_those_of_the_harness_own_class(ours, theirs):
    options = {"until": [" a", "qzx"], "max_gen_toks": 12, "do_sample": False}
    texts = ["the cat sat", "who had been", "and then ran home to see " * 20, "small green"]
    asked = requests("generate_until", [(text, dict(options)) for text in texts])
    found = ours.generate_until(asked)
    assert found == theirs.generate_until(requests("generate_until", [(text, dict(options)) for text in texts]))
    assert not any(" a" in text for text in found)


def test_drawn_answers_differ_and_come_again(ours):
    asked = requests("generate_until", [("the cat", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8})] * 4)
    found = ours.generate_until(asked)
    assert len(set(found)) > 1
    assert ours.generate_until(asked) == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, r"task some: generation option num_beams=4; there are until"),
        ({"max_gen_toks": 256}, r"256 new tokens leave no room for a prompt in 256; write eval.harness.generation"),
    ],
)
def test_generation_that_cannot_be_done_is_one_line(ours, options, message):
    with pytest.raises(UserError, match=message):
        ours.generate_until(requests("generate_until", [("the cat", options)]))


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_conversation_is_rendered_and_its_special_tokens_are_read(tmp_path, model_folder, tokenizer):
    load_model(str(model_folder)).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    known = load_tokenizer(str(tmp_path))
    lm = TokenkitLM(ModelView(load_model(str(tmp_path))), known, HowRead(chat=True))
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    literal = {index: text for text, index in known.special_tokens.items()}
    begin, end = literal[known.start_id()], literal[known.eos_id]
    asked = lm.apply_chat_template(turns[:1])
    assert asked == f"{begin}[user]the cat{end}[assistant]"
    assert lm.apply_chat_template(turns, add_generation_prompt=False) == f"{asked}sat"
    ((left, right),) = lm.pairs.encode([(asked, "sat")])
    assert left[0] == known.start_id() != left[1]  # begun once
    assert left.count(known.eos_id) >= 1
    assert known.decode(right) == "sat"
    assert lm.chat_template(True) == TEMPLATE


def test_every_kind_of_tokenizer_answers_the_same_tasks(folder, model_folder, compact_folder, open_folder, tokenizer):
    model = load_model(str(model_folder))
    for kind in ("byte", str(compact_folder), str(open_folder)):
        known = load_tokenizer(kind)
        own = load_model(str(model_folder)).eval()
        rows = known.codec.layout.open_base if kind == str(open_folder) else known.vocab_size
        with torch.no_grad():
            own.resize_token_embeddings(rows, mean_resizing=False)
        view = attach_factorised(own, known) if kind == str(open_folder) else ModelView(own)
        found = measured(harness(folder), (view, known))
        assert [(row.task, row.metric) for row in found] == [("choose", "acc"), ("write", "exact_match")]
        assert all(row.value is not None for row in found), found
    assert measured(harness(folder), (ModelView(model), tokenizer))[0].value in (0, 0.25, 0.5, 0.75, 1)


def test_figures_are_kept_under_all_that_they_hang_on(tmp_path, folder, model_folder, tokenizer):
    loaded = []

    def ask(identity="w", **more):
        before = len(loaded)
        config = harness(folder, tasks=["both"], **more)
        backend = LmEvalBackend(
            "tokenkit",
            config,
            device="cpu",
            load=lambda _: loaded.append(1) or (ModelView(load_model(str(model_folder))), tokenizer),
        )
        options = {"limit": config.limit, "num_fewshot": config.num_fewshot, "cache": tmp_path / "kept"}
        found = benchmark(backend, Subject("some", None, identity), ["both"], **options)
        assert {row.task for row in found} == {"choose", "write"}
        return len(loaded) - before, [asdict(row) for row in found]

    times, first = ask()
    assert times == 1
    assert ask() == (0, first)
    for changed in ({"identity": "x"}, {"limit": 2}, {"num_fewshot": 1}, {"add_bos": False}, {"max_length": 50}):
        assert ask(**changed)[0] == 1
    assert ask(batch_tokens=7) == (0, first)  # no figure hangs on it
    assert ask(generation={"max_gen_toks": 2})[0] == 1
    path = folder / "choose.yaml"
    path.write_text(path.read_text("utf-8").replace("doc_to_text: question", 'doc_to_text: "{{question}}?"'), "utf-8")
    assert ask()[0] == 1
    (folder / "rows.jsonl").write_text((folder / "rows.jsonl").read_text("utf-8").replace("who", "why"), "utf-8")
    assert ask()[0] == 1


def test_answers_are_written_down(tmp_path, folder, model_folder, tokenizer):
    config = harness(folder, limit=2, log_samples=str(tmp_path / "samples"))
    measured(config, (ModelView(load_model(str(model_folder))), tokenizer))
    lines = (tmp_path / "samples/some-w/choose.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 2
    assert len(json.loads(lines[0])["resps"]) == 3
    assert (tmp_path / "samples/some-w/write.jsonl").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"include_path": ["gone"]}, r"include_path: gone: no such folder"),
        ({"placeholders": {}}, r"choose.yaml: \$\{data\} has no value; write eval.harness.placeholders=\{data: ...\}"),
        ("task: [", r"broken.yaml, line \d+: not valid YAML"),
        ("include: gone.yaml\ntask: x", r"broken.yaml: cannot be read as a task: .*gone.yaml"),
    ],
)
def test_folders_that_cannot_be_read_are_one_line(folder, change, message):
    if isinstance(change, str):
        (folder / "broken.yaml").write_text(change, "utf-8")
        change = {}
    config = harness(folder, **change)
    with pytest.raises(UserError, match=message) as told:
        TaskFolders(config.include_path, config.placeholders)
    assert "\n" not in str(told.value)


def test_a_task_that_cannot_run_is_a_row_and_the_others_run(folder, model_folder, tokenizer, monkeypatch):
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    away = TASK.replace("NAME", "away").replace("KIND", "multiple_choice").replace("METRIC", "acc")
    (folder / "away.yaml").write_text(away.replace("${data}/rows.jsonl", "${data}/gone.jsonl"), "utf-8")
    unsafe = TASK.replace("NAME", "unsafe").replace("KIND", "multiple_choice").replace("METRIC", "acc")
    (folder / "unsafe.yaml").write_text(unsafe + "unsafe_code: true\n", "utf-8")
    loaded = (ModelView(load_model(str(model_folder))), tokenizer)
    found = {row.task: row for row in measured(harness(folder, tasks=["away", "unsafe", "choose"]), loaded)}
    assert "the data of away are not here" in found["away"].note
    assert "write eval.harness.confirm_run_unsafe_code=true" in found["unsafe"].note
    assert found["choose"].value is not None
    assert all("\n" not in row.note for row in found.values())
    confirmed = measured(harness(folder, tasks=["unsafe"], confirm_run_unsafe_code=True), loaded)
    assert confirmed[0].value is not None
