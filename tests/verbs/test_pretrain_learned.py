"""`tokenkit pretrain` on a learned tokenizer: rows from latents, codes by parts, strings learnt along."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.verbs.test_pretrain import values
from tokenkit.config import UserError, build
from tokenkit.models.factorised_view import view_of
from tokenkit.models.load import input_matrix, load_model
from tokenkit.models.speller import Speller, drawn_ids
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.train.loop import Interrupted
from tokenkit.verbs.evaluate import EvalRun, evaluate
from tokenkit.verbs.generate import GenerateRun, prepared
from tokenkit.verbs.pretrain import PretrainRun, pretrain


def run_of(tmp_path, corpus, folder, name="out", steps=20, **changes):
    whole = values(tmp_path, corpus)
    whole["train"] = {**whole["train"], "steps": steps, **changes.pop("train", {})}
    learned = {"tokenizer": {"load": str(folder)}, "output": tmp_path / name, "export_dtype": "float32"}
    return build(PretrainRun, {**whole, **learned, **changes})


def weights(run):
    return load_file(run.output / "model" / "model.safetensors")


@pytest.mark.parametrize("embeddings", ["random", "decoder"])
def test_an_open_tokenizer_is_learnt_by_parts(tmp_path, corpus, open_folder, embeddings):
    run = run_of(tmp_path, corpus, open_folder, steps=40, embeddings=embeddings, train={"eval_at": [0]})
    results = pretrain(run, quiet=True)
    lines = (run.output / "metrics.jsonl").read_text("utf-8").splitlines()
    before = json.loads(lines[0])["bits_per_byte"]
    assert results["bits_per_byte"] < before - 0.5
    model = str(run.output / "model")
    again = evaluate(build(EvalRun, {"model": {"source": model}, "eval": run.eval.model_dump()}))
    assert again["bits_per_byte"] == pytest.approx(results["bits_per_byte"], rel=1e-5)
    options = {"prompts": ["the cat", "green"], "max_new_tokens": 8, "temperature": 1.0}
    texts = prepared(build(GenerateRun, {"model": {"source": model}, **options})).texts()
    assert all(text.startswith(prompt) for text, prompt in zip(texts, options["prompts"]))


def test_a_run_that_was_stopped_goes_on_with_its_tables(tmp_path, corpus, open_folder):
    whole = run_of(tmp_path, corpus, open_folder, "whole", steps=6)
    pretrain(whole, quiet=True)
    with pytest.raises(Interrupted):
        pretrain(run_of(tmp_path, corpus, open_folder, "cut", steps=6, train={"stop_after": 3}), quiet=True)
    parts = run_of(tmp_path, corpus, open_folder, "cut", steps=6)
    pretrain(parts, resume=True, quiet=True)
    for name in ("base/model.safetensors", "factorised.safetensors"):
        one, two = (load_file(run.output / "model" / name) for run in (whole, parts))
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_rows_made_of_latents_are_what_training_begins_with(tmp_path, corpus, compact_folder):
    run = run_of(tmp_path, corpus, compact_folder, steps=1, embeddings="digit_sum")
    pretrain(run, quiet=True)
    plain = run_of(tmp_path, corpus, compact_folder, "plain", steps=1)
    pretrain(plain, quiet=True)
    name = "model.embed_tokens.weight"
    assert not torch.allclose(weights(run)[name], weights(plain)[name], atol=1e-2)


def test_a_weight_of_zero_is_the_plain_run(tmp_path, corpus, compact_folder):
    plain = run_of(tmp_path, corpus, compact_folder, "plain", embeddings="decoder")
    zero = run_of(tmp_path, corpus, compact_folder, "zero", embeddings="decoder", reconstruction={"weight": 0})
    assert pretrain(plain, quiet=True) == pretrain(zero, quiet=True)
    one, two = weights(plain), weights(zero)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_strings_learnt_along_stay_readable_and_ids_stay(tmp_path, corpus, compact_folder):
    run = run_of(tmp_path, corpus, compact_folder, embeddings="decoder", reconstruction={"weight": 1.0}, steps=40)
    results = pretrain(run, quiet=True)
    assert results["spelled"] > results["spelled_before"]
    kept, given = (load_tokenizer(str(f)) for f in (run.output / "tokenizer", compact_folder))
    assert kept.fingerprint == given.fingerprint
    network, other = kept.network(), given.network()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters()))
    moved = load_file(run.output / "speller.safetensors")
    assert {name.split(".")[0] for name in moved} == {"map", "network"}
    assert all(name.startswith(("map.", "network.decoder.")) for name in moved)
    assert not torch.equal(moved["network.decoder.enter.weight"], other.decoder.enter.weight)


def test_however_a_step_is_cut_the_same_tokens_are_read(tmp_path, corpus, compact_folder):
    options = {"embeddings": "decoder", "reconstruction": {"weight": 0.5, "num_tokens": 16}, "steps": 3}
    whole = run_of(tmp_path, corpus, compact_folder, "whole", **options)
    parts = run_of(tmp_path, corpus, compact_folder, "parts", **options, train={"accumulation": 2})
    for run in (whole, parts):
        pretrain(run, quiet=True)
    for key, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parts)[key], tensor, atol=2e-4, rtol=1e-3)


def test_the_speller_begins_near_what_the_decoder_says(compact_folder):
    tokenizer = load_tokenizer(str(compact_folder))
    network, codec = tokenizer.network(), tokenizer.codec
    rows = torch.randn(tokenizer.vocab_size, 512, generator=torch.Generator().manual_seed(0))
    speller = Speller(network, codec, rows)
    symbols = speller.symbols
    said = network.logits(network.quantizer.dequantize(network.digits(symbols))).argmax(-1)
    labels = speller.labels(torch.arange(speller.first, speller.first + len(symbols)).numpy())
    alone = ((said == symbols) | (labels < 0)).all(1).double().mean().item()
    assert speller.exact(rows) == pytest.approx(alone, abs=0.02)  # more channels than strings: the map is exact
    ids = torch.tensor([0, 2, 70, 70, 330, 330, 2, 331]).numpy()
    assert drawn_ids([ids], speller, 10, [0, 0]).tolist() == [70, 330, 331]
    assert len(drawn_ids([ids], speller, 2, [0, 0])) == 2


def test_other_tokenizers_have_no_latents(tmp_path, corpus):
    whole = values(tmp_path, corpus)
    for key, value in (("embeddings", "decoder"), ("reconstruction", {"weight": 0.1})):
        with pytest.raises(UserError, match=f"{key}: needs a learned tokenizer"):
            pretrain(build(PretrainRun, {**whole, "output": tmp_path / key, key: value}), quiet=True)


def test_the_exported_compact_model_is_a_stock_one(tmp_path, corpus, compact_folder):
    run = run_of(tmp_path, corpus, compact_folder, steps=2, embeddings="decoder")
    pretrain(run, quiet=True)
    model = load_model(str(run.output / "model"))
    assert len(input_matrix(model)) == load_tokenizer(str(compact_folder)).vocab_size
    assert type(view_of(model)).__name__ == "ModelView"
