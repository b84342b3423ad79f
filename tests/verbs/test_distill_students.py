"""Students of another shape, with ternary matrices, under one teacher, several, or what one once said."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tokenkit.config import UserError, build
from tokenkit.models.bitlinear import ternary_layers
from tokenkit.models.load import load_model
from tokenkit.train.loop import Interrupted
from tokenkit.verbs.distill import distill
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.evaluate import EvalRun, evaluate
from tokenkit.verbs.model import ModelChoice, load_pair
from tokenkit.verbs.prepare import prepare
from tokenkit.verbs.record import RecordRun, record

LAYERED = {
    "forward_kl": {"weight": 1.0},
    "layer_states": {"layers": "uniform", "projector": "linear", "norm": "batchnorm"},
    "attention_relations": {"layers": "last"},
    "attention_maps": {"layers": "all_to_one"},
    "cka": {"layers": "full_cross"},
    "info_nce": {},
}


@pytest.fixture
def run(tmp_path, model_folder, corpus):
    def make(**changes):
        source = {"path": str(corpus), "separator": "\n\n"}
        train = {"steps": 4, "batch_size": 4, "log_every": 1, "optimizer": {"learning_rate": 1e-2}}
        values = {
            "output": tmp_path / "out",
            "model": {"source": str(model_folder)},
            "losses": {"forward_kl": {}},
            "data": {"source": source, "window_bytes": 80},
            "train": train | changes.pop("train", {}),
            "eval": {"source": {**source, "max_bytes": 300}, "context_tokens": 64},
        }
        return build(DistillRun, values | changes)

    return make


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def weights(folder):
    return load_file(next(folder.glob("checkpoints/step_*/model.safetensors")))


def test_a_copy_has_nothing_to_learn(run, tmp_path):
    results = distill(run(train={"steps": 1}, student={"config": {"attention_dropout": 0.0}}), quiet=True)
    first = metrics(tmp_path / "out")[0]
    assert first["loss"] == pytest.approx(0, abs=1e-6)
    assert results["zero_shot"]["kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert results["zero_shot"]["top1_agreement"] == 1


def test_fewer_layers_learn_from_every_kind_of_pair(run, tmp_path):
    results = distill(run(student={"layers": 1}, losses=LAYERED, train={"steps": 8}), quiet=True)
    logged = metrics(tmp_path / "out")
    assert results["student"]["layers"] == [0]
    assert results["student"]["parameters_after"] < results["student"]["parameters_before"]
    assert all(f"loss/{name}" in logged[0] for name in LAYERED)
    trained = [line["loss"] for line in logged if "loss" in line]
    assert sum(trained[-2:]) < sum(trained[:2])
    assert results["retention"] == results["teacher_bits_per_byte"] / results["trained_bits_per_byte"]
    again = load_model(str(tmp_path / "out/model"))
    assert again.config.num_hidden_layers == 1


@pytest.mark.parametrize("changes", [{"student": {"layers": 1}, "losses": LAYERED}, {"ternary": {"warmup_steps": 3}}])
def test_a_run_that_was_stopped_ends_with_the_same_weights(run, tmp_path, changes):
    steps = {"steps": 4, "accumulation": 2}
    distill(run(train=steps, **changes), quiet=True)
    halted = {"output": tmp_path / "halted", **changes}
    with pytest.raises(Interrupted):
        distill(run(train={**steps, "stop_after": 2}, **halted), quiet=True)
    distill(run(train=steps, **halted), resume=True, quiet=True)
    one, other = (weights(tmp_path / name) for name in ("out", "halted"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_learnt_parts_are_there_before_the_optimizer_and_in_the_checkpoint(run, tmp_path):
    distill(run(losses=LAYERED, train={"steps": 1}), quiet=True)
    names = weights(tmp_path / "out").keys()
    assert any(name.startswith("projectors.paired.layer_states.") for name in names)
    assert "projectors.paired.cka.parts.logits" in names
    state = load_file(tmp_path / "out/checkpoints/step_00000001/state.safetensors")
    assert any("running" in name for name in state)


def test_whitening_is_measured_once(run, tmp_path, monkeypatch):
    losses = {"layer_states": {"projector": "orthogonal", "norm": "whiten_zca", "norm_sides": "teacher"}}
    kept = {"teacher_statistics": {"folder": str(tmp_path / "kept"), "rows": 12}, "losses": losses}
    first = distill(run(train={"steps": 1}, **kept), quiet=True)

    def refuse(*arguments):
        raise AssertionError("measured again")

    monkeypatch.setattr("tokenkit.models.statistics.measure", refuse)
    second = distill(run(train={"steps": 1}, output=tmp_path / "again", **kept), quiet=True)
    assert first["trained_bits_per_byte"] == second["trained_bits_per_byte"]
    with pytest.raises(AssertionError, match="measured again"):
        distill(run(output=tmp_path / "other", **kept | {"teacher_statistics": {"rows": 12}}), quiet=True)


def test_labels_alone_are_plain_training(run, tmp_path):
    mixed = {"clm": {"weight": 1.0}, "forward_kl": {"weight": 0.0}, "layer_states": {"weight": 0.0}}
    for name, losses in (("plain", {"clm": {}}), ("mixed", mixed)):
        distill(run(output=tmp_path / name, losses=losses), quiet=True)
    plain, mixed = (weights(tmp_path / name) for name in ("plain", "mixed"))
    assert plain.keys() == mixed.keys()
    assert all(torch.equal(plain[name], mixed[name]) for name in plain)


def test_text_of_its_own_is_learnt_from_and_none_of_it_changes_nothing(run, tmp_path):
    small = {"student": {"layers": 1}}
    plain = distill(run(**small), quiet=True)
    none = distill(run(output=tmp_path / "none", on_policy={"share": 0}, **small), quiet=True)
    assert plain["trained_bits_per_byte"] == none["trained_bits_per_byte"]
    own = {"on_policy": {"share": 1.0, "prompt_tokens": 2, "max_new_tokens": 8}, **small}
    found = distill(run(output=tmp_path / "own", **own), quiet=True)
    assert found["trained_bits_per_byte"] != plain["trained_bits_per_byte"]


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "jsd"])
def test_divergences_without_logits_are_those_with_them(run, tmp_path, kind):
    name = {"kl": "forward_kl"}.get(kind, kind)
    pair = ({name: {"temperature": 2.0}}, {"chunked_divergence": {"kind": kind, "temperature": 2.0, "chunk": 5}})
    for folder, losses in zip(("whole", "chunked"), pair):
        distill(run(output=tmp_path / folder, student={"layers": 1}, losses=losses), quiet=True)
    whole, chunked = (metrics(tmp_path / folder) for folder in ("whole", "chunked"))
    assert [line["loss"] for line in chunked[:4]] == pytest.approx(
        [line["loss"] for line in whole[:4]], rel=1e-4, abs=1e-7
    )


def test_what_is_frozen_stays(run, tmp_path):
    sides = prepare(run(student={"freeze": ["embed_tokens"]}))
    before = {name: p.detach().clone() for name, p in sides.student.model.named_parameters()}
    frozen = {name for name, p in sides.student.model.named_parameters() if not p.requires_grad}
    assert frozen == {"model.embed_tokens.weight"}  # tied: the head is frozen with it
    distill(run(student={"freeze": ["embed_tokens"]}, losses={"clm": {}}), quiet=True)
    after = dict(load_model(str(tmp_path / "out/model")).named_parameters())
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen


def test_two_teachers_of_one_mind_are_one(run, tmp_path, model_folder):
    one = {"student": {"layers": 1}, "teacher": {"source": str(model_folder)}}
    two = {"student": {"layers": 1}, "teachers": [{"source": str(model_folder), "weight": w} for w in (1, 3)]}
    found = [distill(run(output=tmp_path / str(i), **c), quiet=True) for i, c in enumerate((one, two))]
    assert found[1]["trained_bits_per_byte"] == pytest.approx(found[0]["trained_bits_per_byte"], abs=1e-4)
    assert found[1]["teacher_bits_per_byte"] == pytest.approx(found[0]["teacher_bits_per_byte"], abs=1e-5)
    with pytest.raises(UserError, match="teachers: beside teacher or record"):
        run(**two, teacher={"source": str(model_folder)})
    states = run(output=tmp_path / "no", **two | {"losses": {"layer_states": {}}})
    with pytest.raises(UserError, match="teachers: a loss asks for"):
        distill(states, quiet=True)


def test_a_record_of_all_ids_teaches_what_the_teacher_does(run, tmp_path, model_folder, bpe):
    live = run(student={"layers": 1}, losses={"forward_kl": {}})
    section = {"source": str(model_folder)}
    values = {"output": tmp_path / "record", "teacher": section, "data": live.data, "top_k": bpe.vocab_size}
    record(build(RecordRun, values | {"data": live.data.model_dump()}), quiet=True)
    offline = run(
        output=tmp_path / "offline",
        student={"layers": 1},
        record=tmp_path / "record",
        losses={"top_k_kl": {"top_k": bpe.vocab_size}},
    )
    online, recorded = distill(live, quiet=True), distill(offline, quiet=True)
    for here, there in zip(metrics(tmp_path / "out"), metrics(tmp_path / "offline")):
        assert there.get("loss") == pytest.approx(here.get("loss"), abs=1e-5)
    assert recorded["trained_bits_per_byte"] == pytest.approx(online["trained_bits_per_byte"], abs=1e-4)


MAMBA = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
MIXTRAL = {"model_type": "mixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
MIXTRAL |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}


@pytest.mark.parametrize("config", [MAMBA, MIXTRAL], ids=["mamba", "mixtral"])
def test_any_causal_language_model_can_be_the_student(run, tmp_path, config):
    student = {"config": config, "start": "random"}
    results = distill(run(student=student, train={"steps": 12}), quiet=True)
    assert results["trained"]["kl_to_teacher"] < results["zero_shot"]["kl_to_teacher"]
    assert load_model(str(tmp_path / "out/model")).config.model_type == config["model_type"]


def test_a_ternary_student_is_written_to_be_used_and_to_be_trained_on(run, tmp_path):
    results = distill(run(ternary={"warmup_steps": 2}, train={"steps": 4, "eval_at": [0]}), quiet=True)
    folder = tmp_path / "out"
    assert len(results["ternary"]["converted"]) == 14
    assert results["trained"]["ternary/strength"] == 1
    model, _ = load_pair(ModelChoice(source=str(folder / "model")), "cpu")
    assert len(ternary_layers(model)) == 14
    source = run().eval.source.model_dump()
    for name, tolerance in (("model", 1e-5), ("ternary", 2e-2)):  # embeddings are bfloat16 in the packed one
        values = {"model": {"source": str(folder / name)}, "eval": {"source": source, "context_tokens": 64}}
        found = evaluate(build(EvalRun, values))
        assert found["bits_per_byte"] == pytest.approx(results["trained_bits_per_byte"], rel=tolerance)
    with pytest.raises(UserError, match="nothing left to train"):
        load_pair(ModelChoice(source=str(folder / "ternary")), "cpu")


def test_mistakes_are_one_line_before_a_file_is_written(run, tmp_path):
    with pytest.raises(UserError, match=r"ternary.warmup_steps: 9, but the run ends after 4"):
        run(ternary={"warmup_steps": 9})
    with pytest.raises(UserError, match=r"train.mode: 'lora' beside ternary"):
        run(ternary={}, train={"mode": "lora"})
    with pytest.raises(UserError, match=r"losses.cka.token_weight: has a value per row"):
        distill(run(losses={"cka": {"token_weight": "entropy"}}), quiet=True)
    with pytest.raises(UserError, match="num_hidden_layer"):
        distill(run(student={"config": {"num_hiden_layers": 1}}), quiet=True)
    assert not (tmp_path / "out").exists()
