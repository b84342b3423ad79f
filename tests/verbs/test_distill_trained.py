"""What a run trains, from its run file on: adapters and what they leave, rows of tables, and a prefix."""

import json

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tokenkit.align.vocabulary import ids_in_use
from tokenkit.config import UserError, build
from tokenkit.models.load import head_matrix, input_matrix
from tokenkit.models.lora import adapters
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.train.loop import Interrupted
from tokenkit.transfer.new_rows import new_rows
from tokenkit.verbs.distill import distill
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.model import ModelChoice, load_pair
from tokenkit.verbs.prepare import prepare

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft asks
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True:UserWarning"),
]
IDS = torch.tensor([[5, 70, 101, 32, 97, 120]])


@pytest.fixture
def values(tmp_path, model_folder, corpus):
    """The keys of a run of a second; keywords change them."""

    def make(**changes):
        source = {"path": str(corpus), "separator": "\n\n"}
        train = {"steps": 6, "batch_size": 4, "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1}}
        values = {
            "output": str(tmp_path / "out"),
            "model": {"source": str(model_folder)},
            "target_tokenizer": "byte",
            "losses": {"alm": {}},
            "data": {"source": source, "window_bytes": 80},
            "train": train | changes.pop("train", {}),
            "eval": {"source": {**source, "max_bytes": 300}, "context_tokens": 64},
        }
        return {key: value for key, value in (values | changes).items() if value is not None}

    return make


@pytest.fixture
def run(values):
    return lambda **changes: build(DistillRun, values(**changes))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(ids).logits


DETAILED = {
    "rank": 4,
    "alpha": 8.0,
    "dora": True,
    "rslora": True,
    "target_regex": [r".*self_attn.*_proj"],
    "layers": ["1"],
    "modules_to_save": ["norm", "up_proj"],
}


@pytest.mark.parametrize("untie", [False, True])
def test_a_self_taught_run_leaves_its_teacher_alone_and_an_adapter_behind(run, model_folder, tmp_path, untie):
    changes = {"train": {"steps": 20, "mode": "lora", "lora": DETAILED}, "transfer": {"untie": untie}}
    seen = []
    made = {}

    def watched(*args, **options):
        sides = prepare(*args, **options)
        needs, ids = {"logits", "hidden", "layers"}, torch.arange(40).view(2, 20)
        made["sides"] = sides
        with torch.no_grad():
            seen.append(lambda: sides.teacher.leaves(needs, ids, ids))
            seen.append(sides.teacher.leaves(needs, ids, ids))
        return sides

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenkit.verbs.distill.prepare", watched)
        distill(run(**changes), quiet=True)
    with torch.no_grad():
        after = seen[0]()
    assert all(torch.equal(after[name], before) for name, before in seen[1].items())
    student = made["sides"].student.model
    assert {name.split(".")[2] for name in adapters(student)} == {"1"}
    assert len(adapters(student)) == 4

    choice = ModelChoice(source=str(model_folder), adapter=tmp_path / "out/adapter")
    loaded, tokenizer = load_pair(choice, "cpu")
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out/model"))
    assert tokenizer.vocab_size == load_tokenizer("byte").vocab_size
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(student), expected, atol=1e-5, rtol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(model_folder, tie_word_embeddings=not untie)
    base.resize_token_embeddings(expected.shape[-1], mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "out/adapter"))
    torch.testing.assert_close(logits(theirs), expected, atol=1e-5, rtol=1e-5)
    settings = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["use_dora"]) == (str(model_folder), True)
    assert settings["modules_to_save"] == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
        "model.norm",
    ]


def test_no_adapter_where_there_is_no_base_for_it(run, model_folder, tmp_path):
    lora = {"steps": 1, "mode": "lora", "lora": {"rank": 2}}
    distill(run(train=lora, student={"layers": 1}, target_tokenizer=None, losses={"forward_kl": {}}), quiet=True)
    assert (tmp_path / "out/model").is_dir()
    assert not (tmp_path / "out/adapter").exists()


def test_without_a_new_tokenizer_and_trained_tables_the_adapter_is_only_that(run, model_folder, tmp_path):
    train = {"steps": 2, "mode": "lora", "embeddings": "none", "lora": {"rank": 2}}
    distill(run(train=train, target_tokenizer=None, losses={"clm": {}}), quiet=True)
    names = {*load_file(tmp_path / "out/adapter/adapter_model.safetensors")}
    assert names
    assert all(".lora_" in name for name in names)
    loaded, _ = load_pair(ModelChoice(source=str(model_folder), adapter=tmp_path / "out/adapter"), "cpu")
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out/model"))
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("mode", "untie"), [("full", False), ("lora", True), ("embeddings", False)])
def test_new_rows_alone_are_trained(run, tmp_path, unigram, mode, untie):
    unigram.save(tmp_path / "target")
    changes = {"target_tokenizer": str(tmp_path / "target"), "transfer": {"untie": untie}}
    changes |= {"train": {"mode": mode, "embeddings": "new_rows", "lora": {"rank": 2}}}
    begun = prepare(run(**changes))
    old = [table.detach().clone() for table in (input_matrix(begun.student.model), head_matrix(begun.student.model))]
    rows = begun.trained.new_rows
    assert 0 < rows.sum() < len(rows)
    distill(run(**changes), quiet=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    for before, table in zip(old, (input_matrix(model), head_matrix(model))):
        assert torch.equal(table[~rows], before[~rows])
        assert not torch.equal(table[rows], before[rows])


def test_new_rows_are_those_whose_token_the_old_tokenizer_lacks(bpe, unigram):
    rows = new_rows(bpe, unigram, source_rows=bpe.vocab_size, rows=unigram.vocab_size + 2)
    spelled = {*bpe.token_bytes}
    used = ids_in_use(unigram)
    assert {spelling for spelling, i in used.items() if not rows[i]} == used.keys() & spelled
    assert rows[[i for i in range(unigram.vocab_size) if i not in {*used.values(), *unigram.special_ids}]].all()
    assert not rows[[unigram.bos_id, unigram.eos_id]].any()
    assert rows[-2:].all()
    assert not new_rows(bpe, bpe, source_rows=bpe.vocab_size, rows=bpe.vocab_size).any()
    chosen = unigram.token_bytes.index(b"a")
    assert new_rows(bpe, unigram, source_rows=320, rows=unigram.vocab_size, override={"a": "b"})[chosen]


def test_no_rows_at_all(run, tmp_path):
    changes = {"train": {"mode": "full", "embeddings": "none"}, "transfer": {"untie": True}}
    begun = prepare(run(**changes)).student.model
    trained = {name for name, p in begun.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in begun.named_parameters()} - {"model.embed_tokens.weight", "lm_head.weight"}
    distill(run(**changes), quiet=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    for before, table in zip((input_matrix(begun), head_matrix(begun)), (input_matrix(model), head_matrix(model))):
        assert torch.equal(table, before)
    named = {"mode": "lora", "embeddings": "none", "lora": {"rank": 2, "modules_to_save": ["embed_tokens"]}}
    sides = prepare(run(train=named))
    assert input_matrix(sides.student.model).requires_grad


PREFIX = {"steps": 3, "learning_rate": 0.02, "layers": 1}


@pytest.mark.parametrize(("mode", "stops"), [("full", (1,)), ("full", (3,)), ("lora", (2, 4))])
def test_a_run_with_a_prefix_resumes_bit_for_bit(run, tmp_path, unigram, mode, stops):
    unigram.save(tmp_path / "target")
    train = {"mode": mode, "lora": {"rank": 2, "dropout": 0.1}, "prefix": PREFIX, "log_every": 1}
    same = {"target_tokenizer": str(tmp_path / "target")}
    whole = distill(run(**same, train=train, output=str(tmp_path / "whole")), quiet=True)
    same["output"] = str(tmp_path / "parts")
    for number, stop in enumerate(stops):
        part = run(**same, train={**train, "stop_after": stop})
        with pytest.raises(Interrupted):
            distill(part, resume=number > 0, quiet=True)
    parts = distill(run(**same, train=train), resume=True, quiet=True)
    assert parts["trained_bits_per_byte"] == whole["trained_bits_per_byte"]
    weights = [load_file(tmp_path / f"{name}/model/model.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    lines = (tmp_path / "whole/metrics.jsonl").read_text("utf-8").splitlines()
    rates = [row["learning_rate"] for row in map(json.loads, lines) if "learning_rate" in row]
    assert rates[:3] == pytest.approx([0.02 / 3, 0.04 / 3, 0.02])
    assert rates[3] == 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embeddings": "new_rows"}, "train.embeddings: new_rows, but the run has no target_tokenizer"),
        ({"embeddings": "none", "mode": "embeddings"}, "leaves nothing to train"),
        ({"prefix": {"steps": 2, "learning_rate": 1.0}}, "non_overlapping_embeddings, but the run has no target"),
        ({"prefix": {**PREFIX, "steps": 6, "trainable": "none"}}, "train.prefix.steps: 6 of 6 train.steps"),
        ({"mode": "lora", "lora": {"layers": ["0-2"]}}, "lora layers: '0-2', where the model has layers 0 to 1"),
        ({"mode": "lora", "lora": {"targets": ["q"], "target_regex": ["q"]}}, "train.lora.target_regex: q beside targ"),
        ({"mode": "lora", "lora": {"modules_to_save": ["nrm"]}}, "did you mean norm?"),
    ],
)
def test_what_does_not_fit_is_one_line(tokenkit, values, tmp_path, changes, message):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values(train=changes, target_tokenizer=None, losses={"clm": {}})))
    code, _, error = tokenkit("distill", file)
    assert (code, error.count("\n")) == (2, 1), error
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_table_is_not_both_whole_and_in_rows(run):
    train = {"mode": "lora", "embeddings": "new_rows", "lora": {"modules_to_save": ["embed_tokens"]}}
    with pytest.raises(UserError, match="has a table as a whole, where train"):
        prepare(run(train=train))
    with pytest.raises(UserError, match="prefix: beside hypernet"):
        prepare(run(train={"prefix": PREFIX}, hypernet={"num_layers": 1}))


def test_training_goes_on_from_adapters_of_pefts(run, model_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    settings = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    peft.get_peft_model(base, settings).save_pretrained(tmp_path / "peft")
    expected = logits(
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "peft")
    )
    train = {"mode": "lora", "embeddings": "none", "lora": {"begin": str(tmp_path / "peft")}}
    options = {"target_tokenizer": None, "losses": {"forward_kl": {}}, "train": train}
    sides = prepare(run(**options))
    torch.testing.assert_close(logits(sides.student.model), expected, rtol=0, atol=1e-5)
    assert {layer.rank for layer in adapters(sides.student.model).values()} == {2}
    distill(run(**options), quiet=True)
    moved, before = (
        load_file(f / "adapter_model.safetensors") for f in (tmp_path / "out" / "adapter", tmp_path / "peft")
    )
    assert moved.keys() == before.keys()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in moved.items())
    with pytest.raises(UserError, match=r"no adapter_config\.json inside"):
        prepare(run(**options | {"train": train | {"lora": {"begin": str(tmp_path)}}}))
