"""`tokenkit audit`: any model folder, what a transfer did, and a planted token from the donor to the override."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenkit.config import UserError
from tokenkit.data.source import SourceConfig
from tokenkit.models.load import load_model
from tokenkit.transfer.rows import TensorRows
from tokenkit.verbs.audit import AuditRun, audit, load_audit
from tokenkit.verbs.model import ModelChoice
from tokenkit.verbs.transfer import TransferOptions, TransferRun, transfer

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "breaker_search.py"


def attacks():
    spec = importlib.util.spec_from_file_location("breaker_search", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny(folder, tokenizer, seed):
    """A random model whose logits are as large as those of trained ones."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=48, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id,
        initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, bpe, unigram):
    """The folders of a base and of a donor."""
    folder = tmp_path_factory.mktemp("pair")
    return tiny(folder / "base", bpe, 0), tiny(folder / "donor", unigram, 1)


def moved(pair, folder, **options):
    """A transfer of the base to the donor's tokenizer, and how it was made."""
    options = TransferOptions.model_validate(options)
    base, donor = pair
    transfer(TransferRun(output=folder, model=ModelChoice(source=base), target_tokenizer=donor, transfer=options))
    return options


def looked_at(folder, corpus, **more):
    return audit(AuditRun(model={"source": str(folder)}, text=SourceConfig(path=str(corpus)), contexts=300, **more))


def test_any_folder_is_audited_in_80_columns_and_as_json(tokenkit, monkeypatch, model_folder):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = tokenkit("audit", model_folder, "contexts=100")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    for topic in ("ids", "settings", "chat template", "norms", "repeated", "predictions", "winners"):
        assert topic in out
    code, out, _ = tokenkit("audit", model_folder, "contexts=100", "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert code == 0
    assert {"findings", "rows", "breakers", "override", "facts", "model"} == set(found)
    assert {"topic", "level", "sentence", "numbers"} == set(found["findings"][0])


def test_rows_read_from_files_give_the_same_findings(model_folder):
    run = ["contexts=20"]
    live, streamed = (audit(load_audit([str(model_folder), *run, *more])) for more in ([], ["weights_only=true"]))
    said = {one.topic: one for one in live.findings}
    assert len(streamed.findings) == len(live.findings) - 3  # without what needs the model to run
    for one in streamed.findings:
        assert one.sentence == said[one.topic].sentence
        assert one.numbers.keys() == said[one.topic].numbers.keys()


def test_mistakes_are_one_line(tokenkit, tmp_path, pair):
    for words, said in (
        (["nowhere/at/all"], "no such folder"),
        ([pair[0], "transfer.initializer=fvt"], "write reference=FOLDER"),
        ([pair[0], "contexts=0"], "contexts"),
        ([pair[0], "options.cosine=2"], "options.cosine"),
        ([pair[0], f"output={tmp_path}"], "is there already"),
        ([pair[0], f"reference={pair[0]}", "transfer.initializer=fvt", "weights_only=true"], "weights_only"),
    ):
        code, out, error = tokenkit("audit", *words)
        assert (code, out) == (2, "")
        assert error.count("\n") == 1
        assert said in error


def test_a_model_is_its_own_reference(pair, corpus):
    found = looked_at(pair[0], corpus, reference={"source": pair[0]})
    assert found.finding("input and output: kept rows").numbers["moved"] == 0
    assert found.finding("body").level == "ok"


def test_what_a_transfer_kept_is_told(pair, corpus, tmp_path):
    """Means of pieces: kept rows are kept, nothing was planted; the mean of everything: no row is."""
    options = moved(pair, tmp_path / "fvt", initializer="fvt")
    found = looked_at(tmp_path / "fvt", corpus, reference={"source": pair[0]}, transfer=options)
    assert found.finding("input and output: kept rows").level == "ok"
    assert found.finding("body").level == "ok"
    assert found.finding("planted tokens").level == "ok"
    options = moved(pair, tmp_path / "mean", initializer="mean")
    found = looked_at(tmp_path / "mean", corpus, reference={"source": pair[0]}, transfer=options)
    assert found.finding("input and output: kept rows").numbers["far"] > 0
    assert found.finding("input and output: repeated rows").level == "warning"


def test_a_planted_token_is_found_first_and_its_override_mends_it(pair, corpus, tmp_path, unigram, documents):
    """From a donor with one forged row to the line that makes that row of its pieces."""
    attack, (base, donor) = attacks(), pair
    attack.ROUNDS = 15
    scene = attack.scene(base, donor, documents[:20])
    text = {i: unigram.token_bytes[i].decode() for i in scene.plan.free.tolist()}
    met = np.concatenate([encoding.ids for encoding in unigram.encode_batch(documents)])
    token = next((i for i in text if i not in met), next(iter(text)))
    attack.planted(donor, token, attack.forged(scene, token, 32, 0), tmp_path / "planted")
    planted = (base, str(tmp_path / "planted"))
    how = {"initializer": "omp", "omp": {"k": 32}, "donor": planted[1]}
    options = moved(planted, tmp_path / "harmed", **how)
    found = looked_at(tmp_path / "harmed", corpus, reference={"source": base}, transfer=options)
    finding = found.finding("planted tokens")
    assert finding.level == "warning"
    assert finding.numbers["against_donor"] is True
    assert finding.numbers["made_again"] == 1
    assert found.breakers[0]["id"] == token
    assert found.breakers[0]["wins"] > 10 * found.breakers[0]["wins_other"]
    assert found.breakers[0]["flagged"]
    assert found.override[text[token]] == text[token]
    options = moved(planted, tmp_path / "mended", **how, override=found.override)
    mended = looked_at(tmp_path / "mended", corpus, reference={"source": base}, transfer=options)
    assert token not in [one["id"] for one in mended.breakers]
    rows = TensorRows(load_model(str(tmp_path / "mended")).get_input_embeddings().weight.detach())
    part = slice(int(scene.plan.offsets[token]), int(scene.plan.offsets[token + 1]))
    wanted = scene.base[scene.plan.pieces[part].astype(np.int64)].mean(0)
    torch.testing.assert_close(rows.gather(np.array([token]))[0], wanted)


def test_rows_that_were_trained_since_are_no_longer_what_was_made(pair, corpus, tmp_path):
    options = moved(pair, tmp_path / "model", initializer="omp", donor=pair[1], omp={"k": 8})
    model = load_model(str(tmp_path / "model"))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.3)
    model.save_pretrained(tmp_path / "model")
    found = looked_at(tmp_path / "model", corpus, reference={"source": pair[0]}, transfer=options)
    assert found.finding("planted tokens").numbers["made_again"] == 0
    assert "was changed since" in found.finding("planted tokens").sentence


def test_output_is_whole_json(pair, corpus, tmp_path):
    found = looked_at(pair[0], corpus, output=tmp_path / "deep" / "audit.json")
    assert json.loads((tmp_path / "deep" / "audit.json").read_text("utf-8"))["model"] == found.name
    with pytest.raises(UserError, match="is there already"):
        load_audit([pair[0], f"output={tmp_path / 'deep' / 'audit.json'}"])
