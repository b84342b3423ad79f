"""A set holds exactly the rows that were asked for, the same ones however they were drawn, and says what it is."""

import hashlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tokenkit.config import UserError, build, dump_yaml, parse_yaml, resolved
from tokenkit.data.batch import Batches
from tokenkit.data.corpus import DataConfig, read_training_rows
from tokenkit.data.source import SourceConfig, read_documents
from tokenkit.data.synthetic import read_metadata, read_rows_of_set, read_shard, shards_of, text_of
from tokenkit.models import engines
from tokenkit.models.load import load_model
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.verbs import synthesize as verb
from tokenkit.verbs.synthesize import SynthesizeRun, synthesize

TURNS = """{%- for m in messages %}{{ '<|endoftext|>' + m.role + ' ' + m.content + '<|endoftext|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|endoftext|>assistant ' }}{% endif %}"""


@pytest.fixture
def run(tmp_path, model_folder):
    def make(name="set", **changes) -> SynthesizeRun:
        sampling = {"max_new_tokens": 9, "temperature": 1.0, **changes.pop("sampling", {})}
        values = {"output": tmp_path / name, "teacher": {"source": str(model_folder)}, "samples": 7, "shard_rows": 3}
        return build(SynthesizeRun, {**values, "sampling": sampling, **changes})

    return make


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.yaml"}


def rows(folder: Path) -> list[dict]:
    return list(read_rows_of_set(folder))


def test_a_set_from_the_start_token(run, tmp_path, model_folder, bpe):
    printed = synthesize(run(), quiet=True)
    folder = tmp_path / "set"
    assert [len(list(read_shard(path))) for path in shards_of(folder)] == [3, 3, 1]
    found = rows(folder)
    assert [row["number"] for row in found] == list(range(7))
    for row in found:
        assert row["ids"][: row["given"]] == [bpe.start_id()]
        assert row["text"] == text_of(bpe, row["ids"])
        assert 1 <= len(row["ids"]) - 1 <= 9
        assert row["ended"] == (row["ids"][-1] == bpe.eos_id)
    about = read_metadata(folder)
    assert {key: about[key] for key in printed if key != "output"} == {
        k: v for k, v in printed.items() if k != "output"
    }
    assert about["teacher"] == str(model_folder)
    assert about["teacher_weights"]
    assert about["temperature"] == "constant(start=1.0, horizon=9)"
    assert (about["seed"], about["top_k"], about["top_p"], about["max_new_tokens"]) == (0, None, 1.0, 9)
    drawn = [row["ids"][1:] for row in found]
    tokens = sum(map(len, drawn))
    pairs = [pair for ids in drawn for pair in pairwise(ids)]
    assert about["rows"] == 7
    assert about["mean_new_tokens"] == tokens / 7
    assert about["distinct_1"] == len({i for ids in drawn for i in ids}) / tokens
    assert about["distinct_2"] == len(set(pairs)) / len(pairs)
    assert about["duplicate_rate"] == 0
    assert about["teacher_perplexity"] == pytest.approx(math.exp(-slow_logp(model_folder, found) / tokens), rel=1e-5)
    again = [bpe.encode(row["text"]).ids.tolist() for row in found]
    assert about["tokenised_alike"] == sum(a == [i for i in d if i != bpe.eos_id] for a, d in zip(again, drawn)) / 7
    assert about["tokenised_alike"] < 1  # a random model writes tokens that its tokenizer would not


@torch.no_grad()
def slow_logp(folder, found) -> float:
    model = load_model(str(folder))
    total = 0.0
    for row in found:
        logp = model(torch.tensor([row["ids"]])).logits[0].double().log_softmax(-1)
        total += sum(float(logp[t - 1, row["ids"][t]]) for t in range(row["given"], len(row["ids"])))
    return total


def test_the_set_does_not_depend_on_the_batch_or_the_shards(run, tmp_path):
    changes = {"sampling": {"temperature": {"kind": "exponential", "start": 4, "end": 0.7, "speed": 2}}}
    for name, batch_size, shard_rows in (("one", 1, 3), ("three", 3, 3), ("eight", 8, 3), ("whole", 8, 50)):
        synthesize(run(name, batch_size=batch_size, shard_rows=shard_rows, **changes), quiet=True)
    near = pytest.approx
    wanted = rows(tmp_path / "one")
    for name in ("three", "eight", "whole"):
        found = rows(tmp_path / name)
        assert [row["ids"] for row in found] == [row["ids"] for row in wanted]
        assert [row["logp"] for row in found] == near([row["logp"] for row in wanted], abs=1e-4)
    synthesize(run("again", batch_size=3, **changes), quiet=True)
    assert files(tmp_path / "again") == files(tmp_path / "three")  # the same run, the same bytes
    synthesize(run("other", batch_size=3, seed=1, **changes), quiet=True)
    assert [row["ids"] for row in rows(tmp_path / "other")] != [row["ids"] for row in wanted]


def test_an_interrupted_set_goes_on_and_can_grow(run, tmp_path, monkeypatch):
    whole = {"samples": 11, "dedupe": True}
    synthesize(run("whole", **whole), quiet=True)
    draw, calls = engines.BuiltinEngine.draw, []

    def falls(self, prompts, numbers, **options):
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(self, prompts, numbers, **options)

    monkeypatch.setattr(engines.BuiltinEngine, "draw", falls)
    with pytest.raises(KeyboardInterrupt):
        synthesize(run(**whole), quiet=True)
    with pytest.raises(UserError, match="finish the set with"):
        read_metadata(tmp_path / "set")
    assert len(shards_of(tmp_path / "set")) == 2
    with pytest.raises(UserError, match="add --resume"):
        synthesize(run(**whole), quiet=True)
    synthesize(run(**whole), resume=True, quiet=True)
    assert files(tmp_path / "set") == files(tmp_path / "whole")
    synthesize(run("grown", samples=7, dedupe=True), quiet=True)
    synthesize(run("grown", **whole), resume=True, quiet=True)
    assert [row["ids"] for row in rows(tmp_path / "grown")] == [row["ids"] for row in rows(tmp_path / "whole")]
    with pytest.raises(UserError, match="holds 11 rows already"):
        synthesize(run("grown", samples=7, dedupe=True), resume=True, quiet=True)
    with pytest.raises(UserError, match="seed differ"):
        synthesize(run("grown", seed=5, **whole), resume=True, quiet=True)


def test_a_damaged_shard_is_drawn_again(run, tmp_path, caplog):
    synthesize(run(), quiet=True)
    before = files(tmp_path / "set")
    second = shards_of(tmp_path / "set")[1]
    second.write_bytes(second.read_bytes()[:-20])
    with pytest.raises(UserError, match="missing or changed"):
        rows(tmp_path / "set")
    synthesize(run(), resume=True, quiet=True)
    assert "it is drawn again" in caplog.text
    assert files(tmp_path / "set") == before


@pytest.mark.slow
def test_a_killed_run_goes_on_without_duplicates(run, tmp_path):
    made = run("killed", samples=24, shard_rows=2, dedupe=True, batch_size=1)
    file = tmp_path / "run.yaml"
    file.write_text(dump_yaml(resolved(made)), "utf-8")
    command = [sys.executable, "-m", "tokenkit.cli", "synthesize", str(file), "-q"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (tmp_path / "killed" / "shard_000003.jsonl.gz").exists():
        assert process.poll() is None, "it was over before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "metadata.json").exists()
    assert subprocess.run([*command, "--resume"], check=True, capture_output=True).returncode == 0
    found = rows(tmp_path / "killed")
    assert len({row["text"] for row in found}) == len(found) == 24
    synthesize(run("whole", samples=24, shard_rows=2, dedupe=True, batch_size=1), quiet=True)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_duplicates_are_drawn_again(run, tmp_path):
    few = {"samples": 30, "shard_rows": 10, "sampling": {"max_new_tokens": 1, "temperature": 0.8}}
    plain = synthesize(run("plain", **few), quiet=True)
    texts = [row["text"] for row in rows(tmp_path / "plain")]
    assert plain["duplicate_rate"] == (30 - len(set(texts))) / 30 > 0
    clean = synthesize(run("clean", dedupe=True, **few), quiet=True)
    found = rows(tmp_path / "clean")
    assert len({row["text"] for row in found}) == 30 == clean["rows"]
    assert clean["duplicate_rate"] == 0
    assert clean["sequences_drawn"] == found[-1]["number"] + 1 > 30
    assert clean["rejected_rate"] == pytest.approx(1 - 30 / clean["sequences_drawn"])
    kept = {row["number"]: row["text"] for row in found}
    assert all(kept[n] == text for n, text in enumerate(texts) if n in kept)  # the sequences are the same
    stuck = {"samples": 300, "shard_rows": 300, "batch_size": 300, "sampling": {"temperature": 0, "max_new_tokens": 1}}
    with pytest.raises(UserError, match=r"raise sampling\.temperature"):
        synthesize(run("stuck", dedupe=True, **stuck), quiet=True)


def test_texts_go_on(run, tmp_path, corpus, documents, bpe):
    prompts = {"path": str(corpus), "separator": "\n\n", "max_bytes": 700}
    synthesize(run(mode="prompts", prompts=prompts, prompt_tokens=4), quiet=True)
    texts = read_documents(build(SourceConfig, prompts))
    for row in rows(tmp_path / "set"):
        beginning = bpe.encode(texts[row["number"] % len(texts)]).ids.tolist()[:4]
        assert row["ids"][: row["given"]] == [bpe.start_id(), *beginning]
        assert row["text"].startswith(bpe.decode(beginning))


def test_a_set_is_training_text_and_reading_it_leaves_nothing_behind(run, tmp_path, bpe):
    synthesize(run(), quiet=True)
    config = build(DataConfig, {"source": {"path": str(tmp_path / "set")}, "window_bytes": 40})
    before = sorted(p.name for p in tmp_path.rglob("*"))
    for _ in range(3):
        windows = read_training_rows(config)
        assert {w.document for w in windows} == set(range(7))
        assert Batches(windows, bpe, bpe, batch_size=2, seed=0).at(0)[0].num_tokens > 0
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    assert read_documents(config.source) == [row["text"] for row in rows(tmp_path / "set")]


class Scripted:
    """An engine that says what it is told to, by stream."""

    name = "scripted"

    def __init__(self, tokenizer, said):
        self.tokenizer, self.said, self.asked = tokenizer, said, []

    def check(self, prompt_tokens):
        assert prompt_tokens > 0

    def draw(self, prompts, numbers, *, stream=0, until=None):
        self.asked += [(stream, number, self.tokenizer.decode(prompt)) for prompt, number in zip(prompts, numbers)]
        found = []
        for number in numbers:
            whole = self.tokenizer.encode(self.said[stream](number)).ids.tolist()
            stop = next((n for n in range(1, len(whole) + 1) if until is not None and until(whole[:n])), len(whole))
            found.append(engines.Sampled(whole[:stop], -1.0, False))
        return found


def scripted(monkeypatch, tokenizer, question, answer) -> Scripted:
    engine = Scripted(tokenizer, {0: question, 1: answer})
    monkeypatch.setattr(verb, "_engine", lambda run: (engine, tokenizer))
    return engine


def test_questions_and_answers_about_texts(run, tmp_path, monkeypatch, corpus, bpe):
    engine = scripted(
        monkeypatch,
        bpe,
        lambda n: "\n" if n == 2 else f" who sat {n}?\nnothing more",
        lambda n: " " if n == 1 else " the cat {question}\n\nand",
    )
    prompts = {"path": str(corpus), "separator": "\n\n", "max_bytes": 700}
    found = synthesize(run(mode="qa", prompts=prompts, prompt_tokens=5), quiet=True)
    made = rows(tmp_path / "set")
    assert [row["number"] for row in made] == [0, 3, 4, 5, 6, 7, 8]  # 1 has no answer, 2 no question
    assert found["rejected_rate"] == pytest.approx(2 / 9)
    texts = read_documents(build(SourceConfig, prompts))
    text = bpe.decode(bpe.encode(texts[0]).ids.tolist()[:5])
    assert made[0]["messages"] == [
        {"role": "user", "content": f"{text}\n\nwho sat 0?"},
        {"role": "assistant", "content": "the cat {question}"},
    ]
    assert engine.asked[0] == (0, 0, f"{text}\n\nQuestion:")
    assert (1, 0, f"{text}\n\nQuestion: who sat 0?\nAnswer:") in engine.asked
    assert not any(stream == 1 and number == 2 for stream, number, _ in engine.asked)
    assert b"nothing" not in b"".join(bpe.token_bytes[i] for row in made for ids in row["drawn"] for i in ids)
    chat = build(DataConfig, {"source": {"path": str(tmp_path / "set")}, "format": "chat"})
    assert len(read_training_rows(chat)) == 7


def test_instructions_by_a_teacher_with_turns(run, tmp_path, model_folder):
    folder = tmp_path / "chat"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").write_text(TURNS, "utf-8")
    teacher, tokenizer = {"source": str(folder)}, load_tokenizer(str(folder))
    synthesize(run(mode="instruct", teacher=teacher, pairs={"chat": True}, sampling={"max_new_tokens": 12}), quiet=True)
    made = rows(tmp_path / "set")
    assert len(made) == 7
    for row in made:
        question, answer = row["messages"]
        assert question["content"] == text_of(tokenizer, row["drawn"][0]).strip() != ""
        assert answer["content"] == text_of(tokenizer, row["drawn"][1]).strip() != ""
        assert row["drawn"][0] != row["drawn"][1]


def test_what_does_not_fit_a_mode(run, corpus):
    source = {"path": str(corpus)}
    for changes, message in (
        ({"mode": "prompts"}, "prompts: mode=prompts needs texts"),
        ({"prompts": source}, "prompts: mode=sequences reads none"),
        ({"mode": "qa"}, "prompts: mode=qa needs texts"),
        ({"mode": "instruct", "prompts": source}, "prompts: mode=instruct reads none"),
        ({"pairs": {"chat": True}}, "pairs: means nothing to mode=sequences"),
        ({"mode": "instruct", "pairs": {"answer": "Answer:"}}, r"pairs.answer: 'Answer:' has no \{question\}"),
        ({"samples": 0}, "samples"),
        ({"sampling": {"temperature": {"kind": "linear", "start": 1}}}, "temperature.end: missing"),
    ):
        with pytest.raises(UserError, match=message):
            run(**changes)
    run(mode="instruct", prompts=source, pairs={"question": "{text} Task:"})


def test_sequences_longer_than_the_model_are_refused_before_a_file_is_written(run, corpus):
    for changes in ({}, {"mode": "prompts", "prompts": {"path": str(corpus)}, "prompt_tokens": 8}):
        with pytest.raises(UserError, match="the model has 256 positions"):
            synthesize(run(sampling={"max_new_tokens": 257}, **changes), quiet=True)
    with pytest.raises(UserError, match="token 9 of 9 new ones"):
        synthesize(run(sampling={"temperature": {"kind": "first_then", "start": 2, "end": 1, "first": 9}}), quiet=True)
    assert not run().output.exists()


class StubLLM:
    """vLLM's interface as far as it is used, over full forward passes; remembers what it was asked."""

    asked: list = []

    def __init__(self, model, revision, skip_tokenizer_init, seed):
        self.model = load_model(model)
        self.llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(max_model_len=64))

    @torch.no_grad()
    def generate(self, prompts, sampling_params, use_tqdm):
        found = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            type(self).asked.append((list(prompt["prompt_token_ids"]), params))
            ids, places = list(prompt["prompt_token_ids"]), []
            generator = torch.Generator().manual_seed(params.seed)
            while len(places) < params.max_tokens:
                logits = self.model(torch.tensor([ids])).logits[0, -1].double()
                logp = logits.log_softmax(-1)
                barred = [*params.logit_bias, *(params.stop_token_ids if len(places) < params.min_tokens else ())]
                logits[barred] = -torch.inf
                if params.temperature == 0:
                    chosen = int(logits.argmax())
                else:
                    chosen = int((logits / params.temperature).softmax(-1).multinomial(1, generator=generator))
                ids.append(chosen)
                places.append({chosen: types.SimpleNamespace(logprob=float(logp[chosen]))})
                if chosen in params.stop_token_ids:
                    break
            one = types.SimpleNamespace(token_ids=tuple(ids[-len(places) :]), logprobs=places)
            found.append(types.SimpleNamespace(outputs=[one]))
        return found


@pytest.fixture
def stub(monkeypatch):
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams, module.__version__ = StubLLM, types.SimpleNamespace, "0.stub"
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(StubLLM, "asked", [])
    return module


def test_vllm_takes_the_likeliest_as_the_builtin_engine_does(run, tmp_path, stub, corpus):
    prompts = {"path": str(corpus), "separator": "\n\n", "max_bytes": 700}
    greedy = {"mode": "prompts", "prompts": prompts, "prompt_tokens": 3, "sampling": {"temperature": 0}}
    synthesize(run("builtin", **greedy), quiet=True)
    synthesize(run("vllm", engine="vllm", **greedy), quiet=True)
    ours, theirs = rows(tmp_path / "builtin"), rows(tmp_path / "vllm")
    assert [row["ids"] for row in theirs] == [row["ids"] for row in ours]
    assert [row["logp"] for row in theirs] == pytest.approx([row["logp"] for row in ours], abs=1e-4)
    assert read_metadata(tmp_path / "vllm")["engine"] == "vllm 0.stub"


def test_vllm_draws_a_hot_first_token_and_goes_on_cooler(run, tmp_path, stub, bpe):
    sampling = {"temperature": {"kind": "first_then", "start": 10, "end": 0.5}, "end_of_text": "forbid", "top_p": 0.9}
    synthesize(run(engine="vllm", samples=3, sampling=sampling), quiet=True)
    first, then = StubLLM.asked[:3], StubLLM.asked[3:]
    assert [(p.temperature, p.max_tokens, p.min_tokens) for _, p in first] == [(10.0, 1, 1)] * 3
    assert [(p.temperature, p.max_tokens, p.min_tokens) for _, p in then] == [(0.5, 8, 0)] * 3
    for (ids, one), (longer, other), row in zip(first, then, rows(tmp_path / "set"), strict=True):
        assert longer[: len(ids)] == ids == [bpe.start_id()]
        assert row["ids"][: len(longer)] == longer
        assert len(row["ids"]) == 10
        assert one.top_p == 0.9
        assert one.seed != other.seed
        assert set(one.logit_bias) >= bpe.special_ids


def test_vllm_that_is_not_there_or_cannot(run, monkeypatch, stub):
    many = {"temperature": {"kind": "exponential", "start": 10, "end": 0.5}}
    with pytest.raises(UserError, match="write kind=first_then, or engine=builtin"):
        synthesize(run(engine="vllm", sampling=many), quiet=True)
    with pytest.raises(UserError, match="the engine reads 64; write less"):
        synthesize(run(engine="vllm", sampling={"max_new_tokens": 64}), quiet=True)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="pip install vllm, or write engine=builtin") as caught:
        synthesize(run(engine="vllm"), quiet=True)
    assert "\n" not in str(caught.value)
    assert not run().output.exists()


def test_the_command(tokenkit, tmp_path, model_folder):
    words = ("synthesize", "-q", f"output={tmp_path / 'set'}", f"teacher.source={model_folder}", "samples=2")
    code, out, error = tokenkit(
        *words, "sampling={max_new_tokens: 4, temperature: {kind: first_then, start: 3, end: 1}}"
    )
    assert code == 0, error
    assert parse_yaml(out)["rows"] == 2
    sealed = hashlib.sha256((tmp_path / "set" / "shard_000000.jsonl.gz").read_bytes()).hexdigest()
    assert read_metadata(tmp_path / "set")["shards"] == {"shard_000000.jsonl.gz": sealed}
    code, _, error = tokenkit(*words, "sampling.temperature.kind=linear")
    assert code == 2
    assert "temperature.start: missing" in error
