"""Loading is complete or refused in one line; parameter names are found by identity."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tokenkit.config import UserError
from tokenkit.models.load import load_model


def tiny(**options: object) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes, **options)).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_comes_back_in_evaluation_mode_and_in_the_dtype_asked_for(saved: Path) -> None:
    ids = torch.arange(8)[None]
    model = load_model(str(saved))
    assert not model.training
    assert torch.equal(model(ids).logits, tiny()(ids).logits)
    assert load_model(str(saved), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_loading_prints_nothing(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(str(saved))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("source", ["/no/such/folder", "./none", "a/b/c"])
def test_a_missing_folder_is_one_line(source: str) -> None:
    with pytest.raises(UserError, match="no such folder") as caught:
        load_model(source)
    assert "\n" not in str(caught.value)


def test_folders_that_hold_no_model_are_one_line_each(saved: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(str(empty))
    (saved / "config.json").write_text('{"model_type": "no_such_family"}')
    with pytest.raises(UserError, match="not a causal language model") as caught:
        load_model(str(saved))
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'\nand some more lines")

    monkeypatch.setattr("tokenkit.models.load.AutoModelForCausalLM.from_pretrained", refuse)
    with pytest.raises(UserError, match=r"owner/name: .*couldn't connect") as caught:
        load_model("owner/name")
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_never_read(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(weights, saved / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights are never read"):
        load_model(str(saved))


def test_incomplete_weights_are_refused_by_name(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(saved))
