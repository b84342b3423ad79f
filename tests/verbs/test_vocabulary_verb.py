"""`tokenkit vocabulary`: the tokenizer that is written, the model's rows bit for bit, figures, mistakes of one line."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenkit.config import parse_yaml
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.surgery.reachable import reachability

FOREIGN = "Кошка сидела на коврике, и другая кошка сидела на коврике.\n\nund die Katze saß auf der Matte\n\n" * 4


@pytest.fixture
def foreign(tmp_path):
    path = tmp_path / "foreign.txt"
    path.write_text(FOREIGN, "utf-8")
    return path


def done(result):
    code, out, err = result
    assert code == 0, err
    return parse_yaml(out)


def one_line(result, words):
    code, _, err = result
    assert code == 2
    assert err.count("\n") == 1
    assert words in err


def logits(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def rows(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()


def test_a_model_is_extended(tokenkit, tmp_path, model_folder, foreign, documents):
    output = tmp_path / "out"
    words = (f"output={output}", f"model.source={model_folder}", f"texts.path={foreign}", "tokens=24")
    report = done(tokenkit("vocabulary", "extend", *words))
    old, new = load_tokenizer(str(model_folder)), load_tokenizer(str(output))
    assert report["new"] == 24 == new.vocab_size - old.vocab_size
    assert report["ids"] == {"before": old.vocab_size, "after": new.vocab_size}
    assert report["unreachable"] == {"before": 0, "after": 0}
    assert report["bytes_per_token"]["after"] > report["bytes_per_token"]["before"]
    assert report["embedding_parameters"]["after"] - report["embedding_parameters"]["before"] == 24 * 32
    assert new.token_bytes[: old.vocab_size] == old.token_bytes
    for before, after in zip(rows(model_folder), rows(output), strict=True):
        assert torch.equal(before, after[: old.vocab_size])
        pieces = old.encode(new.token_bytes[-1].decode()).ids.tolist()  # FVT: the mean of what spelled it before
        assert torch.allclose(after[-1], before[pieces].mean(0), atol=1e-6)
    ids = old.encode(documents[0][:80], special=True).ids.tolist()
    assert new.encode(documents[0][:80], special=True).ids.tolist() == ids
    before, after = logits(model_folder, ids), logits(output, ids)
    # the same rows times the same states; a product of another shape may round otherwise
    assert torch.allclose(before, after[:, : old.vocab_size], atol=1e-6)
    listed = json.loads((output / "vocabulary.json").read_text("utf-8"))["tokens"]
    assert [*map(int, listed)] == [*range(old.vocab_size, new.vocab_size)]
    stock = AutoTokenizer.from_pretrained(output)
    assert stock(FOREIGN)["input_ids"] == new.encode(FOREIGN, special=True).ids.tolist()


@pytest.mark.parametrize("by", ["leaf_frequency", "last"])
def test_a_model_is_pruned(tokenkit, tmp_path, model_folder, corpus, documents, by):
    output = tmp_path / "out"
    words = (f"output={output}", f"model.source={model_folder}", f"texts.path={corpus}", "size=290", f"by={by}")
    report = done(tokenkit("vocabulary", "prune", *words))
    old, new = load_tokenizer(str(model_folder)), load_tokenizer(str(output))
    mapping = {int(i): j for i, j in json.loads((output / "vocabulary.json").read_text("utf-8"))["mapping"].items()}
    assert new.vocab_size == 290 == len(mapping) == report["ids"]["after"]
    assert report["gone"] == old.vocab_size - 290
    assert not len(reachability(new).unreachable)
    kept = [*mapping]
    assert [mapping[i] for i in kept] == [*range(290)]
    assert [old.token_bytes[i] for i in kept] == new.token_bytes
    assert new.special_tokens == {name: mapping[i] for name, i in old.special_tokens.items()}
    for before, after in zip(rows(model_folder), rows(output), strict=True):
        assert torch.equal(before[kept], after)
    texts = [text for text in documents if {*old.encode(text).ids.tolist()} <= mapping.keys()]
    ids = old.encode((texts or ["a c e"])[0], special=True).ids.tolist()[:60]
    assert new.encode((texts or ["a c e"])[0], special=True).ids.tolist()[:60] == [mapping[i] for i in ids]
    before, after = logits(model_folder, ids), logits(output, [mapping[i] for i in ids])
    assert torch.allclose(before[:, kept], after, atol=1e-6)
    stock = AutoTokenizer.from_pretrained(output)
    assert stock(documents[1])["input_ids"] == new.encode(documents[1], special=True).ids.tolist()


def test_scripts_go_and_what_texts_use_stays(tokenkit, tmp_path, model_folder, foreign, corpus):
    wide = tmp_path / "wide"
    done(tokenkit("vocabulary", "extend", f"output={wide}", f"tokenizer={model_folder}", f"texts.path={foreign}"))
    assert sorted(path.name for path in wide.iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
        "vocabulary.json",
    ]
    words = (f"tokenizer={wide}", "scripts=[latin]")
    report = done(tokenkit("vocabulary", "prune", f"output={tmp_path / 'latin'}", *words))
    tokens = b"\0".join(load_tokenizer(str(tmp_path / "latin")).token_bytes).decode(errors="ignore")
    assert report["scripts_gone"]["Cyrillic"] > 5
    assert "Katze" in tokens
    assert not any("а" <= character <= "я" for character in tokens)
    used = tmp_path / "used.txt"
    used.write_text("Кошка und die Katze", "utf-8")
    kept = done(tokenkit("vocabulary", "prune", f"output={tmp_path / 'used'}", *words, f"texts.path={used}"))
    assert kept["bytes_per_token"]["before"] == kept["bytes_per_token"]["after"]
    assert kept["gone"] < report["gone"]
    words = (f"output={tmp_path / 'x'}", f"tokenizer={wide}", "scripts=[Latn]")
    one_line(tokenkit("vocabulary", "prune", *words), "Latin")


def test_a_list_is_kept_with_what_it_is_made_of(tokenkit, tmp_path, model_folder):
    old = load_tokenizer(str(model_folder))
    longest = max(range(old.vocab_size), key=lambda i: len(old.token_bytes[i]))
    listed = tmp_path / "keep.json"
    listed.write_text(json.dumps([old.token_bytes[longest].decode(), old.vocab_size - 1]), "utf-8")
    words = (f"tokenizer={model_folder}", f"keep={listed}")
    report = done(tokenkit("vocabulary", "prune", f"output={tmp_path / 'out'}", *words))
    new = load_tokenizer(str(tmp_path / "out"))
    assert old.token_bytes[longest] in new.token_bytes
    assert 258 < new.vocab_size == report["ids"]["after"] < old.vocab_size - 20
    assert not len(reachability(new).unreachable)
    holes = done(tokenkit("vocabulary", "prune", f"output={tmp_path / 'holes'}", *words, "keep_ids=true"))
    assert holes["gone"] == report["gone"]
    with_holes = load_tokenizer(str(tmp_path / "holes")).token_bytes
    assert all(one in (b"", old.token_bytes[i]) for i, one in enumerate(with_holes))
    listed.write_text('["no such token"]', "utf-8")
    one_line(tokenkit("vocabulary", "prune", f"output={tmp_path / 'y'}", *words), "is no token")


def test_dead_tokens_are_counted_and_pruned(tokenkit, tmp_path, bpe):
    bpe.save(tmp_path / "dead")
    definition = bpe.definition
    definition["model"]["vocab"]["Ġzebra"] = bpe.vocab_size
    (tmp_path / "dead/tokenizer.json").write_text(json.dumps(definition), "utf-8")
    found = done(tokenkit("vocabulary", "check", tmp_path / "dead"))
    assert found["unreachable"] == 1
    assert found["examples"] == {"merges": {str(bpe.vocab_size): " zebra"}}
    report = done(tokenkit("vocabulary", "prune", f"output={tmp_path / 'out'}", f"tokenizer={tmp_path / 'dead'}"))
    assert (report["gone"], report["unreachable"]) == (1, {"before": 1, "after": 0})
    assert load_tokenizer(str(tmp_path / "out")).token_bytes == bpe.token_bytes


def test_a_model_that_must_be_in_memory_gets_the_same_rows(tokenkit, tmp_path, model_folder, foreign):
    words = (f"model.source={model_folder}", f"texts.path={foreign}", "tokens=9")
    done(tokenkit("vocabulary", "extend", f"output={tmp_path / 'a'}", *words))
    remote = (*words, "model.trust_remote_code=true", "device=cpu")
    done(tokenkit("vocabulary", "extend", f"output={tmp_path / 'b'}", *remote))
    assert torch.equal(rows(tmp_path / "a")[0], rows(tmp_path / "b")[0])


def test_mistakes_are_one_line(tokenkit, tmp_path, model_folder, corpus, unigram):
    unigram.save(tmp_path / "unigram")
    output, texts = f"output={tmp_path / 'out'}", f"texts.path={corpus}"
    tokenizer, model = f"tokenizer={model_folder}", f"model.source={model_folder}"
    cases = [
        (("extend", output, texts), "tokenizer: missing"),
        (("extend", output, texts, tokenizer, model), "model.tokenizer"),
        (("extend", output, texts, f"tokenizer={tmp_path / 'unigram'}"), "Unigram"),
        (("extend", output, tokenizer), "texts"),
        (("extend", f"output={model_folder}", texts, tokenizer), "exists already"),
        (("prune", output, tokenizer), "nothing to take away"),
        (("prune", output, tokenizer, "size=300"), "by: 'leaf_frequency' needs text"),
        (("prune", output, tokenizer, "size=20", "by=last"), "size: 20 is too small"),
        (("prune", output, tokenizer, "by=leaf"), "leaf_frequency"),
        (("prune", output, f"tokenizer={tmp_path / 'unigram'}", "size=320", "by=last", "keep_ids=true"), "keep_ids"),
        (("check", "byte"), "no merges"),
    ]
    for words, expected in cases:
        one_line(tokenkit("vocabulary", *words), expected)
    assert not (tmp_path / "out").exists()
