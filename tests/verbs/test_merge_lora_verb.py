"""`tokenkit merge-lora`, and `adapter` as a key of every model."""

from pathlib import Path

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenkit.verbs.model import ModelChoice, load_pair
from tokenkit.verbs.record import teacher_identity

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks
IDS = torch.arange(3, 9)[None]


def adapted(base: torch.nn.Module, folder: Path) -> torch.Tensor:
    """Writes adapters that do something; the logits that PEFT computes with them."""
    settings = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(base, settings).eval()
    wrapped.save_pretrained(folder)
    with torch.no_grad():
        return wrapped(IDS).logits


def test_the_verb_and_the_key_of_a_model(tokenkit, model_folder, tmp_path: Path) -> None:
    base, _ = load_pair(ModelChoice(source=str(model_folder)), "cpu")
    expected = adapted(base, tmp_path / "adapter")
    code, out, _ = tokenkit(
        "merge-lora", f"base_model={model_folder}", f"lora_model={tmp_path}/adapter", f"output={tmp_path}/out"
    )
    assert (code, "dtype: float32" in out) == (0, True)
    merged, _ = load_pair(ModelChoice(source=str(tmp_path / "out")), "cpu")
    loaded, _ = load_pair(ModelChoice(source=str(model_folder), adapter=tmp_path / "adapter"), "cpu")
    for model in (merged, loaded):
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    code, _, error = tokenkit(
        "merge-lora", f"base_model={model_folder}", f"lora_model={tmp_path}/adapter", f"output={tmp_path}/out"
    )
    assert (code, error.count("\n"), "exists already" in error) == (2, 1, True)


def test_an_adapter_makes_it_another_teacher(model_folder, tmp_path: Path) -> None:
    base, _ = load_pair(ModelChoice(source=str(model_folder)), "cpu")
    adapted(base, tmp_path / "adapter")
    choices = [ModelChoice(source=str(model_folder), adapter=folder) for folder in (None, tmp_path / "adapter")]
    assert teacher_identity(choices[0]) != teacher_identity(choices[1])


def test_what_does_not_fit_is_one_line(tokenkit, model_folder, tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=9, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    adapted(LlamaForCausalLM(config), tmp_path / "adapter")
    words = ["merge-lora", f"base_model={model_folder}", f"output={tmp_path}/out"]
    code, _, error = tokenkit(*words, f"lora_model={tmp_path}/adapter")
    assert (code, error.count("\n"), "take the model it was trained on" in error) == (2, 1, True)
    code, _, error = tokenkit(*words, f"lora_model={tmp_path}/none")
    assert (code, error.count("\n"), "no adapter_config.json inside" in error) == (2, 1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
