"""A delta on its base is the whole transfer, bit for bit; the way back gives the original, or what became of it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTJConfig, GPTJForCausalLM, LlamaConfig, LlamaForCausalLM

from tokenkit.config import UserError
from tokenkit.models.load import load_model
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer import rows
from tokenkit.transfer.delta import apply_delta, open_delta, put_on, way_back, write_delta
from tokenkit.transfer.initialize import Choice
from tokenkit.transfer.shards import open_checkpoint
from tokenkit.transfer.stream import stream_transfer

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def saved(folder: Path, source: Tokenizer, kind: str) -> Path:
    """A Llama, tied or not, some of whose rows are equal; or a GPT-J, whose head has a bias."""
    torch.manual_seed(0)
    size = source.vocab_size + 4
    if kind == "biased":
        model = GPTJForCausalLM(GPTJConfig(vocab_size=size, n_embd=32, n_layer=1, n_head=2, rotary_dim=8))
        torch.nn.init.normal_(model.lm_head.bias)
    else:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=size, **SIZES, tie_word_embeddings=kind == "tied"))
    with torch.no_grad():
        model.get_input_embeddings().weight[20:60] = 0.0
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = [load_file(path) for path in open_checkpoint(folder).files]
    return {name: tensor for part in found for name, tensor in part.items()}


def same_files(a: Path, b: Path) -> None:
    one, other = tensors_of(a), tensors_of(b)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)
    assert json.loads((a / "config.json").read_text()) == json.loads((b / "config.json").read_text())
    names = {path.name for path in a.iterdir() if path.suffix == ".json"}
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.mark.parametrize("untie", [True, False])
@pytest.mark.parametrize("kind", ["tied", "untied", "biased"])
@pytest.mark.parametrize("name", ["fvt", "mean"])
def test_there_and_back(
    tokenizers: dict[str, Tokenizer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    kind: str,
    untie: bool,
) -> None:
    monkeypatch.setattr(rows, "BLOCK_BYTES", 30_000)
    source, target = tokenizers["small"], tokenizers["large"]
    base, whole, again, back = (tmp_path / one for one in ("base", "whole", "again", "back"))
    checkpoint = open_checkpoint(saved(base, source, kind))
    how = {"pad_to_multiple_of": 16, "untie": untie}
    rewrite, plan, _ = stream_transfer(checkpoint, source, target, Choice(name), **how)
    whole.mkdir()
    rewrite.write(whole)
    delta = tmp_path / "delta"
    delta.mkdir()
    stored = write_delta(rewrite, delta, {})
    assert 0 < stored <= len(rewrite.parts) * rewrite.size - (200 if name == "fvt" else 1)  # copies are not stored

    put, same = put_on(open_delta(delta), checkpoint, source, target)
    again.mkdir()
    put.write(again)
    put.verify(again)
    assert same
    same_files(whole, again)

    model = load_model(str(base))
    apply_delta(model, open_delta(delta), checkpoint, target)
    wanted = load_model(str(whole)).state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in model.state_dict().items())

    (whole / "reverse").mkdir()
    way_back(checkpoint, whole, plan, whole / "reverse")
    returned, untouched = put_on(open_delta(whole / "reverse"), open_checkpoint(whole), target, source, trained=True)
    back.mkdir()
    returned.write(back)
    returned.verify(back)
    assert untouched
    same_files(base, back)


def test_another_base_is_refused_in_one_line(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    source, target = tokenizers["small"], tokenizers["large"]
    base = saved(tmp_path / "base", source, "untied")
    rewrite = stream_transfer(open_checkpoint(base), source, target)[0]
    (tmp_path / "delta").mkdir()
    write_delta(rewrite, tmp_path / "delta", {})
    delta = open_delta(tmp_path / "delta")

    def complaint(folder: Path) -> str:
        found = []
        for put in (
            lambda: put_on(delta, open_checkpoint(folder), source, target),
            lambda: apply_delta(load_model(str(folder)), delta, open_checkpoint(folder), target),
        ):
            with pytest.raises(UserError) as error:
                put()
            found.append(str(error.value))
        assert found[0] == found[1]
        assert "\n" not in found[0]
        return found[0]

    other = saved(tmp_path / "other", source, "untied")
    path = open_checkpoint(other).entries["lm_head.weight"].path
    tensors = load_file(path)
    tensors["lm_head.weight"][7, 3] += 1
    save_file(tensors, path, {"format": "pt"})
    assert "are not those that it was made against; take its base" in complaint(other)
    assert "made for input rows" in complaint(saved(tmp_path / "sized", tokenizers["large"], "untied"))
    assert "made for a llama, and" in complaint(saved(tmp_path / "kind", source, "biased"))
    with pytest.raises(UserError, match=r"no delta\.json of a delta; write a folder of"):
        open_delta(base)


def test_trained_rows_come_back_trained_and_others_as_they_were(
    tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    """Also a model that is saved in another number format since, whose settings are those of then."""
    source, target = tokenizers["marked"], tokenizers["small"]
    base, moved, back = (tmp_path / one for one in ("base", "moved", "back"))
    checkpoint = open_checkpoint(saved(base, source, "untied"))
    rewrite, plan, _ = stream_transfer(checkpoint, source, target)
    moved.mkdir()
    rewrite.write(moved)
    (moved / "reverse").mkdir()
    way_back(checkpoint, moved, plan, moved / "reverse")

    model = load_model(str(moved))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5
    model.config.rope_parameters["rope_theta"] = 77.0
    trained = tmp_path / "trained"
    model.save_pretrained(trained)
    returned, untouched = put_on(open_delta(moved / "reverse"), open_checkpoint(trained), target, source, trained=True)
    back.mkdir()
    returned.write(back)
    returned.verify(back)
    assert not untouched
    found, old, new = load_model(str(back)).state_dict(), load_model(str(base)).state_dict(), model.state_dict()
    assert json.loads((back / "config.json").read_text())["rope_parameters"]["rope_theta"] == 77.0
    nearest = {int(plan.pieces[plan.offsets[i]]): i for i in range(len(plan)) if plan.lengths[i] == 1}
    assert 50 < len(nearest) < source.vocab_size
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        equal = [i for i in nearest if torch.equal(found[name][i], new[name][nearest[i]])]
        assert len(equal) >= 0.9 * len(nearest)  # a token with two ids comes back from one of them
        kept = [i for i in range(len(found[name])) if torch.equal(found[name][i], old[name][i])]
        assert len(kept) + len(equal) >= 0.95 * len(found[name])
        assert any(len(old[name]) > i >= source.vocab_size for i in kept)  # rows that stand for no token too
    assert all(torch.equal(found[key], new[key]) for key in new if "embed" not in key and "head" not in key)
