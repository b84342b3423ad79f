"""Several stages are the runs that one would have started by hand, and a killed one goes on where it was."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenkit.config import UserError, build, parse_yaml
from tokenkit.models.load import load_model
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.train.loop import Interrupted
from tokenkit.verbs.distill import distill
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.prepare import prepare
from tokenkit.verbs.stages import distill_stages

STAGES = [
    {"name": "embeddings", "train": {"mode": "embeddings"}},
    {"name": "adapters", "train": {"steps": 4, "save_every": 2, "seed": 1}, "losses": {"alm": {}, "clm": {}}},
]


@pytest.fixture
def values(tmp_path, model_folder, corpus):
    source = {"path": str(corpus), "separator": "\n\n"}
    return {
        "output": str(tmp_path / "out"),
        "model": {"source": str(model_folder)},
        "target_tokenizer": "byte",
        "losses": {"alm": {}},
        "data": {"source": source, "window_bytes": 80},
        "train": {
            "steps": 3,
            "batch_size": 4,
            "mode": "lora",
            "lora": {"rank": 2},
            "optimizer": {"learning_rate": 1e-2},
        },
        "eval": {"source": {**source, "max_bytes": 300}, "context_tokens": 64},
        "stages": STAGES,
    }


def final(folder):
    return load_file(folder / "model/model.safetensors")


def same(a, b):
    a, b = final(a), final(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_stages_are_the_runs_one_would_start_by_hand(values, tmp_path, model_folder):
    results = distill_stages(build(DistillRun, values), quiet=True)
    first = {key: value for key, value in values.items() if key != "stages"}
    train = values["train"]
    hand = tmp_path / "hand"
    one = first | {"output": str(hand / "one"), "train": train | {"mode": "embeddings"}}
    distill(build(DistillRun, one), quiet=True)
    two = {key: value for key, value in first.items() if key != "target_tokenizer"} | {
        "output": str(hand / "two"),
        "model": {"source": str(hand / "one/model")},
        "teacher": {"source": str(model_folder)},
        "losses": {"alm": {}, "clm": {}},
        "train": train | {"steps": 4, "save_every": 2, "seed": 1},
    }
    by_hand = distill(build(DistillRun, two), quiet=True)
    assert same(tmp_path / "out/adapters", hand / "two")
    assert results["trained_bits_per_byte"] == by_hand["trained_bits_per_byte"]
    assert results["steps"] == 7
    assert [*results["stages"]] == ["embeddings", "adapters"]
    assert results["zero_shot_bits_per_byte"] == results["stages"]["embeddings"]["zero_shot_bits_per_byte"]
    assert results == json.loads((tmp_path / "out/results.json").read_text("utf-8"))
    assert load_tokenizer(results["model"]).vocab_size == load_tokenizer("byte").vocab_size


def test_the_teacher_of_all_stages_is_the_model_before_every_change(values, model_folder):
    stage = build(DistillRun, values | {"stages": [*STAGES, {"name": "full", "train": {"mode": "full"}}]}).by_stage()
    assert [one.teacher and one.teacher.source for one in stage.values()] == [
        None,
        str(model_folder),
        str(model_folder),
    ]
    sources = [one.model.source for one in stage.values()]
    out = values["output"]
    assert sources == [str(model_folder), f"{out}/embeddings/model", f"{out}/adapters/model"]
    assert [one.target_tokenizer is None for one in stage.values()] == [False, True, True]
    distill(stage["embeddings"], quiet=True)
    sides = prepare(stage["adapters"])
    ids = torch.arange(40).view(2, 20)
    original = ModelView(load_model(str(model_folder)))
    assert torch.equal(sides.teacher.hidden(ids), original.hidden(ids))


def test_a_run_killed_in_its_second_stage_goes_on_there_and_ends_the_same(values, tmp_path):
    distill_stages(build(DistillRun, values), quiet=True)
    again = values | {"output": str(tmp_path / "again")}
    stopped = [STAGES[0], STAGES[1] | {"train": STAGES[1]["train"] | {"stop_after": 2}}]
    with pytest.raises(Interrupted):
        distill_stages(build(DistillRun, again | {"stages": stopped}), quiet=True)
    assert not (tmp_path / "again/results.json").exists()
    before = (tmp_path / "again/embeddings/metrics.jsonl").stat().st_mtime_ns
    # what a kill leaves: the run file says nothing of it
    run_file = tmp_path / "again/run.yaml"
    run_file.write_text(
        run_file.read_text("utf-8").replace("      stop_after: 2\n", "").replace("    stop_after: 2\n", "")
    )
    results = distill_stages(build(DistillRun, again), resume=True, quiet=True)
    assert same(tmp_path / "out/adapters", tmp_path / "again/adapters")
    assert (tmp_path / "again/embeddings/metrics.jsonl").stat().st_mtime_ns == before
    assert results["steps"] == 7


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"train": {}}], r"stages\.0\.name: None, where the name of a folder is needed"),
        ([{"name": "a"}, {"name": "a"}], r"stages\.1\.name: 'a' stands twice"),
        ([{"name": "a/b"}], r"stages\.0\.name: 'a/b'"),
        ([{"name": "a", "model": {"source": "x"}}], r"stages\.a\.model: the run alone says this"),
        ([{"name": "a", "trian": {}}], r"stages\.a\.trian: unknown key; did you mean 'train'\?"),
        ([{"name": "a", "train": {"steps": 0}}], r"stages\.a\.train\.steps: .*greater than or equal to 1"),
    ],
)
def test_mistakes_are_one_line_that_names_the_stage(values, stages, message):
    with pytest.raises(UserError, match=message) as told:
        build(DistillRun, values | {"stages": stages})
    assert "\n" not in str(told.value)


def test_a_mistake_that_only_shows_later_names_the_stage(values, tmp_path):
    late = [STAGES[0], {"name": "kl", "losses": {"forward_kl": {}}}]
    with pytest.raises(UserError, match=r"stages\.kl: .*forward_kl: needs one vocabulary"):
        distill_stages(build(DistillRun, values | {"stages": late}), quiet=True)
    assert (tmp_path / "out/embeddings/results.json").is_file()


def test_from_the_command_line(values, tmp_path, tokenkit):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(values), "utf-8")
    code, out, _ = tokenkit("distill", file, "--dry-run")
    shown = parse_yaml(out)
    assert code == 0
    assert [*shown] == ["embeddings", "adapters"]
    assert shown["adapters"]["train"]["mode"] == "lora"
    assert shown["adapters"]["train"]["steps"] == 4
    assert shown["embeddings"]["train"]["mode"] == "embeddings"
    assert not Path(values["output"]).exists()
    code, out, err = tokenkit("distill", file, "--quiet")
    assert code == 0, err
    assert parse_yaml(out)["model"] == f"{values['output']}/adapters/model"
    code, _, err = tokenkit("distill", file)
    assert code == 2
    assert "holds another run; add --resume" in err
