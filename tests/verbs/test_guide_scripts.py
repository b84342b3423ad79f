"""The guide's scripts are the verbs under other names of keys, and what they write loads as the guide says."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from tokenkit.config import UserError
from tokenkit.verbs.guide import HARNESS, MODEL, renamed

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def run(monkeypatch):
    """Runs a script with words, in this process; its exit code is raised."""

    def start(name: str, *words: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")

    return start


def test_keys_of_the_guide_become_keys_of_the_run_file():
    words = ["model_path=a=b", "output_path=o", "format=gguf", "quantization=bfloat16", "use_cpu=true"]
    expected = ["model.source=a=b", "output=o", "format=gguf", "format=huggingface", "dtype=bfloat16", "device=cpu"]
    assert renamed(words, MODEL) == expected
    assert renamed(["eval.tasks=[a]", "x.yaml"], MODEL, HARNESS) == ["eval.harness.tasks=[a]", "x.yaml"]
    with pytest.raises(UserError, match="quantization: 'int7' is not known; write one of int8"):
        renamed(["quantization=int7"], MODEL)


def test_the_guides_pipeline_example_runs(run, model_folder, tmp_path):
    run("export_model", f"model_path={model_folder}", f"output_path={tmp_path / 'out'}", "format=huggingface")
    pipe = pipeline("text-generation", model=str(tmp_path / "out"))
    result = pipe("the cat sat", max_new_tokens=8, max_length=None)
    assert result[0]["generated_text"].startswith("the cat sat")


def test_a_mistake_is_one_line_and_exit_code_2(run, model_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(
            "optimize_for_inference", f"model_path={model_folder}", f"output_path={tmp_path / 'o'}", "quantization=int7"
        )
    assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        run("export_model", f"model_path={tmp_path / 'none'}", f"output_path={tmp_path / 'o'}")
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["optimize_for_inference", "export_model"]
    assert not (tmp_path / "o").exists()


def test_what_the_other_scripts_write(run, model_folder, corpus, tmp_path, capsys):
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora")
    run("merge_lora", f"base_model={model_folder}", f"lora_model={tmp_path}/lora", f"output_path={tmp_path}/merged")
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("the cat", return_tensors="pt")["input_ids"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(merged(ids).logits, adapted.eval()(ids).logits, atol=1e-5)
    run("export_to_onnx", f"model_path={tmp_path}/merged", f"output_path={tmp_path}/m.onnx", "dynamic_axes=true")
    assert (tmp_path / "m.onnx").stat().st_size > 0
    capsys.readouterr()
    run("eval", f"model_path={tmp_path}/merged", f"eval.source.path={corpus}", "eval.source.max_bytes=2000")
    alone = yaml.safe_load(capsys.readouterr().out)["bits_per_byte"]
    models = f'models=[{{"source": "{tmp_path}/merged"}}, {{"source": "{tmp_path}/merged"}}]'
    source = [f"source.path={corpus}", "source.max_bytes=2000"]
    run("eval_lockstep", models, *source, "combine_strategy=mean_logits", f"output={tmp_path}/both.json")
    assert json.loads((tmp_path / "both.json").read_text())["bits_per_byte"] == pytest.approx(alone, abs=1e-6)
